"""Learning curves of query strategies, against a plain loop."""

from __future__ import annotations

import json
import os
import random
import signal
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from modAL.uncertainty import entropy_sampling
from sklearn.base import BaseEstimator
from sklearn.datasets import load_iris
from sklearn.metrics import f1_score
from sklearn.model_selection import (
    GroupKFold,
    GroupShuffleSplit,
    KFold,
    LeavePGroupsOut,
    StratifiedKFold,
    StratifiedShuffleSplit,
)
from sklearn.naive_bayes import GaussianNB
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from skorch import NeuralNetClassifier
from skorch.callbacks import Callback

from skfishermask import FisherMaskSampler, active_learning_curve
from tests import forked
from tests.nets import digits, logits_net

X, Y = load_iris(return_X_y=True)
CV = StratifiedKFold(3, shuffle=True, random_state=0)


def first_rows(learner: Any, X_pool: Any, n_instances: int = 1) -> np.ndarray:
    return np.arange(n_instances)


def least_sure(learner: Any, X_pool: Any, n_instances: int = 1) -> tuple[np.ndarray, np.ndarray]:
    sure = learner.predict_proba(X_pool).max(axis=1)
    chosen = np.argsort(sure, kind="stable")[:n_instances]
    return chosen, sure[chosen]


def curve(strategy: Any = least_sure, estimator: Any = None, **more: Any) -> dict[str, np.ndarray]:
    options: dict[str, Any] = {
        "n_initial": 9,
        "n_instances": 5,
        "n_queries": 3,
        "cv": CV,
        "random_state": 0,
        "return_indices": True,
    }
    estimator = GaussianNB() if estimator is None else estimator
    return active_learning_curve(estimator, X, Y, query_strategy=strategy, **options | more)


def numbers(result: dict[str, np.ndarray]) -> dict[str, Any]:
    """What must be the same in every run: not the seconds."""
    return {k: v.tolist() for k, v in result.items() if k not in ("fit_time", "query_time")}


def plain_loop(strategy: Any, indices: np.ndarray) -> tuple[list[list[float]], list[list[int]]]:
    """The oracle: from the same initial rows, everything else written out."""
    all_scores, all_rows = [], []
    for (train, test), start in zip(CV.split(X, Y), indices[:, :9], strict=True):
        labeled, scores = start.tolist(), []
        for query in range(4):
            model = GaussianNB().fit(X[labeled], Y[labeled])
            scores.append(model.score(X[test], Y[test]))
            if query < 3:
                pool = [i for i in sorted(train) if i not in labeled]
                chosen = strategy(model, X[pool], n_instances=5)
                chosen = chosen[0] if isinstance(chosen, tuple) else chosen
                labeled += [pool[i] for i in chosen]
        all_scores.append(scores)
        all_rows.append(labeled)
    return all_scores, all_rows


@pytest.mark.parametrize("strategy", [first_rows, least_sure])
def test_is_the_plain_loop(strategy: Any) -> None:
    result = curve(strategy)
    scores, rows = plain_loop(strategy, result["indices"])
    assert result["test_score"].tolist() == scores
    assert result["indices"].tolist() == rows
    assert result["n_labeled"].tolist() == [9, 14, 19, 24]
    assert result["n_labeled"].dtype == result["indices"].dtype == np.int64
    assert result["fit_time"].shape == (3, 4)
    assert result["query_time"].shape == (3, 3)
    assert (result["fit_time"] > 0).all()
    assert (result["query_time"] > 0).all()


def test_strategies_are_paired() -> None:
    """The same initial samples, and the same initial weights, for any strategy."""
    images, labels = digits()
    results = [
        active_learning_curve(
            logits_net(max_epochs=3),
            images[:200],
            labels[:200],
            query_strategy=strategy,
            n_initial=20,
            n_instances=5,
            n_queries=1,
            cv=2,
            random_state=1,
            return_indices=True,
        )
        for strategy in ("random", first_rows, FisherMaskSampler())
    ]
    for result in results[1:]:
        assert np.array_equal(result["indices"][:, :20], results[0]["indices"][:, :20])
        assert np.array_equal(result["test_score"][:, 0], results[0]["test_score"][:, 0])
    # What was chosen then differs, or the comparison would be of nothing.
    assert not np.array_equal(results[0]["indices"], results[2]["indices"])


def global_draws() -> list[float]:
    return [random.random(), np.random.random(), torch.rand(1).item()]  # noqa: NPY002


class Noisy(BaseEstimator):
    """Draws from everything global; a parameter that is a generator must do no harm either."""

    def __init__(self, random_state: Any = None) -> None:
        self.random_state = random_state

    def __call__(self, learner: Any, X_pool: Any, n_instances: int = 1) -> np.ndarray:
        order = np.random.permutation(len(X_pool))  # noqa: NPY002
        if self.random_state is not None:
            order = order[self.random_state.permutation(len(order))]
        return order[:n_instances]


@pytest.mark.parametrize("strategy", ["random", Noisy(), Noisy(np.random.RandomState(0))])
def test_reproducible_and_leaves_global_random_state(strategy: Any) -> None:
    before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # noqa: NPY002
    one = curve(strategy)
    after = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # noqa: NPY002
    assert before == after
    global_draws()
    assert numbers(curve(strategy)) == numbers(one)
    assert numbers(curve(strategy, random_state=1)) != numbers(one)
    assert numbers(curve(strategy, random_state=np.random.RandomState(0))) == numbers(one)


def test_no_random_state_differs_from_run_to_run() -> None:
    np.random.seed(0)  # noqa: NPY002
    one = curve("random", random_state=None)
    assert numbers(curve("random", random_state=None)) != numbers(one)


# Both in one process, which starts other ones once.
@pytest.mark.xdist_group("joblib")
def test_parallel_is_serial() -> None:
    assert numbers(curve("random", n_jobs=2)) == numbers(curve("random"))


@pytest.mark.xdist_group("joblib")
def test_progress_counts_trainings(capsys: pytest.CaptureFixture[str]) -> None:
    curve()
    assert capsys.readouterr().err == ""
    for n_jobs in (1, 2):
        curve(verbose=1, n_jobs=n_jobs)
        assert "12/12" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("scoring", "names"),
    [
        (None, ["test_score"]),
        ("f1_macro", ["test_score"]),
        (["accuracy", "f1_macro"], ["test_accuracy", "test_f1_macro"]),
        ({"mine": "balanced_accuracy"}, ["test_mine"]),
        (lambda model, X, y: {"n": len(X), "one": 1.0}, ["test_n", "test_one"]),
    ],
)
def test_scoring(scoring: Any, names: list[str]) -> None:
    result = curve(scoring=scoring)
    assert [name for name in result if name.startswith("test_")] == names
    for name in names:
        assert result[name].shape == (3, 4)
        assert result[name].dtype == float


def test_scorer_sees_the_test_part() -> None:
    def f1(model: Any, X_test: Any, y_test: Any) -> float:
        return f1_score(y_test, model.predict(X_test), average="macro")

    assert np.array_equal(curve(scoring=f1)["test_score"], curve(scoring="f1_macro")["test_score"])


@pytest.mark.parametrize("cv", [None, 4, KFold(2), [(np.arange(100), np.arange(100, 150))]])
def test_cv(cv: Any) -> None:
    n_splits = {"NoneType": 5, "int": 4, "KFold": 2, "list": 1}[type(cv).__name__]
    assert curve(cv=cv)["test_score"].shape == (n_splits, 4)


@pytest.mark.parametrize(
    "cv", [GroupKFold(3), LeavePGroupsOut(5), GroupShuffleSplit(2, random_state=0)], ids=type
)
def test_groups_stay_together(cv: Any) -> None:
    groups = np.arange(150) % 6
    result = curve(cv=cv, groups=groups.tolist())
    for (train, _), labeled in zip(cv.split(X, Y, groups), result["indices"], strict=True):
        assert set(labeled) <= set(train)
    with pytest.raises(ValueError, match="'groups' parameter should not be None"):
        curve(cv=cv)


def test_pool_does_not_depend_on_the_order_of_the_split() -> None:
    train, test = np.arange(100), np.arange(100, 150)
    start = [1, 60, 99]
    one = curve(cv=[(train, test)], n_initial=start)
    other = curve(cv=[(train[::-1], test)], n_initial=start[::-1])
    assert numbers(one) == numbers(other)


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        ({"strategy": "entropy"}, TypeError, r"\"random\" or a callable.*found 'entropy'"),
        ({"strategy": None}, TypeError, "found None"),
        ({"n_instances": 0}, ValueError, "n_instances to be an int of at least 1, found 0"),
        ({"n_queries": 1.5}, ValueError, "n_queries to be an int of at least 1, found 1.5"),
        ({"n_queries": True}, ValueError, "n_queries to be an int of at least 1, found True"),
        ({"n_queries": 19}, ValueError, "is 104, but a split has only 100"),
        ({"n_initial": [0, 1, 2]}, ValueError, "Row .* of n_initial is not in the training part"),
        ({"scoring": "nonsense"}, ValueError, "nonsense"),
    ],
)
def test_bad_arguments(more: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        curve(**more)


@pytest.mark.parametrize(
    "answer",
    [
        np.arange(4),
        np.arange(6),
        np.array([0, 0, 1, 2, 3]),
        np.array([-1, 0, 1, 2, 3]),
        np.array([0, 1, 2, 3, 1000]),
        np.arange(5.0),
        np.arange(5).reshape(5, 1),
    ],
    ids=str,
)
def test_bad_choice(answer: np.ndarray) -> None:
    with pytest.raises(ValueError, match="5 different rows of a pool of 91, found"):
        curve(lambda *_, n_instances: answer)


@pytest.mark.parametrize("answer", [[4, 2, 0, 1, 3], torch.tensor([4, 2, 0, 1, 3])], ids=str)
def test_choice_may_be_a_list_or_a_tensor(answer: Any) -> None:
    expected = curve(lambda *_, n_instances: np.array([4, 2, 0, 1, 3]))
    assert numbers(curve(lambda *_, n_instances: answer)) == numbers(expected)


def test_composes_with_what_users_have() -> None:
    """String labels, a DataFrame, a Pipeline, the sampler in both roles, a strategy of modAL."""
    images, labels = digits()
    frame = pd.DataFrame(images[:150], columns=[f"pixel{i}" for i in range(64)])
    names = np.array([f"digit {label}" for label in labels])
    model = make_pipeline(
        StandardScaler().set_output(transform="default"), FisherMaskSampler(random_state=0)
    )
    for strategy in (FisherMaskSampler(random_state=0), entropy_sampling):
        result = active_learning_curve(
            model,
            frame,
            names[:150],
            query_strategy=strategy,
            n_initial=20,
            n_instances=10,
            n_queries=1,
            cv=2,
            random_state=0,
        )
        assert (result["test_score"] > 0.3).all()
        assert "indices" not in result


def test_fishermask_sees_the_labeled_samples() -> None:
    seen = []

    class Spy(FisherMaskSampler):
        def __call__(self, classifier: Any, X_pool: Any, n_instances: int = 1, **more: Any) -> Any:
            result = super().__call__(classifier, X_pool, n_instances, **more)
            seen.append((self.query_info_["n_labeled"], self.query_info_["n_candidates"]))
            return result

    images, labels = digits()
    active_learning_curve(
        logits_net(max_epochs=1),
        images[:60],
        labels[:60],
        query_strategy=Spy(random_state=0),
        n_initial=10,
        n_instances=5,
        n_queries=2,
        cv=[(np.arange(40), np.arange(40, 60))],
        random_state=0,
    )
    assert seen == [(10, 30), (15, 25)]


# Checkpoints


def test_checkpoint_gives_the_same_and_holds_json_alone(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "run"
    expected = curve("random")
    one = curve("random", checkpoint=folder)
    assert numbers(one) == numbers(expected)
    files = sorted(folder.glob("*.json"))
    assert {*folder.iterdir()} - {*files} <= {folder / "run.lock"}
    assert [f.name for f in files] == ["run.json", *(f"split_000{i}.json" for i in range(3))]
    for file in files:
        json.loads(file.read_text())
    # Nothing is computed again: the seconds are those of the first run.
    again = curve("random", checkpoint=str(folder))
    assert {k: v.tolist() for k, v in again.items()} == {k: v.tolist() for k, v in one.items()}


class FailsAt:
    """Raises at one of its calls."""

    def __init__(self, call: int) -> None:
        self.call, self.n_calls = call, 0

    def __reduce__(self) -> Any:
        # All are one strategy, which breaks now and then.
        return FailsAt, (0,)

    def __call__(self, learner: Any, X_pool: Any, n_instances: int = 1) -> Any:
        self.n_calls += 1
        if self.n_calls == self.call:
            raise RuntimeError("the strategy broke")
        return least_sure(learner, X_pool, n_instances)


@pytest.mark.parametrize("call", [1, 2, 5, 9])
def test_goes_on_after_an_exception(tmp_path: Path, call: int) -> None:
    with pytest.raises(RuntimeError, match="the strategy broke"):
        curve(FailsAt(call), checkpoint=tmp_path)
    strategy = FailsAt(0)
    assert numbers(curve(strategy, checkpoint=tmp_path)) == numbers(curve())
    assert strategy.n_calls == 9 - (call - 1)


def test_more_queries_and_more_splits_go_on(tmp_path: Path) -> None:
    def shuffles(n: int) -> StratifiedShuffleSplit:
        return StratifiedShuffleSplit(n, test_size=50, random_state=0)

    curve(FailsAt(0), cv=shuffles(2), n_queries=2, checkpoint=tmp_path)
    strategy = FailsAt(0)
    result = curve(strategy, cv=shuffles(3), n_queries=4, checkpoint=tmp_path)
    assert numbers(result) == numbers(curve(cv=shuffles(3), n_queries=4))
    assert strategy.n_calls == 2 * 2 + 4
    fewer = curve(FailsAt(1), cv=shuffles(2), n_queries=1, checkpoint=tmp_path)
    assert numbers(fewer) == numbers(curve(cv=shuffles(2), n_queries=1))


def test_goes_on_without_random_state(tmp_path: Path) -> None:
    one = curve("random", random_state=None, checkpoint=tmp_path)
    (tmp_path / "split_0001.json").unlink()
    again = curve("random", random_state=None, checkpoint=tmp_path)
    assert numbers(again) == numbers(one)


def killed_run(moment: str, folder: Path) -> None:
    """Begin a run, and kill this process in the midst of it."""

    def kill_at(owner: Any, name: str, call: int, before: Any = lambda *args: None) -> None:
        whole, calls = getattr(owner, name), []

        def counted(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            if len(calls) == call:
                before(*args)
                os.kill(os.getpid(), signal.SIGKILL)
            return whole(*args, **kwargs)

        setattr(owner, name, counted)

    def write_half(content: Any, stream: Any) -> None:
        stream.write('{"steps": [{"sco')
        stream.flush()

    torch.set_num_threads(1)
    match moment:
        case "query":
            kill_at(FisherMaskSampler, "__call__", 2)
        case "write":
            kill_at(json, "dump", 3, write_half)
        case "fit":
            kill_at(NeuralNetClassifier, "fit", 2)
    small_run(folder)


def small_run(folder: Path | str | None) -> dict[str, np.ndarray]:
    images, labels = digits()
    return active_learning_curve(
        logits_net(max_epochs=3),
        images[:120],
        labels[:120],
        query_strategy=FisherMaskSampler(),
        n_initial=20,
        n_instances=5,
        n_queries=3,
        cv=2,
        random_state=0,
        return_indices=True,
        checkpoint=folder,
    )


@pytest.mark.kills
@pytest.mark.xdist_group("processes")
def test_killed_three_times(tmp_path: Path) -> None:
    """SIGKILL wherever it falls: the end is that of a run without, bit for bit."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for moment in ("query", "write", "fit"):
            status, _ = forked.run(killed_run, moment, tmp_path)
            assert status == -signal.SIGKILL
        n_steps = [
            len(json.loads(f.read_text())["content"]["steps"])
            for f in tmp_path.glob("split_*.json")
        ]
        assert 1 <= sum(n_steps) < 8
        assert numbers(small_run(tmp_path)) == numbers(small_run(None))
    finally:
        torch.set_num_threads(n_threads)


class CtrlC(Callback):
    """The user presses Ctrl-C in the second epoch of a training."""

    def on_epoch_end(self, net: Any, **kwargs: Any) -> None:
        if len(net.history) == 2:
            os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_that_the_net_swallows_ends_the_run(tmp_path: Path) -> None:
    images, labels = digits()
    run = partial(
        active_learning_curve,
        X=images[:100],
        y=labels[:100],
        query_strategy="random",
        n_initial=20,
        n_instances=5,
        n_queries=2,
        cv=2,
        random_state=0,
        checkpoint=tmp_path,
    )
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(logits_net(max_epochs=4, callbacks=[CtrlC()]))
    assert signal.getsignal(signal.SIGINT) == before
    assert [file.name for file in tmp_path.glob("*.json")] == ["run.json"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"strategy": first_rows}, "another query_strategy.*least_sure.*first_rows"),
        ({"estimator": GaussianNB(var_smoothing=1e-3)}, "another estimator"),
        ({"n_instances": 4}, "another n_instances: it has 5, this run 4"),
        ({"scoring": "f1_macro"}, "another scoring"),
        ({"random_state": 1}, "another random_state"),
        ({"cv": KFold(3, shuffle=True, random_state=1)}, "its training samples are not those"),
        ({"n_initial": 10}, "its initial samples are not those"),
    ],
)
def test_another_runs_folder_is_refused(tmp_path: Path, more: dict[str, Any], message: str) -> None:
    curve(checkpoint=tmp_path)
    before = {file.name: file.read_text() for file in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=message):
        curve(checkpoint=tmp_path, **more)
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == before


def test_other_data_are_refused(tmp_path: Path) -> None:
    options = {
        "query_strategy": "random",
        "n_initial": 9,
        "n_instances": 5,
        "n_queries": 1,
        "random_state": 0,
        "checkpoint": tmp_path,
    }
    active_learning_curve(GaussianNB(), X, Y, **options)
    with pytest.raises(ValueError, match="another X"):
        active_learning_curve(GaussianNB(), X + 1, Y, **options)
    with pytest.raises(ValueError, match="another y"):
        active_learning_curve(GaussianNB(), X, Y[::-1], **options)


def test_bad_arguments_leave_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="n_queries"):
        curve(n_queries=100, checkpoint=tmp_path / "run")
    assert not (tmp_path / "run").exists()
