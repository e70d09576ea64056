"""The sampler among scikit-learn's estimators: conventions, labels, composition."""

from __future__ import annotations

import pickle
import random
from collections import Counter
from functools import partial
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pytest
import torch
from modAL.models import Committee
from sklearn.base import clone, is_classifier
from sklearn.calibration import CalibratedClassifierCV
from sklearn.compose import make_column_transformer
from sklearn.ensemble import VotingClassifier
from sklearn.experimental import enable_halving_search_cv  # noqa: F401
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import (
    GridSearchCV,
    HalvingGridSearchCV,
    cross_val_score,
    cross_validate,
)
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from sklearn.utils.estimator_checks import check_estimator
from skorch import NeuralNetClassifier
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset

from skfishermask import FisherMaskSampler
from skfishermask.modal import ActiveLearner
from tests import nets

X, Y = nets.digits()
X_POOL = X[100:180]
# The digits below and above five: two classes, learned quickly.
HALVES = np.where(Y > 4, "high", "low")
TINY = {"mask_fraction": 140, "n_mask_samples": 32, "random_state": 0}


class LazyMLP(nn.Module):
    """A module for any number of features, as scikit-learn's checks ask for."""

    def __init__(self, n_outputs: int = 5) -> None:
        super().__init__()
        self.hidden = nn.LazyLinear(50, dtype=torch.float64)
        self.output = nn.Linear(50, n_outputs, dtype=torch.float64)

    def forward(self, X: Tensor) -> Tensor:
        return self.output(torch.relu(self.hidden(X.double())))


class MLP(nn.Module):
    def __init__(self, n_hidden: int = 12, n_outputs: int = 10) -> None:
        super().__init__()
        self.hidden = nn.Linear(64, n_hidden)
        self.output = nn.Linear(n_hidden, n_outputs)

    def forward(self, X: Tensor) -> Tensor:
        return self.output(torch.relu(self.hidden(X)))


def lazy_net() -> NeuralNetClassifier:
    return NeuralNetClassifier(
        LazyMLP,
        criterion=nn.CrossEntropyLoss,
        optimizer=torch.optim.Adam,
        callbacks="disable",
        **nets.options(lr=0.03, max_epochs=15, batch_size=64),
    )


def net(**more: Any) -> NeuralNetClassifier:
    return NeuralNetClassifier(MLP, criterion=nn.CrossEntropyLoss, **nets.options(**more))


def sampler(estimator: Any = None, **more: Any) -> FisherMaskSampler:
    return FisherMaskSampler(net() if estimator is None else estimator, **(TINY | more))


def assert_queries(fitted: Any, pool: Any = X_POOL) -> None:
    indices, instances = fitted.query(pool, n_instances=5)
    assert len(set(indices.tolist())) == 5
    np.testing.assert_array_equal(instances, pool[indices])


# -- scikit-learn's own checks -------------------------------------------------------------------


@pytest.mark.usefixtures("short_training")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "estimator",
    [
        pytest.param(None, id="default net"),
        pytest.param(lazy_net(), id="lazy net", marks=pytest.mark.slow),
        pytest.param(
            make_pipeline(StandardScaler(), lazy_net()), id="pipeline", marks=pytest.mark.slow
        ),
        pytest.param(LogisticRegression(), id="LogisticRegression"),
    ],
)
def test_check_estimator(estimator: Any, record_property: Any) -> None:
    results = check_estimator(FisherMaskSampler(estimator), on_fail=None)
    counts = Counter(result["status"] for result in results)
    record_property("check_estimator", dict(counts))
    bad = [r for r in results if r["status"] not in ("passed", "skipped")]
    assert not bad, [(r["check_name"], r["exception"]) for r in bad]
    assert not any(result["expected_to_fail"] for result in results)
    assert counts["passed"] > 40


# -- fit -----------------------------------------------------------------------------------------


def global_states() -> list[Any]:
    numpy = np.random.get_state()  # noqa: NPY002
    return [torch.get_rng_state().tolist(), numpy[1].tolist(), numpy[2:], random.getstate()]


@pytest.mark.parametrize(
    "estimator",
    [None, net(), make_pipeline(StandardScaler(), net())],
    ids=["default net", "net", "pipeline"],
)
def test_an_int_random_state_makes_fit_reproducible_and_leaves_the_global_one(
    estimator: Any,
) -> None:
    before = global_states()
    a = FisherMaskSampler(estimator, **TINY).fit(X[:60], Y[:60])
    assert global_states() == before
    torch.manual_seed(1)
    b = FisherMaskSampler(estimator, **TINY).fit(X[:60], Y[:60])
    other = FisherMaskSampler(estimator, **(TINY | {"random_state": 1})).fit(X[:60], Y[:60])
    np.testing.assert_array_equal(a.predict_proba(X_POOL), b.predict_proba(X_POOL))
    assert (a.predict_proba(X_POOL) != other.predict_proba(X_POOL)).any()


def test_without_random_state_fit_follows_the_global_one() -> None:
    def fit(seed: int) -> np.ndarray:
        torch.manual_seed(seed)
        return sampler(random_state=None).fit(X[:60], Y[:60]).predict_proba(X_POOL)

    np.testing.assert_array_equal(fit(3), fit(3))
    assert (fit(3) != fit(4)).any()


@pytest.mark.parametrize(
    "labels",
    [
        np.array([f"digit {i}" for i in range(10)]),
        np.array([f"digit {i}" for i in range(10)], dtype=object),
        np.linspace(0, 9, 10),
        np.arange(10) % 2 == 0,
        np.arange(10) ** 3 - 50,
    ],
    ids=["str", "object", "float", "bool", "int64 with gaps"],
)
@pytest.mark.parametrize("as_list", [False, True])
def test_labels_come_back_as_they_were(labels: np.ndarray, as_list: bool) -> None:
    y = labels[Y[:100]]
    fitted = sampler(net(max_epochs=40)).fit(X[:100], y.tolist() if as_list else y)
    np.testing.assert_array_equal(fitted.classes_, np.unique(labels))
    predicted = fitted.predict(X[:100])
    assert predicted.dtype.kind == ("U" if as_list and y.dtype.kind == "O" else y.dtype.kind)
    assert np.isin(predicted, labels).all()
    assert fitted.score(X[:100], y) > 0.8
    assert fitted.predict_proba(X[:5]).shape == (5, len(fitted.classes_))


def test_outputs_beyond_the_classes_are_left_out() -> None:
    fitted = sampler(net(max_epochs=2)).fit(X[:60], HALVES[:60])
    p, raw = fitted.predict_proba(X_POOL), fitted.estimator_.predict_proba(X_POOL)
    assert raw.shape == (80, 10)
    assert p.shape == (80, 2)
    np.testing.assert_allclose(p, raw[:, :2] / raw[:, :2].sum(1, keepdims=True), rtol=1e-5)
    assert set(fitted.predict(X_POOL)) <= {"high", "low"}
    assert_queries(fitted)


@pytest.mark.parametrize("wrap", [lambda n: n, lambda n: make_pipeline(StandardScaler(), n)])
def test_fewer_outputs_than_classes(wrap: Any) -> None:
    with pytest.raises(ValueError, match=r"output for each of 10 classes"):
        sampler(wrap(net(module__n_outputs=7))).fit(X[:60], Y[:60]).predict(X[:5])


def test_binary_classifier() -> None:
    fitted = sampler(nets.binary_net(max_epochs=60)).fit(X[:100], HALVES[:100])
    assert fitted.score(X[:100], HALVES[:100]) > 0.8
    assert_queries(fitted)
    p = fitted.predict_proba(X_POOL)[:, 1]
    for threshold in (0.5, 0.9):
        fitted.estimator_.threshold = threshold
        expected = np.where(p > threshold, "low", "high")
        np.testing.assert_array_equal(fitted.predict(X_POOL), expected)
    with pytest.raises(ValueError, match="expected 2 classes, found 10"):
        sampler(nets.binary_net()).fit(X[:60], Y[:60])


def test_dataset_without_y() -> None:
    labeled = TensorDataset(torch.tensor(X[:60]), torch.tensor(Y[:60]))
    fitted = sampler().fit(labeled)
    same = sampler().fit(X[:60], Y[:60])
    np.testing.assert_array_equal(fitted.classes_, np.arange(10))
    np.testing.assert_array_equal(fitted.predict(labeled), same.predict(X[:60]))
    _, instances = fitted.query(labeled, 3)
    assert isinstance(instances, Subset)
    with pytest.raises(ValueError, match=r"labels 0 to C - 1, found \[3, 4\]"):
        sampler().fit(TensorDataset(torch.tensor(X[:6]), torch.tensor([3, 4] * 3)))


# -- an estimator like others --------------------------------------------------------------------


def test_pickled_it_predicts_and_chooses_the_same() -> None:
    fitted = sampler().fit(X[:60], HALVES[:60])
    chosen, _ = fitted.query(X_POOL, 5)
    copy = pickle.loads(pickle.dumps(fitted))
    np.testing.assert_array_equal(copy.predict(X_POOL), fitted.predict(X_POOL))
    np.testing.assert_array_equal(copy.query(X_POOL, 5)[0], chosen)
    assert copy.query_info_["mask_size"] == fitted.query_info_["mask_size"]


def test_a_clone_is_not_fitted_and_the_given_net_stays_as_it_is() -> None:
    given = nets.fitted(nets.logits_net())
    before = [p.detach().clone() for p in given.module_.parameters()]
    fitted = sampler(given).fit(X[60:120], Y[60:120])
    assert fitted.estimator is given
    assert fitted.estimator_ is not given
    assert all(map(torch.equal, before, given.module_.parameters()))
    copy = clone(fitted)
    assert not hasattr(copy, "estimator_")
    assert not hasattr(copy.estimator, "module_")
    assert is_classifier(copy)


def test_nested_parameters() -> None:
    changed = sampler().set_params(estimator__lr=0.5, estimator__module__n_hidden=7, mask="all")
    assert changed.get_params()["estimator__lr"] == 0.5
    fitted = changed.fit(X[:60], Y[:60])
    assert fitted.estimator_.lr == 0.5
    assert fitted.estimator_.module_.hidden.out_features == 7
    inside = sampler(make_pipeline(StandardScaler(), net()))
    inside.set_params(estimator__neuralnetclassifier__lr=0.25)
    assert inside.estimator[-1].lr == 0.25


@pytest.mark.parametrize("fit", [False, True])
def test_html(fit: bool) -> None:
    for estimator in (net(), make_pipeline(StandardScaler(), net())):
        shown = sampler(estimator)
        if fit:
            shown.fit(X[:60], Y[:60])
        html = shown._repr_html_()
        assert "FisherMaskSampler" in html
        assert "NeuralNetClassifier" in html


# -- composition ---------------------------------------------------------------------------------


def test_pipelines_around_and_inside_choose_the_same() -> None:
    around = make_pipeline(StandardScaler(), sampler()).fit(X[:60], Y[:60])
    inside = sampler(make_pipeline(StandardScaler(), net())).fit(X[:60], Y[:60])
    np.testing.assert_allclose(
        around.predict_proba(X_POOL), inside.predict_proba(X_POOL), rtol=1e-5
    )
    chosen, _ = FisherMaskSampler(**TINY)(around, X_POOL, 5)
    assert chosen.tolist() == inside.query(X_POOL, 5)[0].tolist()
    assert_queries(inside)


@pytest.mark.parametrize("n_jobs", [None, pytest.param(2, marks=pytest.mark.slow)])
def test_cross_validation(n_jobs: int | None) -> None:
    estimator = make_pipeline(StandardScaler(), sampler())
    scores = cross_val_score(estimator, X[:120], HALVES[:120], cv=2, n_jobs=n_jobs)
    assert scores.shape == (2,)
    assert (scores > 0.6).all()


def test_cross_validate() -> None:
    scoring = ["accuracy", "neg_log_loss", "roc_auc"]
    results = cross_validate(
        sampler(), X[:120], HALVES[:120], cv=2, scoring=scoring, return_estimator=True
    )
    for name in scoring:
        assert np.isfinite(results[f"test_{name}"]).all()
    for fitted in results["estimator"]:
        assert_queries(fitted)


@pytest.mark.parametrize(
    "search", [GridSearchCV, partial(HalvingGridSearchCV, min_resources=80, random_state=0)]
)
def test_searches(search: Any) -> None:
    grid = {"estimator__lr": [1e-6, 0.2], "mask": ["global", "output_layer"]}
    found = search(sampler(net(max_epochs=30)), grid, cv=2).fit(X[:160], HALVES[:160])
    assert found.best_params_["estimator__lr"] == 0.2
    assert_queries(found.best_estimator_)
    chosen, _ = FisherMaskSampler(**TINY)(found, X_POOL, 5)
    fitted = found.best_estimator_.estimator_
    inner, _ = FisherMaskSampler(**TINY)(fitted, X_POOL, 5, X_labeled=X[:160])
    assert chosen.tolist() == inner.tolist()


@pytest.mark.parametrize(
    "compose",
    [
        lambda one: CalibratedClassifierCV(one, cv=2),
        lambda one: VotingClassifier([("a", one), ("b", clone(one))], voting="soft"),
        OneVsRestClassifier,
    ],
    ids=["calibrated", "voting", "one versus rest"],
)
def test_inside_other_classifiers(compose: Any) -> None:
    y = np.array(["a", "b", "c"])[Y % 3]
    composed = compose(sampler(net(max_epochs=40))).fit(X[:120], y[:120])
    assert set(composed.predict(X[:120])) == {"a", "b", "c"}
    assert composed.score(X[:120], y[:120]) > 0.7


def test_a_search_inside() -> None:
    search = GridSearchCV(net(), {"lr": [1e-6, 0.2]}, cv=2)
    fitted = sampler(search).fit(X[:100], HALVES[:100])
    assert fitted.estimator_.best_params_ == {"lr": 0.2}
    assert_queries(fitted)


# -- with modAL ----------------------------------------------------------------------------------


def learner(start: int = 0) -> ActiveLearner:
    rows = slice(start, start + 50)
    return ActiveLearner(
        sampler(net(max_epochs=20)), FisherMaskSampler(**TINY), X[rows], HALVES[rows]
    )


def test_a_learner_with_a_sampler_as_estimator_and_as_strategy() -> None:
    one = learner()
    for expected in (55, 60):
        indices, instances = one.query(X_POOL, n_instances=5)
        by_net, _ = FisherMaskSampler(**TINY)(
            one.estimator.estimator_, X_POOL, 5, X_labeled=one.X_training
        )
        assert indices.tolist() == by_net.tolist()
        one.teach(instances, HALVES[100:][indices])
        assert len(one.X_training) == expected
    assert set(one.predict(X_POOL)) == {"high", "low"}


def test_a_committee_of_learners() -> None:
    def first(committee: Any, pool: Any, n_instances: int = 1) -> Any:
        return FisherMaskSampler(**TINY)(committee.learner_list[0], pool, n_instances)

    committee = Committee([learner(), learner(50)], first)
    indices, instances = committee.query(X_POOL, n_instances=4)
    assert len(set(indices.tolist())) == 4
    committee.teach(instances, HALVES[100:][indices])
    assert [len(one.X_training) for one in committee] == [54, 54]
    assert set(committee.predict(X_POOL)) <= {"high", "low"}


class Scaled(torch.nn.Module):
    """Takes a keyword besides X, and keeps what it was given."""

    seen: ClassVar[set[float]] = set()

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nets.mlp()

    def forward(self, X: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        self.seen.add(scale)
        return scale * self.mlp(X)


def test_fit_parameters_reach_the_net() -> None:
    X, y = nets.digits()
    net = NeuralNetClassifier(Scaled, criterion=torch.nn.CrossEntropyLoss, **nets.options())
    FisherMaskSampler(net).fit(X[:40], y[:40], scale=0.5)
    assert Scaled.seen == {0.5}


@pytest.mark.parametrize(
    "wrap", [lambda net: net, lambda net: make_pipeline(StandardScaler(), net)]
)
def test_weights_of_samples_are_refused_with_the_way_out(wrap: Any) -> None:
    X, y = nets.digits()
    sampler = FisherMaskSampler(wrap(nets.logits_net()))
    with pytest.raises(TypeError, match=r"takes no sample_weight. .* criterion__weight"):
        sampler.fit(X[:60], y[:60], sample_weight=np.ones(60))


def test_weights_of_samples_reach_a_net_that_takes_them() -> None:
    class Weighted(NeuralNetClassifier):
        def fit(self, X: Any, y: Any, sample_weight: Any = None, **fit_params: Any) -> Any:
            self.seen_ = sample_weight
            return super().fit(X, y, **fit_params)

    X, y = nets.digits()
    net = Weighted(nets.mlp(), **nets.options(criterion=torch.nn.CrossEntropyLoss))
    weights = np.ones(60)
    sampler = FisherMaskSampler(net).fit(X[:60], y[:60], sample_weight=weights)
    assert sampler.estimator_.seen_ is weights


def test_columns_of_words_go_to_the_transformers_inside_a_search() -> None:
    frame = pd.DataFrame({"size": X[:80, 10], "word": np.where(X[:80, 20] > 0.5, "much", "little")})
    columns = make_column_transformer(
        (StandardScaler(), ["size"]), (OneHotEncoder(), ["word"]), sparse_threshold=0
    )
    pipeline = make_pipeline(columns, LogisticRegression(C=0.1))
    search = GridSearchCV(pipeline, {"logisticregression__C": [0.1]}, cv=2)
    picks = []
    for estimator in (pipeline, search):
        sampler = FisherMaskSampler(estimator, random_state=0).fit(frame[:40], HALVES[:40])
        picks.append(sampler.query(frame[40:], 5)[0].tolist())
    assert picks[0] == picks[1]
    first, _ = FisherMaskSampler(search, random_state=0).query(frame, 5)
    assert len(set(first)) == 5
