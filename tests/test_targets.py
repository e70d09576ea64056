"""The sampler as a regressor, and with several labels a sample or one a position."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import sklearn
import torch
from sklearn.base import is_classifier, is_regressor
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import r2_score
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator
from sklearn.utils.fixes import parse_version
from skorch import NeuralNet, NeuralNetClassifier, NeuralNetRegressor
from torch import Tensor, nn

from skfishermask import PUBLISHED, FisherMaskSampler, active_learning_curve, fisher_embedding
from skfishermask.fisher import Categorical, Gaussian, fisher_matrix
from skfishermask.modal import ActiveLearner
from tests import oracles
from tests.fisher.common import Poisson

RNG = np.random.default_rng(0)
X = RNG.normal(size=(120, 4)).astype("float32")
NUMBERS = (X @ RNG.normal(size=(4, 2))).astype("float32")
LABELS = (X[:, :3] > 0).astype("int64")
TOKENS = RNG.integers(1, 9, size=(120, 6))
MISSING = np.where(np.arange(360).reshape(120, 3) == 22, np.nan, LABELS)
TAGS = [["a", "b"][i % 2 :] for i in range(1, 121)]
BERNOULLI: dict[str, Any] = {"likelihood": "bernoulli"}
LOGISTIC = FisherMaskSampler(LogisticRegression(), likelihood="gaussian")
OPTIONS: dict[str, Any] = {"train_split": None, "verbose": 0, "max_epochs": 60, "lr": 0.1}


class MaskedBCE(nn.BCEWithLogitsLoss):
    """Labels that are NaN cost nothing."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        known = ~target.isnan()
        return super().forward(input[known], target[known])


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(9, 5), nn.Linear(5, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.table(tokens)).transpose(1, 2)


def regressor(n_outputs: int = 2, **more: Any) -> NeuralNetRegressor:
    torch.manual_seed(0)
    return NeuralNetRegressor(nn.Linear(4, n_outputs), **OPTIONS | more)


def multilabel(criterion: Any = nn.BCEWithLogitsLoss, kind: Any = NeuralNet) -> NeuralNet:
    torch.manual_seed(0)
    return kind(nn.Linear(4, 3), criterion=criterion, **OPTIONS | {"lr": 1.0})


def tagger(**more: Any) -> NeuralNetClassifier:
    torch.manual_seed(0)
    return NeuralNetClassifier(
        Tagger(), criterion=nn.CrossEntropyLoss, **OPTIONS | {"lr": 1.0} | more
    )


@pytest.mark.slow
@pytest.mark.usefixtures("short_training")
def test_check_estimator_as_a_regressor() -> None:
    sampler = FisherMaskSampler(likelihood="gaussian", random_state=0)
    assert is_regressor(sampler)
    assert not is_classifier(sampler)
    results = check_estimator(sampler, on_fail=None)
    bad = [r for r in results if r["status"] not in ("passed", "skipped")]
    assert not bad, [(r["check_name"], r["exception"]) for r in bad]
    assert sum(r["status"] == "passed" for r in results) > 40


# Checks that bring their own labels, regardless of the tags.
ONE_LABEL = "its labels are one column without a second axis"
OTHER_VALUES = "its labels are 1 and 2, or strings"
NOT_OF_LABELS = {
    "check_classifiers_one_label_sample_weights": ONE_LABEL,
    "check_classifiers_train": ONE_LABEL,
    "check_classifier_not_supporting_multiclass": ONE_LABEL,
    "check_estimators_dtypes": OTHER_VALUES,
    "check_classifier_data_not_an_array": OTHER_VALUES,
    "check_classifiers_classes": OTHER_VALUES,
    "check_fit2d_1feature": OTHER_VALUES,
}


@pytest.mark.skipif(
    parse_version(sklearn.__version__) < parse_version("1.9"),
    reason="more checks of older suites bring their own labels",
)
@pytest.mark.slow
@pytest.mark.usefixtures("short_training")
def test_check_estimator_with_several_labels() -> None:
    sampler = FisherMaskSampler(likelihood="bernoulli", random_state=0)
    results = check_estimator(sampler, expected_failed_checks=NOT_OF_LABELS, on_fail=None)
    bad = [r for r in results if r["status"] == "failed"]
    assert not bad, [(r["check_name"], r["exception"]) for r in bad]
    assert {r["check_name"] for r in results if r["status"] == "xfail"} == {*NOT_OF_LABELS}
    assert sum(r["status"] == "passed" for r in results) > 40


def test_a_likelihood_of_ones_own_takes_the_labels_of_the_net() -> None:
    sampler = FisherMaskSampler(likelihood=Poisson(), random_state=0)
    with pytest.raises(ValueError, match=r"Without a net as estimator, likelihood is one of \("):
        sampler.fit(X, NUMBERS[:, :1])
    fitted = sampler.set_params(estimator=regressor(1)).fit(X, NUMBERS[:, :1])
    assert is_regressor(fitted)
    assert fitted.predict(X).shape == (120, 1)
    assert len(fitted.query(X, 3)[0]) == 3


@pytest.mark.parametrize("n_targets", [0, 1, 2])
def test_a_regressor_predicts_in_the_shape_of_its_labels(n_targets: int) -> None:
    y = NUMBERS[:, :n_targets] if n_targets else NUMBERS[:, 0]
    sampler = FisherMaskSampler(regressor(max(1, n_targets)), random_state=0).fit(X, y)
    predicted = sampler.predict(X)
    assert predicted.shape == y.shape
    assert sampler.score(X, y) == pytest.approx(r2_score(y, predicted))
    assert sampler.score(X, y) > 0.9
    assert not hasattr(sampler, "predict_proba")
    assert not hasattr(sampler, "classes_")


def test_a_regressor_in_scikit_learn() -> None:
    sampler = make_pipeline(StandardScaler(), FisherMaskSampler(regressor(), random_state=0))
    assert cross_val_score(sampler, X, NUMBERS, cv=3).min() > 0.5
    search = GridSearchCV(FisherMaskSampler(regressor(1)), {"estimator__lr": [1e-5, 0.1]}, cv=2)
    search.fit(X, NUMBERS[:, 0])
    assert search.best_params_ == {"estimator__lr": 0.1}
    indices, gains = FisherMaskSampler(random_state=0)(search, X, 3)
    assert len(set(indices.tolist())) == 3
    assert (gains > 0).all()


def test_the_kind_changes_with_the_estimator() -> None:
    sampler = FisherMaskSampler(random_state=0).fit(X, LABELS[:, 0])
    assert sampler.classes_.tolist() == [0, 1]
    sampler.set_params(likelihood="gaussian").fit(X, NUMBERS)
    assert not hasattr(sampler, "classes_")
    assert sampler.predict(X).shape == (120, 2)


@pytest.mark.parametrize("kind", ["default", "own", "pipeline", "classifier"])
def test_several_labels_a_sample(kind: str) -> None:
    sampler = {
        "default": FisherMaskSampler(likelihood="bernoulli", random_state=0),
        "own": FisherMaskSampler(multilabel(), random_state=0),
        "pipeline": FisherMaskSampler(make_pipeline(StandardScaler(), multilabel())),
        "classifier": FisherMaskSampler(
            NeuralNetClassifier(
                nn.Linear(4, 3), criterion=nn.BCEWithLogitsLoss, **OPTIONS | {"lr": 1.0}
            ),
        ),
    }[kind]
    assert is_classifier(sampler)
    sampler.fit(X, LABELS)
    p, predicted = sampler.predict_proba(X), sampler.predict(X)
    assert p.shape == predicted.shape == (120, 3)
    np.testing.assert_array_equal(predicted, p > 0.5)
    assert sampler.score(X, LABELS) == np.mean((predicted == LABELS).all(1)) > 0.6
    assert sampler.classes_.tolist() == [0, 1, 2]
    sampler.set_params(**PUBLISHED)
    assert sampler.query(X, 3)[1].shape == (3, 4)
    assert sampler.query_info_["n_directions"] == 3


def test_missing_labels_cost_nothing() -> None:
    y = LABELS.astype("float64")
    y[::2, 1] = np.nan
    sampler = FisherMaskSampler(multilabel(MaskedBCE), random_state=0).fit(X, y)
    assert np.isfinite(sampler.predict_proba(X)).all()
    known = ((sampler.predict(X) == y) | np.isnan(y)).all(1)
    assert sampler.score(X, y) == pytest.approx(known.mean())
    assert len(sampler.query(X, 3)[0]) == 3


def test_a_label_a_position() -> None:
    y = TOKENS % 3
    y[:, 5] = -100
    sampler = FisherMaskSampler(tagger(), random_state=0).fit(TOKENS, y)
    assert sampler.predict(TOKENS).shape == y.shape
    assert sampler.predict_proba(TOKENS).shape == (120, 3, 6)
    assert sampler.score(TOKENS, y) == 1
    assert sampler.classes_.tolist() == [0, 1, 2]
    assert len(sampler.query(TOKENS, 3, X_labeled=TOKENS)[0]) == 3
    assert sampler.query_info_["n_directions"] == 16


def trimmed(samples: list[Any]) -> Any:
    """A batch as long as its longest sequence."""
    tokens = torch.stack([torch.as_tensor(x) for x, _ in samples])
    return tokens[:, : int((tokens > 0).sum(1).max())], torch.zeros(len(tokens))


@pytest.mark.parametrize("batch_size", [1, 7])
@pytest.mark.parametrize("n_directions", [None, 1], ids=["exact", "combinations"])
def test_sequences_of_several_lengths(n_directions: int | None, batch_size: int) -> None:
    tokens = TOKENS * (np.arange(6) < np.r_[1, RNG.integers(1, 7, 119)][:, None])
    sampler = FisherMaskSampler(
        mask="all",
        likelihood=Categorical(ignored=lambda batch: batch == 0),
        batch_size=batch_size,
        **PUBLISHED | {"n_directions": n_directions},
    )
    expected, gains = sampler(tagger().initialize(), tokens[:90], 8, X_labeled=tokens[90:])
    net = tagger(iterator_valid__collate_fn=trimmed).initialize()
    found, found_gains = sampler(net, tokens[:90], 8, X_labeled=tokens[90:])
    assert sampler.query_info_["n_directions"] == (n_directions or 2 * 6)
    assert found.tolist() == expected.tolist()
    np.testing.assert_allclose(found_gains, gains, rtol=1e-4)


class Positions(Tagger):
    """A logit for each token, (n, positions), where the axis of the labels is missing."""

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens)[:, 0]


@pytest.mark.parametrize("criterion", [nn.BCEWithLogitsLoss, nn.MSELoss])
@pytest.mark.parametrize("share", [0, "auto"])
@pytest.mark.parametrize("first", [2, 6])
def test_positions_need_an_axis_of_their_own(criterion: Any, share: Any, first: int) -> None:
    tokens = TOKENS * (np.arange(6) < np.r_[first, RNG.integers(1, 7, 119)][:, None])
    net = NeuralNet(Positions(), criterion, iterator_valid__collate_fn=trimmed, **OPTIONS)
    sampler = FisherMaskSampler(mask="all", coverage_share=share, batch_size=1)
    with pytest.raises(ValueError, match=rf"{first} outputs a sample, .*\(n, 1, positions\)"):
        sampler(net.initialize(), tokens, 3)


def test_another_ignore_index() -> None:
    y = TOKENS % 3
    y[:, 5] = 7
    sampler = FisherMaskSampler(tagger(criterion__ignore_index=7), random_state=0).fit(TOKENS, y)
    assert sampler.classes_.tolist() == [0, 1, 2]
    assert sampler.score(TOKENS, y) == 1


@pytest.mark.parametrize(
    ("sampler", "y", "message"),
    [
        (FisherMaskSampler(), NUMBERS[:, 0], "Unknown label type: continuous"),
        (FisherMaskSampler(), LABELS, "y should be a 1d array"),
        (FisherMaskSampler(), NUMBERS[:, 0].tolist(), 'numbers: likelihood="gaussian"'),
        (FisherMaskSampler(), LABELS.tolist(), 'several labels a sample: likelihood="bernoulli"'),
        (FisherMaskSampler(likelihood="bernoulli"), LABELS[:, 0], r"y of shape \(n, n_labels\)"),
        (FisherMaskSampler(likelihood="bernoulli"), NUMBERS, "with 0 and 1"),
        (FisherMaskSampler(likelihood="gaussian"), np.full(120, np.nan), "y contains NaN"),
        (FisherMaskSampler(likelihood="bernoulli"), MISSING, "NaN, first in row 7, column 1: leav"),
        (FisherMaskSampler(multilabel()), MISSING, "y contains NaN, first in row 7, column 1"),
        (FisherMaskSampler(regressor()), MISSING, "y contains NaN, first in row 7, column 1"),
        (FisherMaskSampler(likelihood="gaussian"), MISSING, "NaN, first in row 7, column 1"),
        (FisherMaskSampler(), TAGS, r"list of labels .*\['b'\].*MultiLabelBinarizer.*bernoulli"),
        (FisherMaskSampler(), [{*tags} for tags in TAGS], "y has a set of labels"),
        (FisherMaskSampler(likelihood="bernoulli"), TAGS, "y has a list of labels"),
        (FisherMaskSampler(tagger()), np.array(TAGS, dtype=object), "y has a list of labels"),
        (FisherMaskSampler(likelihood="gaussian"), np.full(120, "a"), "found names such as 'a'"),
        (FisherMaskSampler(likelihood="bernoulli"), ["a"] * 120, "found names such as 'a'"),
        (LOGISTIC, NUMBERS[:, 0], "'gaussian' is for numbers, but LogisticRegression is for class"),
        (
            FisherMaskSampler(make_pipeline(StandardScaler(), LogisticRegression()), **BERNOULLI),
            LABELS,
            "'bernoulli' is for several labels a sample, but LogisticRegression is for classes",
        ),
        (
            FisherMaskSampler(tagger(), likelihood="gaussian"),
            LABELS[:, 0],
            "'gaussian' is for numbers, but CrossEntropyLoss is for classes.* criterion MSELoss",
        ),
        (
            FisherMaskSampler(regressor(3), **BERNOULLI),
            LABELS,
            "several labels a sample, but MSELoss is for numbers",
        ),
        (FisherMaskSampler(regressor()), np.full(120, "a"), "MSELoss is for numbers.*'a'"),
        (FisherMaskSampler(multilabel()), LABELS[:, 0], "BCEWithLogitsLoss is for several labels"),
        (
            FisherMaskSampler(tagger()),
            NUMBERS,
            "CrossEntropyLoss is for classes, but y has continuous",
        ),
    ],
)
def test_labels_of_another_kind(sampler: FisherMaskSampler, y: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sampler.fit(X, y)
    assert not hasattr(sampler, "estimator_")


@pytest.mark.parametrize("columns", [0, slice(2)])
def test_a_score_of_other_labels(columns: Any) -> None:
    tokens = tagger(max_epochs=1)
    for sampler, samples, y in (
        (FisherMaskSampler(**BERNOULLI), X, LABELS),
        (FisherMaskSampler(tokens), TOKENS, TOKENS % 3),
    ):
        fitted = sampler.fit(samples, y)
        with pytest.raises(ValueError, match=r"Expected y of shape \(120, .*, got shape \(120,"):
            fitted.score(samples, y[:, columns])


def test_a_network_with_another_number_of_outputs() -> None:
    # PyTorch would broadcast, with a warning.
    with pytest.raises(ValueError, match=r"the network has outputs of another shape.*\[120, 2\]"):
        FisherMaskSampler(regressor(1)).fit(X, NUMBERS)


def test_a_criterion_of_another_kind() -> None:
    sampler = FisherMaskSampler(regressor(criterion=nn.CrossEntropyLoss))
    with pytest.raises(TypeError, match="is a regressor, but its criterion CrossEntropyLoss"):
        sampler.fit(X, NUMBERS)


def test_a_query_chooses_what_the_dense_oracle_chooses() -> None:
    net = regressor().fit(X[:30], NUMBERS[:30])
    pool, labeled = torch.as_tensor(X[30:]), torch.as_tensor(X[:30])
    sampler = FisherMaskSampler(mask="all", **PUBLISHED, likelihood=Gaussian(0.5), random_state=0)
    indices, gains = sampler(net, X[30:], 6, X_labeled=X[:30])
    options = {"likelihood": Gaussian(0.5), "dtype": torch.float64}
    V = fisher_embedding(net.module_, [pool], sampler.mask_, **options)
    L = fisher_embedding(net.module_, [labeled], sampler.mask_, **options)
    expected, expected_gains = oracles.select_batch_oracle(
        V, 6, fisher_matrix(torch.cat([V, L])), fisher_labeled=fisher_matrix(L), n_labeled=30
    )
    assert indices.tolist() == expected
    np.testing.assert_allclose(gains, expected_gains, rtol=1e-4)


def test_the_variance_is_that_of_the_residuals() -> None:
    y = NUMBERS + RNG.normal(size=NUMBERS.shape).astype("float32")
    net = regressor().fit(X[:30], y[:30])
    learner = ActiveLearner(regressor(), X_training=X[:30], y_training=y[:30])
    fitted = FisherMaskSampler(regressor(), mask="all", **PUBLISHED, random_state=0)
    fitted.fit(X[:30], y[:30])
    for classifier in (learner, fitted):
        inner = fitted.estimator_ if classifier is fitted else learner.estimator
        variance = float(np.mean((inner.predict(X[:30]) - y[:30]) ** 2))
        sampler = FisherMaskSampler(mask="all", **PUBLISHED, random_state=0)
        explicit = FisherMaskSampler(
            mask="all", **PUBLISHED, random_state=0, likelihood=Gaussian(variance)
        )
        _, gains = explicit(inner, X[30:], 3, X_labeled=X[:30])
        _, found = sampler(classifier, X[30:], 3, X_labeled=X[:30])
        np.testing.assert_allclose(found, gains, rtol=1e-6)
    # Without labels it is one.
    one = FisherMaskSampler(mask="all", **PUBLISHED, likelihood=Gaussian(1.0))
    _, gains = one(net, X[30:], 3)
    _, found = FisherMaskSampler(mask="all", **PUBLISHED)(net, X[30:], 3)
    np.testing.assert_allclose(found, gains, rtol=1e-6)


@pytest.mark.parametrize("n_targets", [1, 2])
def test_a_modal_learner_of_numbers(n_targets: int) -> None:
    y = NUMBERS[:, :n_targets]
    learner = ActiveLearner(
        regressor(n_targets),
        FisherMaskSampler(random_state=0),
        X_training=X[:20],
        y_training=y[:20],
    )
    assert is_regressor(learner)
    before = learner.score(X, y)
    indices, instances = learner.query(X[20:], n_instances=10)
    learner.teach(instances, y[20:][indices])
    assert learner.y_training.shape == (30, n_targets)
    assert learner.score(X, y) > before
    assert learner.predict(X).shape == (120, n_targets)


def test_a_modal_learner_of_several_labels() -> None:
    y = LABELS.astype("float32")
    y[::2, 1] = np.nan
    learner = ActiveLearner(
        multilabel(MaskedBCE),
        FisherMaskSampler(random_state=0),
        X_training=X[:20],
        y_training=y[:20],
    )
    indices, instances = learner.query(X[20:], n_instances=10)
    learner.teach(instances, y[20:][indices])
    assert learner.y_training.shape == (30, 3)
    whole = ActiveLearner(FisherMaskSampler(multilabel(MaskedBCE)), X_training=X, y_training=y)
    assert whole.predict(X).shape == (120, 3)


@pytest.mark.parametrize(
    ("estimator", "y", "message"),
    [
        (regressor(), np.full(120, "a"), "MSELoss is for numbers"),
        (tagger(), NUMBERS[:, 0], "CrossEntropyLoss is for classes"),
        (multilabel(), LABELS[:, 0], "BCEWithLogitsLoss is for several labels"),
        (make_pipeline(StandardScaler(), multilabel()), LABELS[:, 0], "is for several labels"),
        (multilabel(), MISSING, "y contains NaN, first in row 7, column 1"),
        (regressor(3), MISSING, "y contains NaN, first in row 7, column 1"),
        (tagger(), TAGS, "y has a list of labels"),
        (LogisticRegression(), TAGS, "y has a list of labels"),
    ],
)
def test_labels_of_another_kind_in_a_learner_and_a_curve(
    estimator: Any, y: np.ndarray, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ActiveLearner(estimator, X_training=X, y_training=y)
    with pytest.raises(ValueError, match=message):
        active_learning_curve(
            estimator, X, y, query_strategy="random", n_initial=9, n_instances=1, n_queries=1
        )


@pytest.mark.parametrize("n_targets", [0, 2])
def test_a_learning_curve_of_numbers(n_targets: int) -> None:
    y = NUMBERS if n_targets else NUMBERS[:, 0]
    torch.manual_seed(0)
    net = NeuralNetRegressor(
        nn.Linear, module__in_features=4, module__out_features=max(1, n_targets), **OPTIONS
    )
    estimator = net if n_targets else FisherMaskSampler(net)
    result = active_learning_curve(
        estimator,
        X,
        y,
        query_strategy=FisherMaskSampler(random_state=0),
        n_initial=8,
        n_instances=8,
        n_queries=2,
        cv=3,
        scoring=["r2", "neg_mean_absolute_error"],
        random_state=0,
        return_indices=True,
    )
    assert result["test_r2"].shape == result["test_neg_mean_absolute_error"].shape == (3, 3)
    assert result["test_r2"][:, -1].mean() > result["test_r2"][:, 0].mean()
    assert len(np.unique(result["indices"][0])) == 24
