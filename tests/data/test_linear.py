"""Logistic regressions of scikit-learn are queried as the linear nets they are."""

from __future__ import annotations

from typing import Any

import dask.array as da
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.ensemble import RandomForestClassifier
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV, SGDClassifier
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler
from sklearn.svm import LinearSVC
from skorch import NeuralNet, NeuralNetBinaryClassifier, NeuralNetClassifier
from torch import nn

from skfishermask import PUBLISHED, FisherMaskSampler
from skfishermask.data import innermost, unwrap
from skfishermask.data.linear import linear_net
from skfishermask.modal import ActiveLearner
from tests import nets
from tests.oracles import select_batch_oracle

X, Y = nets.digits()
# Float64, as scikit-learn has it; five features without constant ones.
X, POOL = (part[:, [10, 20, 28, 36, 43]].astype("float64") for part in (X[:80], X[80:200]))
Y = Y[:80]
PLAIN: dict[str, Any] = PUBLISHED | {"mask": "all", "n_mask_samples": None}


def logistic(**more: Any) -> LogisticRegression:
    return LogisticRegression(**{"max_iter": 2000} | more)


def sgd(**more: Any) -> SGDClassifier:
    return SGDClassifier(loss="log_loss", **{"random_state": 0, "alpha": 0.01} | more)


THREE, TWO = Y % 3, Y % 2
CASES: dict[str, tuple[Any, np.ndarray]] = {
    "two classes": (logistic(), TWO),
    "several classes": (logistic(), THREE),
    "no intercept": (logistic(fit_intercept=False), THREE),
    "two, no intercept": (logistic(fit_intercept=False), TWO),
    "newton": (logistic(solver="newton-cg"), THREE),
    "liblinear": (logistic(solver="liblinear"), TWO),
    "cross-validated": (
        LogisticRegressionCV(Cs=[1.0], cv=2, max_iter=2000, scoring="accuracy"),
        THREE,
    ),
    "sparsified": (logistic(C=0.1), THREE),
    "SGD, two": (sgd(), TWO),
    "SGD, several": (sgd(average=True), THREE),
}
if "multi_class" in LogisticRegression().get_params():  # before scikit-learn 1.8
    CASES |= {
        "liblinear, several": (logistic(solver="liblinear"), THREE),
        "one against the rest": (logistic(multi_class="ovr"), THREE),
        "two logits": (logistic(multi_class="multinomial"), TWO),
    }


@pytest.fixture(params=CASES, scope="module")
def fitted(request: Any) -> Any:
    estimator, y = CASES[request.param]
    estimator = clone(estimator).fit(X, y)
    return estimator.sparsify() if request.param == "sparsified" else estimator


def is_one_vs_rest(estimator: Any) -> bool:
    return type(linear_net(estimator)) is NeuralNet


def test_the_net_predicts_as_the_estimator(fitted: Any) -> None:
    p = linear_net(fitted).predict_proba(POOL)
    if is_one_vs_rest(fitted):
        present = p[:, 1]  # of each class by itself; predict_proba scales them to sum to one
        p = present / present.sum(1, keepdims=True)
    np.testing.assert_allclose(p, fitted.predict_proba(POOL), rtol=1e-10)


def test_no_random_number_is_drawn() -> None:
    model, before = logistic().fit(X, THREE), torch.get_rng_state()
    linear_net(model)
    assert torch.equal(torch.get_rng_state(), before)


def information(estimator: Any, samples: np.ndarray) -> torch.Tensor:
    """R(x) J(x) in float64, by hand: its rows' products sum to the Fisher information."""
    z = torch.as_tensor(estimator.decision_function(samples))
    if z.dim() == 1:  # one logit, of which two would be minus one half and plus one half
        z = z * (2 if getattr(estimator, "multi_class", "") == "multinomial" else 1)
        R = torch.sqrt(z.sigmoid() * (-z).sigmoid())[:, None, None]
    elif is_one_vs_rest(estimator):
        R = torch.diag_embed(torch.sqrt(z.sigmoid() * (-z).sigmoid()))
    else:
        p = z.softmax(1)
        R = p.sqrt()[:, :, None] * (torch.eye(p.shape[1]) - p[:, None, :])
    x = torch.as_tensor(samples)
    J = torch.eye(R.shape[2]).double()
    by_weight = torch.einsum("nrc,cd,nj->nrdj", R, J, x).flatten(2)
    return torch.cat([by_weight, R], 2) if estimator.fit_intercept else by_weight


def test_picks_are_those_of_the_float64_oracle(fitted: Any) -> None:
    V, V_labeled = information(fitted, POOL), information(fitted, X)
    of_labeled = torch.einsum("nri,nrj->ij", V_labeled, V_labeled)
    fisher = (torch.einsum("nri,nrj->ij", V, V) + of_labeled) / (len(X) + len(POOL))
    expected, expected_gains = select_batch_oracle(
        V, 8, fisher, fisher_labeled=of_labeled / len(X), n_labeled=len(X)
    )
    picks, gains = FisherMaskSampler(**PLAIN)(fitted, POOL, 8, X_labeled=X)
    assert picks.tolist() == expected
    np.testing.assert_allclose(gains, expected_gains, rtol=1e-4)


def written_in_torch(estimator: Any) -> Any:
    """Make the same net, as a user of skorch would write it."""
    n_outputs, n_features = estimator.coef_.shape
    kind, criterion = NeuralNetClassifier, nn.CrossEntropyLoss
    if n_outputs == 1:
        kind, criterion = NeuralNetBinaryClassifier, nn.BCEWithLogitsLoss
    module = nn.Linear(n_features, n_outputs).double()
    with torch.no_grad():
        module.weight.copy_(torch.as_tensor(estimator.coef_))
        module.bias.copy_(torch.as_tensor(estimator.intercept_))
    return kind(module, criterion=criterion).initialize()


WITH_DEFAULTS = FisherMaskSampler(random_state=0)


@pytest.mark.parametrize("y", [TWO, THREE], ids=["two", "three"])
@pytest.mark.parametrize("wrap", ["bare", "pipeline", "search", "learner", "sampler", "Dask"])
def test_wherever_it_is(wrap: str, y: np.ndarray) -> None:
    inner, pool, labeled = logistic(), POOL, {"X_labeled": X}
    if wrap == "pipeline":
        inner = make_pipeline(MinMaxScaler(), inner)
    elif wrap == "search":
        inner = GridSearchCV(inner, {"C": [1.0]}, cv=2)
    if wrap == "learner":
        inner = ActiveLearner(inner, WITH_DEFAULTS, X, y)
        picks, labeled = inner.query(POOL, n_instances=6)[0], {}
    elif wrap == "sampler":
        inner = FisherMaskSampler(inner, random_state=0).fit(X, y)
        picks = inner.query(POOL, 6)[0]
    else:
        inner.fit(X, y)
        picks, _ = WITH_DEFAULTS(
            inner, da.from_array(POOL, chunks=50) if wrap == "Dask" else POOL, 6, **labeled
        )
    seen = inner[0].transform if wrap == "pipeline" else np.asarray
    model = innermost(getattr(inner, "best_estimator_", getattr(inner, "estimator_", inner)))
    net = written_in_torch(model)
    expected, _ = WITH_DEFAULTS(net, seen(pool), 6, X_labeled=seen(X))
    assert picks.tolist() == expected.tolist()


CONTAINERS = {
    "list": np.ndarray.tolist,
    "DataFrame": lambda a: pd.DataFrame(a, columns=list("abcde")),
    "csr_array": sp.csr_array,
    "coo_matrix": sp.coo_matrix,
    "float32": lambda a: a.astype("float32"),
    "integers": lambda a: (16 * a).astype("int64"),
}


@pytest.mark.parametrize("make", CONTAINERS.values(), ids=CONTAINERS)
def test_samples_that_it_predicts_may_be_the_pool(make: Any) -> None:
    labeled, pool = make(X), make(POOL)
    sampler = FisherMaskSampler(logistic(), random_state=0).fit(labeled, THREE)
    dense = [
        np.asarray(a.toarray() if sp.issparse(a) else a, dtype="float64") for a in (labeled, pool)
    ]
    net = written_in_torch(sampler.estimator_)
    expected, _ = WITH_DEFAULTS(net, dense[1], 6, X_labeled=dense[0])
    picks, instances = sampler.query(pool, 6)
    assert picks.tolist() == expected.tolist()
    assert type(instances) is type(pool)
    assert sampler.predict(pool).tolist() == sampler.estimator_.predict(dense[1]).tolist()


def test_words_before_and_after_the_first_labels() -> None:
    words = np.array(["red", "green", "blue", "old", "new", "round"])
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(words, 3)) for _ in range(60)]
    y = ["red" in text for text in texts]
    sampler = FisherMaskSampler(make_pipeline(CountVectorizer(), logistic()), random_state=0)
    first, _ = sampler.query(texts, 5)
    assert len({*first.tolist()}) == 5
    sampler.fit(texts[:30], y[:30])
    _, chosen = sampler.query(texts[30:], 4)
    assert [type(text) for text in chosen] == [str] * 4
    assert sampler.score(texts[30:], y[30:]) > 0.9


def test_labels_reach_it_as_they_are() -> None:
    y = np.where(TWO, "yes", "no")
    weighted = logistic(class_weight={"yes": 9.0, "no": 1.0})
    sampler = FisherMaskSampler(weighted).fit(X, y)
    expected = clone(weighted).fit(X, y)
    np.testing.assert_array_equal(sampler.predict_proba(POOL), expected.predict_proba(POOL))
    assert sampler.predict(POOL).tolist() == expected.predict(POOL).tolist()
    weights = np.linspace(0, 1, len(X))
    np.testing.assert_array_equal(
        FisherMaskSampler(logistic()).fit(X, y, sample_weight=weights).predict_proba(POOL),
        logistic().fit(X, y, sample_weight=weights).predict_proba(POOL),
    )


def test_random_state_of_the_sampler_seeds_it() -> None:
    coefs = [
        FisherMaskSampler(sgd(random_state=None, max_iter=5), random_state=seed)
        .fit(X, THREE)
        .estimator_.coef_
        for seed in (0, 0, 1)
    ]
    np.testing.assert_array_equal(coefs[0], coefs[1])
    assert (coefs[0] != coefs[2]).any()


def test_in_cross_validation_and_grid_search() -> None:
    assert cross_val_score(FisherMaskSampler(logistic()), X, TWO, cv=3).shape == (3,)
    search = GridSearchCV(FisherMaskSampler(logistic()), {"estimator__C": [1e-6, 1.0]}, cv=3)
    assert search.fit(X, TWO).best_params_ == {"estimator__C": 1.0}


def test_columns_in_another_order_are_refused_as_by_scikit_learn() -> None:
    frame = CONTAINERS["DataFrame"]
    model = logistic().fit(frame(X), TWO)
    with pytest.raises(ValueError, match="feature names should match"):
        WITH_DEFAULTS(model, frame(POOL)[list("edcba")], 2)
    with pytest.raises(ValueError, match="4 features, but LogisticRegression is expecting 5"):
        WITH_DEFAULTS(logistic().fit(X, TWO), POOL[:, :4], 2)


@pytest.mark.parametrize(
    ("estimator", "found"),
    [
        (RandomForestClassifier(), "RandomForestClassifier"),
        (make_pipeline(MinMaxScaler(), RandomForestClassifier()), "RandomForestClassifier"),
        (
            GridSearchCV(RandomForestClassifier(), {"max_depth": [2]}, cv=2),
            "RandomForestClassifier",
        ),
        (SGDClassifier(), r"SGDClassifier\(loss='hinge'\)"),
        (SGDClassifier(loss="modified_huber"), r"SGDClassifier\(loss='modified_huber'\)"),
        (LinearSVC(), "LinearSVC"),
        (OneVsRestClassifier(logistic()), "OneVsRestClassifier"),
        (CalibratedClassifierCV(logistic()), "CalibratedClassifierCV"),
    ],
    ids=str,
)
def test_others_are_refused_before_training(estimator: Any, found: str) -> None:
    message = f"found {found}, which .* Leave estimator out: a small network .* on the answers"
    sampler = FisherMaskSampler(estimator)
    with pytest.raises(TypeError, match=message):
        sampler.fit(X, TWO)
    assert not hasattr(sampler, "classes_")
    with pytest.raises(TypeError, match="Expected a skorch classifier, LogisticRegression or SGD"):
        unwrap(estimator.fit(X, TWO))
