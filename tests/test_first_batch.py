"""The first batch: it covers the inputs, without labels or a trained network."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.ensemble import RandomForestClassifier
from sklearn.exceptions import NotFittedError
from sklearn.feature_selection import SelectKBest
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from torch.nn.functional import normalize
from torch.utils.data import Subset, TensorDataset

from skfishermask import FisherMaskSampler, active_learning_curve
from skfishermask.modal import ActiveLearner
from tests import nets, oracles

X, Y = nets.digits()
X_POOL = X[:120]


def covering(inputs: Any, n: int, labeled: Any = None) -> list[int]:
    pool = normalize(torch.as_tensor(np.asarray(inputs)).double().flatten(1))
    known = pool[:0] if labeled is None else normalize(torch.as_tensor(labeled).double())
    return oracles.select_by_coverage(pool, known, torch.ones(len(pool)).double(), n)


@pytest.mark.parametrize("estimator", [None, nets.logits_net(), RandomForestClassifier()], ids=str)
def test_it_covers_the_inputs(estimator: Any) -> None:
    sampler = FisherMaskSampler(estimator, random_state=0)
    if isinstance(estimator, RandomForestClassifier):
        sampler = FisherMaskSampler(random_state=0)
    indices, instances, gains = sampler.query(X_POOL, 10, return_metrics=True)
    assert indices.tolist() == covering(X_POOL, 10)
    np.testing.assert_array_equal(instances, X_POOL[indices])
    assert (np.diff(gains) <= 1e-9).all()
    assert sampler.mask_ is None
    info = sampler.query_info_
    assert (info["n_candidates"], info["n_labeled"], info["coverage_share"]) == (120, 0, 1.0)


def test_samples_that_wait_for_labels_are_covered_already() -> None:
    sampler = FisherMaskSampler(random_state=0)
    first, _ = sampler.query(X_POOL, 5)
    rest = np.setdiff1d(np.arange(120), first)
    second, _ = sampler.query(X_POOL[rest], 5, X_labeled=X_POOL[first])
    assert sampler.query(X_POOL, len(first), X_labeled=X_POOL[:0])[0].tolist() == first.tolist()
    assert second.tolist() == covering(X_POOL[rest], 5, X_POOL[first])
    assert second.tolist() != sampler.query(X_POOL[rest], 5)[0].tolist()


def as_dask(X: np.ndarray) -> Any:
    return pytest.importorskip("dask.array").from_array(X, chunks=(50, -1))


@pytest.mark.parametrize(
    "contain",
    [
        torch.as_tensor,
        pd.DataFrame,
        lambda X: TensorDataset(torch.as_tensor(X), torch.zeros(len(X))),
        lambda X: (16 * X).round().astype("int64"),
        lambda X: X.astype("float64").reshape(-1, 1, 8, 8),
        as_dask,
    ],
    ids=["tensor", "frame", "Dataset", "integers", "images", "dask"],
)
def test_containers(contain: Any) -> None:
    pool = contain(X_POOL)
    indices, instances = FisherMaskSampler(random_state=0).query(pool, 6)
    assert indices.tolist() == covering(X_POOL, 6)
    assert type(instances) is (Subset if isinstance(pool, TensorDataset) else type(pool))


def test_transformers_of_a_pipeline_are_fitted_to_the_pool() -> None:
    steps = ["passthrough", StandardScaler(), FunctionTransformer(lambda X: X[:, :30])]
    net = make_pipeline(*steps, nets.logits_net())
    indices, _ = FisherMaskSampler(net, random_state=0).query(X_POOL, 6)
    expected = StandardScaler().fit_transform(X_POOL)[:, :30]
    assert indices.tolist() == covering(expected, 6)
    with pytest.raises(NotFittedError):
        net[1].transform(X_POOL)
    net = make_pipeline(SelectKBest(), nets.logits_net())
    with pytest.raises((TypeError, ValueError)) as raised:
        FisherMaskSampler(net).query(X_POOL, 6)
    assert any("SelectKBest is fitted to X_pool alone" in note for note in raised.value.__notes__)


def test_a_learner_without_labels_begins_with_it() -> None:
    learner = ActiveLearner(nets.logits_net(), FisherMaskSampler(random_state=0))
    indices, instances = learner.query(X_POOL, n_instances=20)
    assert indices.tolist() == covering(X_POOL, 20)
    learner.teach(instances, Y[indices])
    later, _ = learner.query(X_POOL, n_instances=3)
    assert learner.query_strategy.query_info_["n_labeled"] == 20
    assert len(later) == 3


def test_a_learner_that_knows_something_does_not() -> None:
    fitted = LogisticRegression().fit(X_POOL[:20], Y[:20])
    strategy = FisherMaskSampler(random_state=0)
    expected, _ = strategy(fitted, X_POOL, 3)
    found, _ = ActiveLearner(fitted, strategy).query(X_POOL, n_instances=3)
    assert found.tolist() == expected.tolist() != covering(X_POOL, 3)
    learner = ActiveLearner(nets.logits_net(), strategy, X_training=X_POOL, y_training=Y[:120])
    learner.estimator = nets.logits_net()
    with pytest.raises(NotFittedError):
        learner.query(X_POOL, n_instances=3)


def test_an_unfitted_net_as_classifier_is_refused_still() -> None:
    with pytest.raises(NotFittedError):
        FisherMaskSampler(random_state=0)(nets.logits_net(), X_POOL, 3)


def test_what_cannot_be_covered_is_refused() -> None:
    ids = np.random.default_rng(0).integers(20, size=(40, 5))
    with pytest.raises(ValueError, match=r"inputs of X_pool, which must be real numbers"):
        FisherMaskSampler(nets.logits_net()).query(ids, 3)
    with pytest.raises(ValueError, match="Expected numbers in X_pool, found strings such as 'a'"):
        FisherMaskSampler().query(np.array([["a"], ["b"]]), 1)
    with pytest.raises(ValueError, match="n_instances must be between 1 and"):
        FisherMaskSampler().query(X_POOL, 121)
    with pytest.raises(ValueError, match="X_target needs a fitted"):
        FisherMaskSampler().query(X_POOL, 3, X_target=X_POOL)
    broken = X_POOL.copy()
    broken[7, 3] = np.nan
    with pytest.raises(ValueError, match="row 7"):
        FisherMaskSampler().query(broken, 3)


def test_large_pools_are_drawn_from() -> None:
    sampler = FisherMaskSampler(max_candidates=50, random_state=0)
    indices, _ = sampler.query(X_POOL, 5)
    assert sampler.query_info_["n_candidates"] == 50
    assert indices.tolist() != sampler.set_params(random_state=1).query(X_POOL, 5)[0].tolist()


def test_learning_curves_begin_with_it() -> None:
    splits = [*StratifiedKFold(2).split(X[:90], Y[:90])]

    def starts(initial: str) -> list[list[int]]:
        result = active_learning_curve(
            nets.logits_net(max_epochs=2),
            X[:90],
            Y[:90],
            query_strategy="random",
            n_initial=12,
            initial=initial,
            n_instances=5,
            n_queries=1,
            cv=splits,
            random_state=0,
            return_indices=True,
        )
        return result["indices"][:, :12].tolist()

    covering_starts = [sorted(train[covering(X[:90][train], 12)]) for train, _ in splits]
    assert starts("coverage") == covering_starts != starts("random")
    with pytest.raises(ValueError, match="Expected initial to be"):
        starts("cover")


def test_scikit_activeml_begins_with_it() -> None:
    pytest.importorskip("skactiveml")
    from skactiveml.classifier import SkorchClassifier

    from skfishermask.activeml import FisherMask

    y = np.full(120, np.nan)
    options = {"train_split": None, "verbose": 0}
    module = torch.nn.Linear(64, 10)
    clf = SkorchClassifier(module, neural_net_param_dict=options, classes=[*range(10)])
    strategy = FisherMask(random_state=0)
    for fit_clf in (True, False):
        indices, utilities = strategy.query(
            X_POOL, y, clf, fit_clf=fit_clf, batch_size=5, return_utilities=True
        )
        assert indices.tolist() == covering(X_POOL, 5)
        assert (np.nanargmax(utilities, axis=1) == indices).all()
        some = strategy.query(X_POOL, y, clf, candidates=np.arange(60), batch_size=5)
        assert some.tolist() == covering(X_POOL[:60], 5)
    y[indices] = Y[indices]
    later = strategy.query(X_POOL, y, clf, fit_clf=True, batch_size=5)
    assert strategy.query_info_["n_labeled"] == 5
    assert not set(later) & set(indices)
