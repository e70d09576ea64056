from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from modAL.models import ActiveLearner as ModALActiveLearner
from modAL.models import DeepActiveLearner
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler, StandardScaler
from sklearn.utils._param_validation import InvalidParameterError
from skorch import NeuralNetClassifier
from torch import Tensor, nn

from skfishermask import (
    FisherMaskSampler,
    fisher_embedding,
    fisher_mask_sampling,
    select_batch,
)
from skfishermask.fisher import fisher_matrix
from skfishermask.modal import ActiveLearner
from tests import nets, oracles

X, Y = nets.digits()
X_LABELED, Y_LABELED, X_POOL = X[:60], Y[:60], X[60:260]
# Small masks and all samples for the diagonal: quick, and the same for any order of the pool.
# FisherMask alone: coverage of the inputs has its own tests.
SMALL = {"mask_fraction": 160, "n_mask_samples": None, "random_state": 0, "coverage_share": 0}


@pytest.fixture(scope="module")
def net() -> Any:
    return nets.fitted(nets.logits_net())


def oracle_query(
    net: Any, k: int, n_instances: int, X_labeled: np.ndarray | None, **options: Any
) -> tuple[list[int], list[float]]:
    """The whole method, slowly: scores of every sample, dense matrices, float64."""
    target, oversample = options.get("target", "pool"), options.get("oversample", 1.0)
    use_labeled = options.get("use_labeled", True)
    n_labeled = 0 if X_labeled is None else len(X_labeled)
    parts = [X_POOL] if X_labeled is None else [X_labeled, X_POOL]
    n_samples = sum(map(len, parts))
    samples = np.concatenate([*parts, options.get("X_target", X_POOL[:0])])
    g, p = oracles.scores(net.module_, torch.as_tensor(samples))
    diagonal = oracles.diagonal(g[:n_samples], p[:n_samples])
    n_output = sum(t.numel() for t in list(net.module_.parameters())[-2:])
    best = diagonal[:-n_output].argsort(descending=True, stable=True)[: k - n_output]
    kept = torch.cat([best.sort().values, torch.arange(len(diagonal) - n_output, len(diagonal))])
    V = p.sqrt()[:, :, None] * g[:, :, kept]
    V, V_target = V[:n_samples], V[n_samples:]
    fisher = (V.mT @ V).mean(0) if target == "pool" else torch.eye(k).double()
    if len(V_target):
        fisher = (V_target.mT @ V_target).mean(0)
    labeled = {}
    if X_labeled is not None and use_labeled:
        labeled = {"fisher_labeled": (V[:n_labeled].mT @ V[:n_labeled]).mean(0)}
        labeled["n_labeled"] = n_labeled
    return oracles.select_batch_oracle(
        V[n_labeled:],
        n_instances,
        fisher,
        regularization=options.get("regularization", 1.0),
        oversample=oversample,
        **labeled,
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target": "identity"},
        {"use_labeled": False},
        {"regularization": 0.01},
        {"oversample": 2.0},
        {"X_target": X[300:330]},
        {"X_target": X[300:330], "target": "identity", "use_labeled": False},
    ],
    ids=lambda options: " ".join(options) or "plain",
)
@pytest.mark.parametrize("labeled", [True, False])
def test_a_query_chooses_what_the_dense_oracle_chooses(options: dict, labeled: bool) -> None:
    # float64 from end to end, so that the choice is comparable pick by pick.
    net = nets.fitted(nets.logits_net())
    net.module_.double()
    X_labeled = X_LABELED if labeled else None
    given = {name: value for name, value in options.items() if name != "X_target"}
    sampler = FisherMaskSampler(**SMALL, **given)
    X_target = options.get("X_target")
    pool, labels, aims = (
        None if A is None else A.astype("float64") for A in (X_POOL, X_labeled, X_target)
    )
    indices, gains = sampler(net, pool, 12, X_labeled=labels, X_target=aims)
    expected, expected_gains = oracle_query(net, 160, 12, X_labeled, **options)
    assert len(sampler.mask_) == 160
    if options.get("oversample"):
        assert set(indices) == set(expected)
    else:
        assert indices.tolist() == expected
        # The embedding is stored in float32.
        np.testing.assert_allclose(gains, expected_gains, rtol=1e-4)


def counting(strategy: Callable, calls: list) -> Callable:
    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return strategy(*args, **kwargs)

    return counted


@pytest.mark.parametrize("n_instances", [1, 2, 3])
@pytest.mark.parametrize("cls", [ModALActiveLearner, ActiveLearner], ids=["modAL's", "ours"])
@pytest.mark.parametrize("form", ["object", "function"])
def test_modal_learners_get_as_many_distinct_samples_from_one_call(
    n_instances: int, cls: type, form: str
) -> None:
    strategy = (
        FisherMaskSampler(**SMALL) if form == "object" else partial(fisher_mask_sampling, **SMALL)
    )
    calls: list = []
    learner = cls(nets.logits_net(), counting(strategy, calls), X_LABELED, Y_LABELED)
    indices, instances = learner.query(X_POOL, n_instances=n_instances)
    assert len(calls) == 1
    assert indices.shape == (n_instances,)
    assert len(set(indices.tolist())) == n_instances
    np.testing.assert_array_equal(instances, X_POOL[indices])
    *_, gains = learner.query(X_POOL, n_instances=n_instances, return_metrics=True)
    assert gains.shape == (n_instances,)
    assert (gains > 0).all()


def test_every_way_to_ask_chooses_the_same(net: Any) -> None:
    sampler = FisherMaskSampler(**SMALL)
    expected, gains = sampler(net, X_POOL, 10, X_labeled=X_LABELED)
    assert expected.dtype == np.int64
    assert gains.dtype == np.float64

    def ask(classifier: Any, **more: Any) -> list[int]:
        return FisherMaskSampler(**SMALL)(classifier, X_POOL, 10, **more)[0].tolist()

    learner = ActiveLearner(net, sampler)
    learner.X_training = X_LABELED
    search = GridSearchCV(net, {}, cv=2)
    search.best_estimator_ = net
    deep = DeepActiveLearner(clone(net), sampler)
    deep.estimator = net
    assert ask(learner) == expected.tolist()
    assert ask(search, X_labeled=X_LABELED) == expected.tolist()
    assert ask(make_pipeline(net), X_labeled=X_LABELED) == expected.tolist()
    assert ask(deep, X_labeled=X_LABELED) == expected.tolist()
    assert ask(deep) == ask(net)
    assert ask(net) != expected.tolist()  # The labelled samples matter.
    by_function = fisher_mask_sampling(net, X_POOL, 10, X_labeled=X_LABELED, **SMALL)
    assert by_function[0].tolist() == expected.tolist()
    np.testing.assert_array_equal(by_function[1], gains)


def test_a_pipeline_transforms_pool_and_training_data() -> None:
    learner = ActiveLearner(
        make_pipeline(MinMaxScaler(), nets.logits_net()),
        FisherMaskSampler(**SMALL),
        X_LABELED,
        Y_LABELED,
    )
    indices, instances = learner.query(X_POOL, n_instances=5)
    scaler, inner = learner.estimator[0], learner.estimator[-1]
    expected, _ = FisherMaskSampler(**SMALL)(
        inner, scaler.transform(X_POOL), 5, X_labeled=scaler.transform(X_LABELED)
    )
    assert indices.tolist() == expected.tolist()
    np.testing.assert_array_equal(instances, X_POOL[indices])  # As the user gave them.


@pytest.mark.parametrize("make", [nets.probabilities_net, nets.binary_net])
def test_other_output_conventions(make: Any) -> None:
    net = nets.fitted(make())
    sampler = FisherMaskSampler(mask_fraction=80, random_state=0)
    indices, gains = sampler(net, X_POOL, 8, X_labeled=X_LABELED)
    assert len(set(indices.tolist())) == 8
    assert (gains > 0).all()
    assert sampler.query_info_["n_directions"] == (9 if make is nets.probabilities_net else 1)


def test_probabilities_choose_as_logits_do(net: Any) -> None:
    same = nets.probabilities_net().initialize()
    same.module_.load_state_dict(net.module_.state_dict())
    with_logits, _ = FisherMaskSampler(**SMALL)(net, X_POOL, 10)
    with_probabilities, _ = FisherMaskSampler(**SMALL)(same, X_POOL, 10)
    assert with_logits.tolist() == with_probabilities.tolist()


def test_the_choice_does_not_depend_on_the_batch_size(net: Any) -> None:
    chosen = [
        FisherMaskSampler(batch_size=size, **SMALL)(net, X_POOL, 10, X_labeled=X_LABELED)[0]
        for size in (None, 1, 7, 1000)
    ]
    for other in chosen[1:]:
        assert other.tolist() == chosen[0].tolist()


def test_the_choice_does_not_depend_on_the_order_of_the_pool(net: Any) -> None:
    order = np.random.default_rng(1).permutation(len(X_POOL))
    chosen, _ = FisherMaskSampler(**SMALL)(net, X_POOL, 10, X_labeled=X_LABELED)
    permuted, _ = FisherMaskSampler(**SMALL)(net, X_POOL[order], 10, X_labeled=X_LABELED)
    assert order[permuted].tolist() == chosen.tolist()


def test_random_state(net: Any) -> None:
    options = {"mask": "random", "max_candidates": 50, "n_mask_samples": 40, "mask_fraction": 160}
    a, b, c = (
        FisherMaskSampler(random_state=seed, **options)(net, X_POOL, 10)[0] for seed in (0, 0, 1)
    )
    assert a.tolist() == b.tolist()
    assert a.tolist() != c.tolist()
    sampler = FisherMaskSampler(random_state=np.random.RandomState(0), **options)
    assert sampler(net, X_POOL, 10)[0].tolist() == a.tolist()
    assert sampler(net, X_POOL, 10)[0].tolist() != a.tolist()


@pytest.mark.parametrize(
    ("mask", "k"),
    [("global", 160), ("per_layer", 160), ("random", 160), ("output_layer", 130), ("all", 910)],
)
def test_masks(net: Any, mask: str, k: int) -> None:
    sampler = FisherMaskSampler(mask=mask, **SMALL)
    indices, _ = sampler(net, X_POOL, 5)
    assert len(set(indices.tolist())) == 5
    assert len(sampler.mask_) == k
    assert (sampler.fisher_diagonal_ is None) == (mask in ("random", "output_layer", "all"))


def test_relative_mask(net: Any) -> None:
    sampler = FisherMaskSampler(mask="relative", **(SMALL | {"mask_fraction": 1.0}))
    sampler(net, X_POOL, 5)
    assert 130 < len(sampler.mask_) <= 130 + 20 + 1


def test_what_a_query_tells(net: Any) -> None:
    sampler = FisherMaskSampler(embedding_dtype="bfloat16", n_directions=4, **SMALL)
    sampler(net, X_POOL, 5, X_labeled=X_LABELED)
    info = sampler.query_info_
    assert info.pop("seconds").keys() == {
        "diagonal",
        "embedding",
        "fisher",
        "selection",
        "total",
    }
    assert info == {
        "n_candidates": 200,
        "n_labeled": 60,
        "n_directions": 4,
        "mask_size": 160,
        "embedding_bytes": 200 * 4 * 160 * 2,
        "embedding_storage": "memory",
        "dimensions": 160,
        "objective": info["objective"],
        "candidates_read": info["candidates_read"],
        "coverage_share": 0,
    }
    before, after = info["objective"]
    assert before > after > 0
    # Every pick but the last is passed on to all, at most once each.
    assert info["candidates_read"] in range(200, 4 * 200 + 1)


@pytest.mark.parametrize("options", [{}, {"target": "identity"}, {"oversample": 2.0}], ids=str)
@pytest.mark.parametrize("n_pool", [8, 200])
def test_the_objective_falls_by_the_gains(net: Any, n_pool: int, options: dict[str, Any]) -> None:
    # In as many dimensions as pool and labelled samples have rows, or in all.
    sampler = FisherMaskSampler(**SMALL | {"mask_fraction": 700} | options)
    _, gains = sampler(net, X_POOL[:n_pool], 4, X_labeled=X_LABELED)
    info = sampler.query_info_
    assert info["dimensions"] == min(700, (n_pool + 60) * 9)
    before, after = info["objective"]
    if "oversample" not in options:
        assert before - after == pytest.approx(gains.sum(), rel=1e-9)


def test_few_rows_with_target_samples_choose_as_in_all_dimensions(net: Any) -> None:
    X_pool, X_target = X_POOL[:8], X[300:306]
    sampler = FisherMaskSampler(**SMALL | {"mask_fraction": 700})
    indices, gains = sampler(net, X_pool, 4, X_labeled=X[:5], X_target=X_target)
    assert sampler.query_info_["dimensions"] == (8 + 5 + 6) * 9

    def embedded(samples: np.ndarray) -> Tensor:
        return fisher_embedding(net.module_, [torch.as_tensor(samples)], sampler.mask_).double()

    fisher, labeled = fisher_matrix(embedded(X_target)), fisher_matrix(embedded(X[:5]))
    expected = select_batch(embedded(X_pool), 4, fisher, fisher_labeled=labeled, n_labeled=5)
    assert indices.tolist() == expected[0].tolist()
    np.testing.assert_allclose(gains, expected[1], rtol=1e-5)
    M = torch.eye(700).double() + 5 / 9 * labeled
    before, after = sampler.query_info_["objective"]
    assert before == pytest.approx(float(torch.linalg.solve(M, fisher).trace()), rel=1e-5)
    assert after == pytest.approx(before - gains.sum(), rel=1e-9)


def test_target_samples_that_are_none(net: Any) -> None:
    sampler = FisherMaskSampler(**SMALL)
    with pytest.raises(ValueError, match="Expected X_target with at least one sample"):
        sampler(net, X_POOL, 3, X_target=X[:0])
    with pytest.raises(ValueError, match=r"but the target samples have shape \(5,\)"):
        sampler(net, X_POOL, 3, X_target=X[:3, :5])
    with pytest.raises(ValueError, match="X_target contains NaN or infinity, first in row 2"):
        sampler(net, X_POOL, 3, X_target=np.where(np.arange(4)[:, None] == 2, np.nan, X[:4]))


def test_few_rows_choose_as_in_all_dimensions(net: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    options = SMALL | {"mask_fraction": 700, "embedding_dtype": "float64"}
    few, all_of_them = FisherMaskSampler(**options), FisherMaskSampler(**options)
    found = few(net, X_POOL[:12], 6, X_labeled=X_LABELED)
    monkeypatch.setattr("skfishermask.placement.MemoryEstimate.has_few_rows", False)
    expected = all_of_them(net, X_POOL[:12], 6, X_labeled=X_LABELED)
    assert (few.query_info_["dimensions"], all_of_them.query_info_["dimensions"]) == (648, 700)
    np.testing.assert_array_equal(found[0], expected[0])
    # The network's gradients are float32, and come in other batches.
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-7)
    one, other = (s.query_info_["objective"] for s in (few, all_of_them))
    np.testing.assert_allclose(one, other, rtol=1e-7)


def test_share_of_the_trace(net: Any) -> None:
    sampler = FisherMaskSampler(n_directions=0.8, **SMALL)
    sampler(net, X_POOL, 5)
    assert 1 < sampler.query_info_["n_directions"] < 9


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_keeps_most_of_the_choice(net: Any, dtype: str) -> None:
    exact, gains = FisherMaskSampler(**SMALL)(net, X_POOL, 20)
    half, half_gains = FisherMaskSampler(embedding_dtype=dtype, **SMALL)(net, X_POOL, 20)
    assert len(set(exact) & set(half)) >= 15
    assert half_gains.sum() == pytest.approx(gains.sum(), rel=0.01)


def test_max_candidates(net: Any) -> None:
    sampler = FisherMaskSampler(max_candidates=30, **SMALL)
    indices, _ = sampler(net, X_POOL, 30)
    assert sampler.query_info_["n_candidates"] == 30
    assert len(set(indices.tolist())) == 30
    assert indices.max() > 30  # A random subset, not the first rows.


def test_verbose_shows_progress(net: Any, capsys: pytest.CaptureFixture) -> None:
    FisherMaskSampler(verbose=1, **SMALL)(net, X_POOL, 5, X_labeled=X_LABELED)
    shown = capsys.readouterr()
    for step in (
        "Fisher diagonal",
        "Labelled samples",
        "Fisher embedding",
        "Fisher matrix",
        "Preparing",
        "Selection",
    ):
        assert re.search(rf"^{step}: (\d+)/\1, \d+\.\d s$", shown.err, re.MULTILINE)
    assert re.search(r"^Fisher embedding 0.00 GB, matrices .* \(memory\)$", shown.err, re.MULTILINE)
    # A line a step: it is no terminal that they go to.
    assert shown.err.count("\n") == 8
    assert shown.out == ""
    FisherMaskSampler(**SMALL)(net, X_POOL, 5, X_labeled=X_LABELED)
    assert capsys.readouterr() == ("", "")


def test_a_net_that_is_fitted_again_is_read_afresh() -> None:
    net = nets.fitted(nets.logits_net())
    sampler = FisherMaskSampler(**SMALL)
    first, _ = sampler(net, X_POOL, 10)
    torch.manual_seed(5)
    net.set_params(module=nets.mlp()).fit(X[300:400], Y[300:400])
    second, _ = sampler(net, X_POOL, 10)
    assert first.tolist() != second.tolist()


@pytest.mark.parametrize(
    ("n_instances", "message"),
    [
        (0, "between 1 and the 200 samples of the pool, got 0"),
        (-3, "got -3"),
        (201, "got 201"),
        (1.0, "must be an int, got 1.0"),
        (True, "must be an int, got True"),
        ("5", "must be an int, got '5'"),
    ],
)
def test_wrong_n_instances(net: Any, n_instances: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FisherMaskSampler()(net, X_POOL, n_instances)


def test_numpy_integers_are_integers(net: Any) -> None:
    assert len(FisherMaskSampler(**SMALL)(net, X_POOL, np.int64(2))[0]) == 2


@pytest.mark.parametrize(
    ("pool", "options", "kind", "message"),
    [
        (X_POOL[:0], {}, ValueError, "empty"),
        (X_POOL, {"max_candidates": 2}, ValueError, "fewer candidates than n_instances=3"),
        (
            X_POOL * np.float32("nan"),
            {},
            ValueError,
            "X_pool contains NaN .* first in row 0",
        ),
        (X_POOL, {"mask": "best"}, InvalidParameterError, "'mask' parameter"),
        (X_POOL, {"mask_fraction": 1.5}, InvalidParameterError, "'mask_fraction' parameter"),
        (X_POOL, {"n_directions": 0}, InvalidParameterError, "'n_directions' parameter"),
        (X_POOL, {"oversample": 0.5}, InvalidParameterError, "'oversample' parameter"),
        (X_POOL, {"regularization": 0}, InvalidParameterError, "'regularization' parameter"),
        (X_POOL, {"memory_share": 0.0}, InvalidParameterError, "'memory_share' parameter"),
        (X_POOL, {"memory_share": 1.5}, InvalidParameterError, "'memory_share' parameter"),
        (X_POOL, {"scratch_folder": 3}, InvalidParameterError, "'scratch_folder' parameter"),
        (X_POOL, {"scratch_folder": "no/where"}, ValueError, "existing folder, got 'no/where'"),
        (X_POOL, {"random_state": "x"}, InvalidParameterError, "'random_state' parameter"),
        (X_POOL, {"mask_fraction": 5000}, ValueError, "between 1 and the 910 parameters"),
    ],
)
def test_errors(
    net: Any, pool: np.ndarray, options: dict, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        FisherMaskSampler(**options)(net, pool, 3)


def test_a_folder_that_is_read_only_is_refused_before_the_work(
    net: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(ValueError, match="scratch_folder must be a folder to write to, got "):
        FisherMaskSampler(scratch_folder=tmp_path)(net, X_POOL, 3)


def test_not_fitted() -> None:
    with pytest.raises(NotFittedError):
        FisherMaskSampler()(nets.logits_net(), X_POOL, 3)


class Counting(nn.Module):
    """Counts the samples that it has read, and stops like a Ctrl-C after a number of them."""

    def __init__(self, stops_at: float = math.inf) -> None:
        super().__init__()
        self.mlp = nets.mlp()
        self.n_read, self.stops_at = 0, stops_at

    def forward(self, x: Tensor) -> Tensor:
        self.n_read += len(x)
        if self.n_read > self.stops_at:
            raise KeyboardInterrupt
        return self.mlp(x)


def counting_net(stops_at: float = math.inf) -> Any:
    return NeuralNetClassifier(
        Counting(stops_at), criterion=nn.CrossEntropyLoss, **nets.options()
    ).initialize()


def test_too_large_for_memory_is_said_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    class Little:
        available = 10_000

    monkeypatch.setattr("psutil.virtual_memory", Little)
    net = counting_net()
    with pytest.raises(MemoryError, match=r"200 samples x 9 directions x 160 .* max_candidates"):
        FisherMaskSampler(**SMALL)(net, X_POOL, 3)
    assert net.module_.n_read < 100  # the first batch is compared with a prediction


SCRATCH = SMALL | {"memory_share": 1e-9}


@pytest.mark.parametrize("max_candidates", [None, 120])
def test_scratch_file_gives_the_same_batch(
    net: Any, max_candidates: int | None, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"max_candidates": max_candidates, "oversample": 1.5}
    expected = FisherMaskSampler(**SMALL, **options)
    scratch = FisherMaskSampler(**SCRATCH, **options, scratch_folder=tmp_path)
    one, other = (s(net, X_POOL, 20, X_labeled=X_LABELED) for s in (expected, scratch))
    assert scratch.query_info_["embedding_storage"] == "scratch file"
    np.testing.assert_array_equal(one[0], other[0])
    np.testing.assert_allclose(one[1], other[1], rtol=1e-9)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("moment", ["embedding", "selection"])
def test_scratch_file_is_gone_after_an_exception(
    moment: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    options = {"mask": "output_layer", "scratch_folder": tmp_path}
    sampler, process = FisherMaskSampler(**SCRATCH | options), psutil.Process()
    sampler(counting_net(), X_POOL, 3)
    assert sampler.query_info_["embedding_storage"] == "scratch file"
    n_open = process.num_fds()

    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    if moment == "selection":
        monkeypatch.setattr("skfishermask.pool.select", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sampler(counting_net(*[100] * (moment == "embedding")), X_POOL, 3)
    assert process.num_fds() == n_open
    assert list(tmp_path.iterdir()) == []


def test_too_large_for_the_scratch_folder_is_said_before_the_work(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Full:
        free = 1_000_000

    monkeypatch.setattr("shutil.disk_usage", lambda folder: Full)
    net = counting_net()
    with pytest.raises(MemoryError, match=r"0.00 GB in .*scratch_folder"):
        FisherMaskSampler(**SCRATCH, scratch_folder=tmp_path)(net, X_POOL, 3)
    assert net.module_.n_read < 100  # the first batch is compared with a prediction


def test_no_trace_after_a_query_that_is_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    net = nets.fitted(nets.logits_net())
    net.module_.train()
    state = [p.detach().clone() for p in net.module_.parameters()]
    forward, calls = net.module_.forward, []

    def interrupted(x: Tensor) -> Tensor:
        calls.append(len(x))
        if len(calls) == 12:
            raise KeyboardInterrupt
        return forward(x)

    net.module_.forward = interrupted
    random_state = torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt):
        FisherMaskSampler(**SMALL)(net, X_POOL, 3)
    assert net.module_.training
    assert all(p.requires_grad for p in net.module_.parameters())
    assert all(map(torch.equal, state, net.module_.parameters()))
    assert not any(m._forward_hooks for m in net.module_.modules())
    assert torch.equal(random_state, torch.get_rng_state())


@pytest.mark.parametrize(
    "options",
    [{}, {"mask": "output_layer"}, {"n_mask_samples": 30, "max_candidates": 150}],
    ids=lambda options: " ".join(options) or "plain",
)
@pytest.mark.parametrize("where", ["X_pool", "X_labeled"])
def test_a_network_output_that_is_not_finite_names_the_row(options: dict, where: str) -> None:
    class Sick(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = nets.mlp()

        def forward(self, x: Tensor) -> Tensor:
            return self.mlp(x) / (x[:, :1] != 7)

    net = NeuralNetClassifier(Sick, criterion=nn.CrossEntropyLoss, **nets.options()).initialize()
    data = {"X_pool": X_POOL.copy(), "X_labeled": X_LABELED.copy()}
    data[where][41:, 0] = 7  # Enough of them that a drawn subset holds some.
    with pytest.raises(ValueError, match=rf"NaN or infinite for row \d+ of {where}") as caught:
        FisherMaskSampler(**SMALL | options)(net, data["X_pool"], 3, X_labeled=data["X_labeled"])
    row = int(str(caught.value).split("row ")[1].split(" ")[0])
    assert data[where][row, 0] == 7
    if "max_candidates" not in options:
        assert row == 41


@pytest.mark.cuda
def test_cpu_and_cuda_choose_the_same() -> None:
    chosen = []
    for device in ("cpu", "cuda"):
        net = nets.fitted(nets.logits_net())
        net.device = device
        net.module_.to(device)
        indices, _ = FisherMaskSampler(**SMALL)(net, X_POOL, 10, X_labeled=X_LABELED)
        chosen.append(indices.tolist())
    assert chosen[0] == chosen[1]


def test_parameters_are_plain_scikit_learn_parameters() -> None:
    sampler = FisherMaskSampler(oversample=2.0, mask="output_layer")
    copy = clone(sampler)
    assert copy is not sampler
    assert copy.get_params() == sampler.get_params()
    assert repr(sampler) == "FisherMaskSampler(mask='output_layer', oversample=2.0)"


def labels_are_known(sampler: FisherMaskSampler) -> int:
    return sampler.query_info_["n_labeled"]


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "inside a pipeline"])
def test_a_fitted_sampler_knows_its_labelled_samples(wrapped: bool) -> None:
    sampler = FisherMaskSampler(nets.logits_net(), **SMALL)
    fitted: Any = make_pipeline(StandardScaler(), sampler) if wrapped else sampler
    fitted.fit(X_LABELED, Y_LABELED)
    strategy = FisherMaskSampler(**SMALL)
    found, gains = strategy(fitted, X_POOL, 8)
    assert labels_are_known(strategy) == 60
    expected, expected_gains = strategy(fitted, X_POOL, 8, X_labeled=X_LABELED)
    assert found.tolist() == expected.tolist()
    np.testing.assert_allclose(gains, expected_gains, rtol=1e-6)


def test_query_takes_the_samples_of_fit_unless_others_are_given() -> None:
    sampler = FisherMaskSampler(nets.logits_net(), **SMALL).fit(X_LABELED, Y_LABELED)
    indices, _ = sampler.query(X_POOL, 8)
    assert labels_are_known(sampler) == 60
    assert indices.tolist() == sampler.query(X_POOL, 8, X_labeled=X_LABELED)[0].tolist()
    sampler.query(X_POOL, 8, X_labeled=X_LABELED[:7])
    assert labels_are_known(sampler) == 7


@pytest.mark.parametrize("empty", [X[:0], [], torch.as_tensor(X[:0]), pd.DataFrame(X[:0])])
def test_empty_labelled_samples_are_none(empty: Any) -> None:
    sampler = FisherMaskSampler(nets.logits_net(), **SMALL).fit(X_LABELED, Y_LABELED)
    indices, _ = sampler.query(X_POOL, 8, X_labeled=empty)
    assert labels_are_known(sampler) == 0
    expected, _ = FisherMaskSampler(**SMALL)(sampler.estimator_, X_POOL, 8)
    assert indices.tolist() == expected.tolist()


def test_the_automatic_share_of_coverage_counts_the_samples_of_fit() -> None:
    sampler = FisherMaskSampler(random_state=0).fit(X[:600], Y[:600])
    sampler.query(X[600:800], 10)
    assert sampler.query_info_["coverage_share"] == 0
