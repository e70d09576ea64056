from __future__ import annotations

import builtins
import importlib
import inspect
import sys
import unittest
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from modAL.models import ActiveLearner as ModALActiveLearner
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.naive_bayes import GaussianNB
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, MinMaxScaler
from sklearn.utils._param_validation import InvalidParameterError
from skorch import NeuralNet, NeuralNetClassifier, NeuralNetRegressor
from torch import nn

from tests import nets

pytest.importorskip("skactiveml", reason="scikit-activeml is not installed")

from skactiveml.classifier import (
    ParzenWindowClassifier,
    SklearnClassifier,
    SkorchClassifier,
    SlidingWindowClassifier,
)
from skactiveml.pool import UncertaintySampling
from skactiveml.pool.multiannotator import SingleAnnotatorWrapper
from skactiveml.regressor import SklearnRegressor, SkorchRegressor
from skactiveml.utils import majority_vote

from skfishermask import PUBLISHED, FisherMaskSampler, fisher_embedding
from skfishermask.activeml import FisherMask
from skfishermask.modal import ActiveLearner
from tests.activeml_contract import (
    EITHER,
    STATE,
    TemplateSingleAnnotatorPoolQueryStrategy,
    assert_no_query_state,
)

X, Y = (data[:160] for data in nets.digits())
N_LABELED = 60
UNLABELED = np.arange(N_LABELED, 160)
# Small masks and all samples for the diagonal: quick, and no draw matters.
SMALL = nets.SMALL
CLASSES = list(range(10))


def labels(missing: Any = -1) -> np.ndarray:
    y = Y.astype(type(missing)) if isinstance(missing, float) else Y.copy()
    y[N_LABELED:] = missing
    return y


def skorch_classifier(
    module: nn.Module | None = None, criterion: Any = nn.CrossEntropyLoss, **more: Any
) -> SkorchClassifier:
    torch.manual_seed(0)
    return SkorchClassifier(
        module or nets.mlp(),
        criterion,
        neural_net_param_dict=nets.options(),
        **{"classes": CLASSES, "missing_label": -1} | more,
    )


def sklearn_classifier(estimator: Any = None, **more: Any) -> SklearnClassifier:
    return SklearnClassifier(
        nets.logits_net() if estimator is None else estimator,
        **{"classes": CLASSES, "missing_label": -1} | more,
    )


@pytest.fixture(scope="module")
def net() -> Any:
    return nets.fitted(nets.logits_net())


@pytest.fixture(scope="module")
def clf() -> Any:
    return sklearn_classifier().fit(X, labels())


def strategy(**more: Any) -> FisherMask:
    return FisherMask(**SMALL | {"missing_label": -1} | more)


class Scores(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nets.mlp()

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"scores": self.mlp(x)}


@pytest.mark.parametrize("n_silent", [0, 1, 2])
def test_several_annotators(clf: Any, n_silent: int) -> None:
    """A sample that one annotator has answered is a candidate for the others."""
    answers = np.stack([labels(), labels(), *[np.full(160, -1)] * n_silent], axis=1)
    answers[:30, 1] = -1
    answers[30:40, 0] = -1
    aggregate = partial(majority_vote, missing_label=-1)
    asked = SingleAnnotatorWrapper(strategy(), aggregate, missing_label=-1, random_state=0)
    options = {"clf": clf, "fit_clf": False}
    pairs = asked.query(X, answers, batch_size=30, n_annotators_per_sample=2, **options)
    assert (answers[*pairs.T] == -1).all()
    assert len({*map(tuple, pairs.tolist())}) == 30
    open_rows = np.flatnonzero((answers == -1).any(axis=1))
    chosen = strategy().query(X, labels(), candidates=open_rows, batch_size=30, **options)
    in_order = list(dict.fromkeys(pairs[:, 0].tolist()))
    assert in_order == chosen[: len(in_order)].tolist()
    assert any(row < 40 for row in in_order)


def test_to_logits(net: Any) -> None:
    other = NeuralNetClassifier(Scores, criterion=nn.CrossEntropyLoss, **nets.options())
    other.initialize().module_.mlp.load_state_dict(net.module_.state_dict())
    ours = strategy(to_logits=lambda output: output["scores"])
    found = ours.query(X, labels(), other, fit_clf=False, batch_size=3)
    assert (
        found.tolist() == strategy().query(X, labels(), net, fit_clf=False, batch_size=3).tolist()
    )
    with pytest.raises(InvalidParameterError, match="'to_logits'"):
        strategy(to_logits=3).query(X, labels(), net, fit_clf=False)


OPTIONS = [
    {},
    {"use_labeled": False},
    {"target": "identity"},
    {"oversample": 2.0},
    {"coverage_share": 0.4},
    {"mask": "output_layer"},
    {"n_directions": 3, "regularization": 0.01},
    {"embedding_dtype": "float16"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_picks_and_utilities_are_those_of_the_sampler(clf: Any, options: dict[str, Any]) -> None:
    sampler = FisherMaskSampler(**SMALL | options)
    expected, gains = sampler(clf, X[N_LABELED:], 5, X_labeled=X[:N_LABELED])
    ours = strategy(**options)
    indices, utilities = ours.query(
        X, labels(), clf, fit_clf=False, batch_size=5, return_utilities=True
    )
    assert indices.tolist() == (N_LABELED + expected).tolist()
    assert ours.query(X, labels(), clf, fit_clf=False, batch_size=5).tolist() == indices.tolist()
    assert len(ours.mask_) == len(sampler.mask_)
    assert ours.query_info_["n_labeled"] == N_LABELED

    assert utilities.shape == (5, 160)
    for i, row in enumerate(utilities):
        left = np.setdiff1d(UNLABELED, indices[:i])
        assert np.flatnonzero(~np.isnan(row)).tolist() == left.tolist()
        assert (row[left] >= 0).all()
    of_picks = utilities[np.arange(5), indices]
    if "oversample" not in options:
        np.testing.assert_allclose(of_picks, gains, rtol=1e-6)
    if not {"oversample", "coverage_share"} & set(options):
        np.testing.assert_array_equal(np.nanargmax(utilities, axis=1), indices)


@pytest.mark.parametrize("options", [{}, {"use_labeled": False}], ids=str)
def test_utilities_are_what_each_candidate_would_gain(clf: Any, options: dict[str, Any]) -> None:
    indices, utilities = strategy(**options).query(
        X, labels(), clf, fit_clf=False, batch_size=2, return_utilities=True
    )
    rest = UNLABELED[[3, 50, 90]]
    expected = utilities_oracle(clf, indices[:1], rest, **options)
    np.testing.assert_allclose(utilities[1, rest], expected, rtol=1e-5)


def utilities_oracle(clf: Any, taken: np.ndarray, rest: np.ndarray, **options: Any) -> list[float]:
    """Decrease of tr(M^-1 F) for the second of two picks, from dense matrices in float64."""
    sampler = FisherMaskSampler(**SMALL | options)
    sampler(clf, X[N_LABELED:], 2, X_labeled=X[:N_LABELED])
    module = clf.estimator_.module_
    V = fisher_embedding(module, [torch.as_tensor(X)], sampler.mask_).double()
    information = V.mT @ V
    fisher = information.mean(0)
    n_labeled = N_LABELED if options.get("use_labeled", True) else 0
    share = 2 / (n_labeled + 2)
    M = torch.eye(V.shape[2]).double() + share * information[taken].sum(0)
    if n_labeled:
        M += (1 - share) * information[:N_LABELED].mean(0)

    def objective(M: torch.Tensor) -> float:
        return float(torch.linalg.solve(M, fisher).trace())

    return [objective(M) - objective(M + share * information[i]) for i in rest]


CLASSIFIERS = {
    "SkorchClassifier": lambda: skorch_classifier(),
    "probabilities": lambda: skorch_classifier(
        nets.mlp(10, nn.LogSoftmax(1)), criterion=nn.NLLLoss
    ),
    "forward_outputs": lambda: skorch_classifier(
        forward_outputs={"proba": (0, nn.Softmax(dim=-1)), "logits": (0, None)}
    ),
    "own transform": lambda: skorch_classifier(
        forward_outputs={"proba": (0, lambda z: z.softmax(1))}
    ),
    "SklearnClassifier": lambda: sklearn_classifier(),
    "sliding window": lambda: SlidingWindowClassifier(
        skorch_classifier(), classes=CLASSES, missing_label=-1, only_labeled=True
    ),
}


@pytest.mark.parametrize("make", CLASSIFIERS.values(), ids=CLASSIFIERS)
def test_every_wrapper_gives_the_picks_of_the_net_inside(make: Any, net: Any) -> None:
    fitted = make().fit(X, labels())
    # All were trained in the same way; LogSoftmax changes rounding only.
    np.testing.assert_allclose(fitted.predict_proba(X), net.predict_proba(X), atol=1e-4)
    expected, _ = FisherMaskSampler(**SMALL)(net, X[N_LABELED:], 4, X_labeled=X[:N_LABELED])
    # A SkorchClassifier casts, so float64 samples will do.
    data = X.astype("float64") if isinstance(fitted, SkorchClassifier) else X
    before = fitted.predict_proba(X)
    indices = strategy().query(data, labels(), fitted, fit_clf=False, batch_size=4)
    assert indices.tolist() == (N_LABELED + expected).tolist()
    np.testing.assert_array_equal(fitted.predict_proba(X), before)


@pytest.mark.parametrize("wrap", ["pipeline", "search", "prefit", "bare", "logistic"])
def test_what_may_be_inside(wrap: str, net: Any) -> None:
    if wrap == "bare":
        fitted = net
    elif wrap == "prefit":
        fitted = sklearn_classifier(net)
    elif wrap == "logistic":
        fitted = sklearn_classifier(LogisticRegression()).fit(X, labels())
    else:
        inner = make_pipeline(MinMaxScaler(), nets.logits_net(max_epochs=2))
        if wrap == "search":
            inner = GridSearchCV(nets.logits_net(max_epochs=2), {"lr": [0.1]}, cv=2)
        fitted = sklearn_classifier(inner).fit(X, labels())
    inside = getattr(fitted, "estimator_", fitted)
    expected, _ = FisherMaskSampler(**SMALL)(inside, X[N_LABELED:], 3, X_labeled=X[:N_LABELED])
    indices = strategy().query(X, labels(), fitted, fit_clf=False, batch_size=3)
    assert indices.tolist() == (N_LABELED + expected).tolist()


def test_integer_candidates_are_rows_of_x(clf: Any) -> None:
    rows = UNLABELED[10:40]
    expected, _ = FisherMaskSampler(**SMALL)(clf, X[rows], 3, X_labeled=X[:N_LABELED])
    # Their order is of no matter.
    indices, utilities = strategy().query(
        X, labels(), clf, fit_clf=False, candidates=rows[::-1], batch_size=3, return_utilities=True
    )
    assert indices.tolist() == rows[expected].tolist()
    assert utilities.shape == (3, 160)
    assert np.flatnonzero(~np.isnan(utilities[0])).tolist() == rows.tolist()
    assert np.isnan(utilities[2, indices]).tolist() == [True, True, False]


def test_candidates_may_be_samples_themselves(clf: Any) -> None:
    expected, _ = FisherMaskSampler(**SMALL)(clf, X[100:140], 3, X_labeled=X[:N_LABELED])
    indices, utilities = strategy().query(
        X[:70],
        labels()[:70],
        clf,
        fit_clf=False,
        candidates=X[100:140],
        batch_size=3,
        return_utilities=True,
    )
    assert indices.tolist() == expected.tolist()
    assert utilities.shape == (3, 40)
    assert np.isnan(utilities).sum(1).tolist() == [0, 1, 2]


def test_candidates_that_are_not_embedded_have_no_utility(clf: Any) -> None:
    indices, utilities = strategy(max_candidates=20).query(
        X, labels(), clf, fit_clf=False, batch_size=2, return_utilities=True
    )
    assert (~np.isnan(utilities)).sum(1).tolist() == [20, 19]
    np.testing.assert_array_equal(np.nanargmax(utilities, axis=1), indices)


@pytest.mark.parametrize("candidates", [None, UNLABELED[:3], X[:3]], ids=["y", "rows", "samples"])
def test_a_batch_larger_than_the_candidates_is_reduced(clf: Any, candidates: Any) -> None:
    keep = slice(0, N_LABELED + 3)
    with pytest.warns(UserWarning, match="'batch_size=3' was set"):
        indices, utilities = strategy().query(
            X[keep],
            labels()[keep],
            clf,
            candidates=candidates,
            batch_size=5,
            return_utilities=True,
        )
    assert sorted(indices - indices.min()) == [0, 1, 2]
    assert len(utilities) == 3


@pytest.mark.parametrize("make", [skorch_classifier, sklearn_classifier])
def test_fit_clf_fits_a_clone_on_the_labelled_samples(make: Any, net: Any) -> None:
    unfitted = make()
    expected, _ = FisherMaskSampler(**SMALL)(net, X[N_LABELED:], 3, X_labeled=X[:N_LABELED])
    indices = strategy().query(X, labels(), unfitted, fit_clf=True, batch_size=3)
    assert indices.tolist() == (N_LABELED + expected).tolist()
    with pytest.raises(NotFittedError):
        strategy().query(X, labels(), unfitted, fit_clf=False)


class Weighted(NeuralNetClassifier):
    seen: np.ndarray | None = None

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Any:
        type(self).seen = sample_weight
        return super().fit(X, y)


def test_sample_weight_reaches_fit_or_is_refused() -> None:
    weights = np.arange(160) / 160
    weighted = Weighted(nets.mlp(), criterion=nn.CrossEntropyLoss, **nets.options(max_epochs=1))
    strategy().query(X, labels(), sklearn_classifier(weighted), True, weights)
    np.testing.assert_array_equal(Weighted.seen, weights[:N_LABELED])
    for refuses in (skorch_classifier(), sklearn_classifier()):
        with pytest.raises(TypeError, match="sample_weight"):
            strategy().query(X, labels(), refuses, True, weights)


def test_no_labels_yet() -> None:
    y = np.full(160, -1)
    indices, utilities = strategy().query(
        X, y, skorch_classifier(), fit_clf=True, batch_size=2, return_utilities=True
    )
    assert np.isfinite(utilities[0]).all()
    np.testing.assert_array_equal(np.nanargmax(utilities, axis=1), indices)


def test_missing_labels_may_be_nan_or_strings() -> None:
    for missing, y in [
        (np.nan, labels(np.nan)),
        ("?", np.where(labels() < 0, "?", labels().astype(str))),
    ]:
        classes = CLASSES if y.dtype.kind == "f" else [str(c) for c in CLASSES]
        clf = skorch_classifier(classes=classes, missing_label=missing)
        ours = strategy(missing_label=missing)
        indices = ours.query(X, y, clf, fit_clf=True, batch_size=2)
        assert (indices >= N_LABELED).all()


def test_images() -> None:
    images = X.reshape(-1, 1, 8, 8)
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(108, 10))
    fitted = skorch_classifier(module).fit(images, labels())
    indices, utilities = strategy().query(
        images, labels(), fitted, fit_clf=False, batch_size=3, return_utilities=True
    )
    np.testing.assert_array_equal(np.nanargmax(utilities, axis=1), indices)
    chosen = strategy().query(
        images, labels(), fitted, fit_clf=False, candidates=images[60:], batch_size=3
    )
    assert (chosen + 60).tolist() == indices.tolist()


@pytest.mark.parametrize("seed", [0, np.random.RandomState(0)], ids=["int", "RandomState"])
def test_reproducible(clf: Any, seed: Any) -> None:
    draws: dict[str, Any] = {"mask": "random", "max_candidates": 30, "random_state": seed}
    ours = strategy(**draws)
    first = ours.query(X, labels(), clf, fit_clf=False, batch_size=4)
    assert ours.query(X, labels(), clf, fit_clf=False, batch_size=4).tolist() == first.tolist()
    assert (
        clone(ours).query(X, labels(), clf, fit_clf=False, batch_size=4).tolist() == first.tolist()
    )
    other = strategy(**draws | {"random_state": 7}).query(
        X, labels(), clf, fit_clf=False, batch_size=4
    )
    assert other.tolist() != first.tolist()


def test_parameters_are_those_of_the_sampler() -> None:
    ours, theirs = (
        {name: p.default for name, p in inspect.signature(cls).parameters.items()}
        for cls in (FisherMask, FisherMaskSampler)
    )
    for name in ("missing_label", "target_type"):
        ours.pop(name)
    theirs.pop("estimator")
    ours["batch_size"] = ours.pop("net_batch_size")
    assert ours == theirs
    changed = clone(FisherMask(mask="all").set_params(net_batch_size=7, missing_label=-1))
    assert changed.get_params()["mask"] == "all"
    assert changed.get_params()["net_batch_size"] == 7
    assert "FisherMask(" in repr(changed)


def test_net_batch_size_reaches_the_network(clf: Any) -> None:
    sizes = []
    hook = clf.estimator_.module_.register_forward_pre_hook(
        lambda module, inputs: sizes.append(len(inputs[0]))
    )
    strategy(net_batch_size=7).query(X, labels(), clf, fit_clf=False)
    hook.remove()
    assert max(sizes) == 7


ERRORS = {
    "no net": (
        lambda: ParzenWindowClassifier(classes=CLASSES, missing_label=-1).fit(X, labels()),
        {},
        (TypeError, "Expected a skorch classifier.*found ParzenWindowClassifier"),
    ),
    "no net inside": (
        lambda: sklearn_classifier(GaussianNB()).fit(X, labels()),
        {},
        (TypeError, "Expected a skorch classifier.*found GaussianNB"),
    ),
    "fit of a bare net": (nets.logits_net, {"fit_clf": True}, (TypeError, "SkactivemlClassifier")),
    "fit_clf": (skorch_classifier, {"fit_clf": "yes"}, (TypeError, "fit_clf")),
    "second output": (
        lambda: skorch_classifier(forward_outputs={"proba": (1, None)}).initialize(),
        {},
        (ValueError, "first output of the module, found forward_outputs with 'proba' from"),
    ),
    "other missing label": (
        lambda: skorch_classifier(missing_label=-2),
        {},
        (ValueError, "must be equal"),
    ),
}


@pytest.mark.parametrize(("make", "options", "expected"), ERRORS.values(), ids=ERRORS)
def test_errors(make: Any, options: dict[str, Any], expected: tuple[Any, str]) -> None:
    error, message = expected
    with pytest.raises(error, match=message):
        strategy().query(X, labels(), make(), **{"fit_clf": False} | options)


def test_not_fitted_and_fits_that_failed() -> None:
    for unfitted in (skorch_classifier(), sklearn_classifier(), nets.logits_net()):
        with pytest.raises(NotFittedError):
            strategy().query(X, labels(), unfitted, fit_clf=False)
    # Float labels, from a missing_label of NaN: PyTorch's loss refuses them.
    broken = sklearn_classifier(missing_label=np.nan, classes=None)
    with (
        pytest.warns(UserWarning, match="could not be fitted"),
        pytest.raises(NotFittedError, match="failed"),
    ):
        strategy(missing_label=np.nan).query(X, labels(np.nan), broken, fit_clf=True)


@pytest.mark.filterwarnings("ignore:'batch_size=1' is larger")
def test_nothing_to_label(clf: Any) -> None:
    indices, utilities = strategy().query(X, Y, clf, fit_clf=False, return_utilities=True)
    assert indices.shape == (0,)
    assert utilities.shape == (0, 160)


def test_parameters_are_checked_before_the_fit() -> None:
    with pytest.raises(InvalidParameterError, match="mask_fraction"):
        strategy(mask_fraction=2.0).query(X, labels(), skorch_classifier(), fit_clf=True)


def test_it_stands_in_for_another_strategy(clf: Any) -> None:
    for each in (UncertaintySampling(missing_label=-1, random_state=0), strategy()):
        found = each.query(X=X, y=labels(), clf=clf, fit_clf=False, batch_size=2)
        assert len(found) == 2
        assert (found >= N_LABELED).all()


def test_without_scikit_activeml_the_import_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_activeml(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "skactiveml":
            raise ModuleNotFoundError("No module named 'skactiveml'")
        return real_import(name, *args, **kwargs)

    real_import = builtins.__import__
    monkeypatch.delitem(sys.modules, "skfishermask.activeml")
    monkeypatch.setattr(builtins, "__import__", no_activeml)
    with pytest.raises(ImportError, match=r'pip install "scikit-activeml>=1\.0"'):
        importlib.import_module("skfishermask.activeml")


NUMBERS = (X @ np.linspace(-1, 1, 64)).astype("float32")


def numbers_net(n_outputs: int = 1, kind: Any = NeuralNetRegressor, **more: Any) -> Any:
    torch.manual_seed(0)
    return kind(nets.mlp(n_outputs), **nets.options(lr=0.01, **more))


class AsColumn(NeuralNetRegressor):
    def fit(self, X: Any, y: Any, **fit_params: Any) -> Any:
        return super().fit(X, np.asarray(y, "float32").reshape(-1, 1))


def skorch_regressor(criterion: Any = nn.MSELoss, **more: Any) -> SkorchRegressor:
    torch.manual_seed(0)
    options = nets.options(lr=0.01)
    return SkorchRegressor(nets.mlp(1), criterion, neural_net_param_dict=options, **more)


REGRESSORS = {
    "SkorchRegressor": skorch_regressor,
    "Huber": lambda: skorch_regressor(nn.HuberLoss, forward_outputs={"y": (0, torch.ravel)}),
    "SklearnRegressor": lambda: SklearnRegressor(numbers_net(kind=AsColumn)),
}


@pytest.mark.parametrize("make", REGRESSORS.values(), ids=REGRESSORS)
def test_regressors(make: Any) -> None:
    y = np.where(np.arange(160) < N_LABELED, NUMBERS, np.nan)
    fitted = make().fit(X, y)
    ours = FisherMask(**SMALL)
    found = ours.query(X, y, make(), batch_size=4)
    assert ours.query(X, y, fitted, fit_clf=False, batch_size=4).tolist() == found.tolist()
    # As the sampler chooses for a learner, which has the labels and so their variance.
    criterion = nn.HuberLoss if make is REGRESSORS["Huber"] else nn.MSELoss
    net = numbers_net(criterion=criterion).fit(X[:N_LABELED], NUMBERS[:N_LABELED, None])
    learner = SimpleNamespace(
        estimator=net,
        query_strategy=None,
        X_training=X[:N_LABELED],
        y_training=NUMBERS[:N_LABELED, None],
    )
    expected, _ = FisherMaskSampler(**SMALL)(learner, X[N_LABELED:], 4)
    assert found.tolist() == (N_LABELED + expected).tolist()


@pytest.mark.parametrize("kind", ["labels", "numbers"])
def test_several_labels_a_sample_with_a_fitted_net(kind: str) -> None:
    if kind == "labels":
        y = (Y[:, None] == np.arange(3)).astype("float32")
        net = numbers_net(3, NeuralNet, criterion=nn.BCEWithLogitsLoss)
    else:
        y, net = np.stack([NUMBERS] * 3, axis=1), numbers_net(3)
    net.fit(X[:N_LABELED], y[:N_LABELED])
    learner = SimpleNamespace(
        estimator=net, query_strategy=None, X_training=X[:N_LABELED], y_training=y[:N_LABELED]
    )
    expected, _ = FisherMaskSampler(**SMALL)(learner, X[N_LABELED:], 4)
    y[N_LABELED:] = np.nan
    if kind == "labels":
        y[0, 0] = np.nan  # labelled all the same
    found = FisherMask(**SMALL).query(X, y, net, fit_clf=False, batch_size=4)
    assert found.tolist() == (N_LABELED + expected).tolist()
    with pytest.raises(ValueError, match=r"shape \(160, 3\), which scikit-activeml"):
        FisherMask(**SMALL).query(X, y, skorch_regressor())
    with pytest.raises(ValueError, match="1d array"):
        FisherMask(**SMALL, target_type="single-output").query(X, y, net, fit_clf=False)


class SeveralLabels(SkorchClassifier):
    """Takes several labels, as that of scikit-activeml 1.1 does."""

    target_type = "multi-label"

    def fit(self, X: Any, y: Any, **fit_params: Any) -> Any:
        self.initialize()
        known = np.isfinite(y).all(axis=1)
        self.neural_net_.fit(X[known], y[known].astype("float32"))
        return self


def test_several_labels_a_sample_in_the_next_version() -> None:
    y = (Y[:, None] == np.arange(3)).astype("float32")
    net = numbers_net(3, NeuralNet, criterion=nn.BCEWithLogitsLoss)
    net.fit(X[:N_LABELED], y[:N_LABELED])
    y[N_LABELED:] = np.nan
    torch.manual_seed(0)
    clf = SeveralLabels(
        nets.mlp(3), nn.BCEWithLogitsLoss, neural_net_param_dict=nets.options(lr=0.01)
    )
    expected = FisherMask(**SMALL).query(X, y, net, fit_clf=False, batch_size=4)
    assert FisherMask(**SMALL).query(X, y, clf, batch_size=4).tolist() == expected.tolist()
    with pytest.raises(ValueError, match="does not support target capability"):
        FisherMask(**SMALL, target_type="single-output").query(X, labels(np.nan), clf)


def test_every_way_to_ask_chooses_the_same() -> None:
    sampler = FisherMaskSampler(nets.logits_net(), **SMALL).fit(X[:N_LABELED], Y[:N_LABELED])
    net, strategy, pool = sampler.estimator_, FisherMaskSampler(**SMALL), X[N_LABELED:]
    labeled = {"X_labeled": X[:N_LABELED]}
    learners = [cls(net, strategy) for cls in (ModALActiveLearner, ActiveLearner)]
    for learner in learners:
        learner.X_training = X[:N_LABELED]  # As after teaching; the net is fitted already.
    pipeline = make_pipeline(FunctionTransformer(), net)
    chosen = {
        "sampler": sampler.query(pool, 10, **labeled)[0],
        "net": strategy(net, pool, 10, **labeled)[0],
        "pipeline": strategy(pipeline, pool, 10, **labeled)[0],
        "modAL's learner": learners[0].query(pool, n_instances=10)[0],
        "our learner": learners[1].query(pool, n_instances=10)[0],
        "scikit-activeml": FisherMask(missing_label=-1, **SMALL).query(
            X, labels(), net, fit_clf=False, batch_size=10
        )
        - N_LABELED,
    }
    assert {tuple(indices.tolist()) for indices in chosen.values()} == {tuple(chosen["net"])}


# What scikit-activeml asks of its strategies

WRONG: dict[str, Any] = {
    "mask": "best",
    "mask_fraction": 2.0,
    "n_mask_samples": 0,
    "likelihood": "poisson",
    "n_directions": 0,
    "target": "labels",
    "use_labeled": "no",
    "regularization": 0.0,
    "oversample": 0.5,
    "coverage_share": 1.5,
    "coverage_inputs": 3,
    "max_candidates": 0,
    "to_logits": 3,
    "embedding_dtype": "int8",
    "memory_share": 0.0,
    "scratch_folder": 3,
    "verbose": "loud",
    "net_batch_size": 0,
}


class Contract(TemplateSingleAnnotatorPoolQueryStrategy):
    """The strategy on a small problem; `classifier` makes what it refits."""

    classifier: Any
    leaves_no_state = True

    def setUp(self) -> None:
        samples = np.random.default_rng(0).normal(size=(12, 2)).astype("float32")
        y = np.where(samples[:, 0] > 0, 1.0, 0.0)
        y[4:] = np.nan
        assert set(y[:4]) == {0, 1}
        clf = self.classifier()
        super().setUp(
            qs_class=FisherMask,
            init_default_params={},
            query_default_params_clf={"X": samples, "y": y, "clf": clf},
        )

    def test_query(self) -> None:
        """The gains, by hand: see `utilities_oracle`; the first has the largest."""
        indices, utilities = self.make(**PUBLISHED).query(
            **self.asked(batch_size=3, return_utilities=True)
        )
        np.testing.assert_array_equal(np.nanargmax(utilities, axis=1), indices)

    def test_target_contract(self) -> None:
        assert {capability[:2] for capability in self.make()._target_capabilities} == {
            ("classification", "single-output"),
            ("classification", "multi-label"),
            ("regression", "single-output"),
        }

    def test_a_query_that_fails_leaves_the_state_of_the_one_before(self) -> None:
        strategy = self.make()
        strategy.query(**self.asked())
        before = dict(vars(strategy))
        assert set(STATE) <= set(before)
        for wrong in ({"X": [[1.0], [2.0]]}, {"batch_size": 0}, {"clf": GaussianNB()}):
            with pytest.raises(EITHER):
                strategy.query(**self.asked() | wrong)
            assert vars(strategy) == before


for name, value in WRONG.items():

    def check(self: Any, name: str = name, value: Any = value) -> None:
        self._test_param("init", name, [(value, ValueError)])

    setattr(Contract, f"test_init_param_{name}", check)


class TestRefitOfALogisticRegression(Contract, unittest.TestCase):
    # Numbers as objects, SklearnClassifier hands on to what refuses them.
    kinds_of_labels = Contract.kinds_of_labels[:-1]

    @staticmethod
    def classifier() -> Any:
        return SklearnClassifier(LogisticRegression(), classes=[0, 1])


class TestRefitOfASkorchClassifier(Contract, unittest.TestCase):
    """Its weights are drawn at each fit."""

    @staticmethod
    def classifier() -> Any:
        options = nets.options(module__in_features=2, module__out_features=2, max_epochs=3)
        return SkorchClassifier(nn.Linear, neural_net_param_dict=options, classes=[0, 1])

    def test_query_param_sample_weight(self) -> None:
        self._test_param("query", "sample_weight", [(np.ones(12), TypeError), (None, None)])


class Declared(SkorchClassifier):
    """Says what its labels are, as classifiers of scikit-activeml 1.1 do."""

    target_type = "multi-output"


def test_labels_of_other_kinds_are_refused_before_any_state() -> None:
    fitted = skorch_classifier().fit(X, labels())
    fitted.target_spec_ = SimpleNamespace(
        task="classification", target_type="single-output", annotation_type="multi-annotator"
    )
    unfitted = Declared(nets.mlp(), neural_net_param_dict=nets.options(), missing_label=-1)
    for clf in (fitted, unfitted):
        ours = strategy()
        with pytest.raises(ValueError, match="FisherMask does not support target capability"):
            ours.query(X, labels(), clf, fit_clf=clf is unfitted)
        assert_no_query_state(None, ours)
