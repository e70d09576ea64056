"""Faults of modAL 0.4.2.1 in pairs: modAL's own class shows the fault, ours does not.

The first half of a pair fails when modAL or its surroundings change, and tells us what may go.
"""

import builtins
import importlib
import sys

import numpy as np
import pytest
import scipy.sparse as sp
import sklearn
import torch
from sklearn.base import clone, is_classifier, is_regressor
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.naive_bayes import GaussianNB
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils import get_tags
from sklearn.utils.validation import check_is_fitted
from skorch import NeuralNetClassifier
from torch import nn
from torch.utils.data import Subset, TensorDataset

pd = pytest.importorskip("pandas", reason="modAL imports pandas")
modal_models = pytest.importorskip("modAL.models", reason="modAL is not installed")

from modAL.disagreement import consensus_entropy_sampling  # noqa: E402
from modAL.uncertainty import entropy_sampling, uncertainty_sampling  # noqa: E402

from skfishermask.modal import ActiveLearner  # noqa: E402

ModALActiveLearner = modal_models.ActiveLearner
SKLEARN = tuple(int(part) for part in sklearn.__version__.split(".")[:2])

rng = np.random.default_rng(0)
X = rng.normal(size=(40, 3))
y = np.where(X[:, 0] > 0, "yes", "no")
X0, y0, X_POOL = X[:12], y[:12], X[12:]


class Counting:
    """A strategy that counts its calls and answers what `answer` makes of n_instances."""

    def __init__(self, answer):
        self.answer = answer
        self.n_calls = 0

    def __call__(self, learner, X_pool, n_instances=1):
        self.n_calls += 1
        return self.answer(n_instances)


class Recorder(GaussianNB):
    """Remembers what it was fitted on; the data themselves are of no matter."""

    def fit(self, X, y, **fit_kwargs):
        self.seen_ = X, y, fit_kwargs
        return self


def descending(n):
    return np.arange(n)[::-1] + 2


def pair(n):
    return descending(n), np.full(n, 0.5)


def make_net():
    torch.manual_seed(0)
    return NeuralNetClassifier(
        nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)),
        criterion=nn.CrossEntropyLoss,
        max_epochs=3,
        lr=0.1,
        verbose=0,
    )


# -- scikit-learn 1.8 took force_all_finite away -------------------------------------------------

TRAINING_CALLS = {
    "fit": lambda learner: learner.fit(X0, y0),
    "teach": lambda learner: learner.teach(X0, y0),
    "teach only new": lambda learner: learner.teach(X0, y0, only_new=True),
}


@pytest.mark.skipif(SKLEARN < (1, 8), reason="scikit-learn still knew the keyword")
@pytest.mark.parametrize("call", TRAINING_CALLS.values(), ids=TRAINING_CALLS)
def test_modal_cannot_train(call):
    with pytest.raises(TypeError, match="force_all_finite"):
        call(ModALActiveLearner(GaussianNB()))


@pytest.mark.parametrize("call", TRAINING_CALLS.values(), ids=TRAINING_CALLS)
def test_trains(call):
    learner = ActiveLearner(GaussianNB())
    call(learner)
    expected = GaussianNB().fit(X0, y0)
    np.testing.assert_array_equal(learner.predict_proba(X), expected.predict_proba(X))


def test_teach_adds_and_only_new_does_not():
    learner = ActiveLearner(Recorder(), X_training=X0, y_training=y0)
    learner.teach(X[12:15], y[12:15])
    np.testing.assert_array_equal(learner.X_training, X[:15])
    np.testing.assert_array_equal(learner.estimator.seen_[1], y[:15])
    learner.teach(X[15:17], y[15:17], only_new=True, epochs=2)
    assert learner.estimator.seen_[0].shape == (2, 3)
    assert learner.estimator.seen_[2] == {"epochs": 2}
    assert len(learner.X_training) == 15


BAD_X = X0.copy()
BAD_X[4, 1] = np.nan


@pytest.mark.parametrize(
    "bad",
    [
        BAD_X,
        BAD_X.reshape(12, 1, 3, 1),
        BAD_X.tolist(),
        [*BAD_X, np.zeros(2)][1:],  # ragged
        torch.tensor(BAD_X),
        torch.tensor(BAD_X, dtype=torch.bfloat16),
        [torch.tensor(row, requires_grad=True) for row in BAD_X],
        sp.csr_array(BAD_X),
        pd.DataFrame(BAD_X),
        {"a": X0, "b": BAD_X},
    ],
    ids=lambda bad: type(bad).__name__,
)
def test_force_all_finite(bad):
    learner = ActiveLearner(Recorder())
    for call in (learner.fit, learner.teach):
        with pytest.raises(ValueError, match=r"Input X.* contains NaN"):
            call(bad, y0)
    assert learner.X_training is None
    assert ActiveLearner(Recorder(), force_all_finite=False).fit(bad, y0).X_training is bad


def test_first_bad_row_of_a_tensor_is_named():
    with pytest.raises(ValueError, match="row 4"):
        ActiveLearner(Recorder()).fit(torch.tensor(BAD_X), y0)


@pytest.mark.parametrize(
    ("samples", "labels", "message"),
    [
        (X0, y0[:5], r"inconsistent numbers of samples: \[12, 5\]"),
        ({"a": X0, "b": X0[:7]}, y0, r"\[12, 7, 12\]"),
        (X0, None, "y is None"),
        (X0, np.full(12, np.nan), "Input y contains NaN"),
    ],
)
def test_impossible_training_data(samples, labels, message):
    learner = ActiveLearner(Recorder(), X_training=X0, y_training=y0, force_all_finite=False)
    for call in (learner.fit, learner.teach):
        with pytest.raises(ValueError, match=message):
            call(samples, labels)
    assert len(learner.X_training) == len(learner.y_training) == 12


def test_a_failed_teach_leaves_samples_and_labels_in_step():
    learner = ActiveLearner(Recorder(), X_training=X0, y_training=y0)
    with pytest.raises(ValueError, match="dimension"):
        learner.teach(X[12:14], np.zeros((2, 2)))
    assert len(learner.X_training) == len(learner.y_training) == 12


# -- one call of the strategy, and its errors ----------------------------------------------------


def failing(n):
    raise LookupError(f"cannot choose {n}")


def test_modal_calls_a_failing_strategy_twice():
    strategy = Counting(failing)
    with pytest.raises(LookupError):
        ModALActiveLearner(GaussianNB(), strategy).query(X_POOL, n_instances=3)
    assert strategy.n_calls == 2


def test_an_exception_of_the_strategy_passes_unchanged():
    strategy = Counting(failing)
    with pytest.raises(LookupError, match="cannot choose 3") as caught:
        ActiveLearner(GaussianNB(), strategy).query(X_POOL, n_instances=3)
    assert strategy.n_calls == 1
    assert caught.value.__context__ is None


def test_modal_swallows_an_error_of_the_first_call():
    answers = iter([failing, descending])
    strategy = Counting(lambda n: next(answers)(n))
    indices, _ = ModALActiveLearner(GaussianNB(), strategy).query(X_POOL, n_instances=3)
    assert indices.tolist() == [4, 3, 2]
    assert strategy.n_calls == 2


def test_modal_takes_two_indices_for_indices_and_metrics():
    indices, _ = ModALActiveLearner(GaussianNB(), Counting(descending)).query(X_POOL, n_instances=2)
    assert np.ndim(indices) == 0


def test_modal_calls_twice_for_bare_indices():
    strategy = Counting(descending)
    ModALActiveLearner(GaussianNB(), strategy).query(X_POOL, n_instances=3)
    assert strategy.n_calls == 2


@pytest.mark.parametrize("n_instances", [1, 2, 3])
@pytest.mark.parametrize(
    ("learner_class", "answer"),
    [
        (ActiveLearner, pair),
        (ActiveLearner, descending),
        (ActiveLearner, lambda n: descending(n).tolist()),
        (ActiveLearner, lambda n: torch.tensor(descending(n).copy())),
        (ModALActiveLearner, pair),  # why FisherMaskSampler always returns the pair
    ],
    ids=["pair", "array", "list", "tensor", "modAL-pair"],
)
def test_n_instances_are_n_instances(learner_class, answer, n_instances):
    strategy = Counting(answer)
    learner = learner_class(GaussianNB(), strategy)
    indices, instances = learner.query(X_POOL, n_instances=n_instances)
    assert strategy.n_calls == 1
    assert [int(i) for i in indices] == descending(n_instances).tolist()
    np.testing.assert_array_equal(instances, X_POOL[descending(n_instances)])


def test_return_metrics():
    learner = ActiveLearner(GaussianNB(), Counting(pair))
    indices, instances, metrics = learner.query(X_POOL, n_instances=2, return_metrics=True)
    assert len(indices) == len(instances) == 2
    assert metrics.tolist() == [0.5, 0.5]


def test_return_metrics_warns_where_there_are_none():
    learner = ActiveLearner(GaussianNB(), Counting(descending))
    with pytest.warns(UserWarning, match="returned no metrics"):
        indices, instances, metrics = learner.query(X_POOL, n_instances=2, return_metrics=True)
    assert len(indices) == len(instances) == 2
    assert metrics is None


# -- rows are rows -------------------------------------------------------------------------------


def frame(values):
    """Columns and index named by integers that are no positions."""
    return pd.DataFrame(values, columns=[2, 3, 4], index=np.arange(len(values)) + 100)


def test_modal_takes_columns_of_a_dataframe():
    learner = ModALActiveLearner(GaussianNB(), Counting(pair))
    assert learner.query(frame(X_POOL), n_instances=2)[1].shape == (len(X_POOL), 2)


def test_modal_cannot_stack_dataframes():
    learner = ModALActiveLearner(Recorder())
    learner.X_training, learner.y_training = frame(X0), y0
    # Below scikit-learn 1.8 it is DataFrame.append that is missing.
    with pytest.raises((TypeError, AttributeError), match=r"force_all_finite|append"):
        learner.teach(frame(X[12:14]), y[12:14])


def to_dense(data):
    """The rows of any of the containers below, as one array."""
    if isinstance(data, dict):
        return np.hstack([to_dense(part) for part in data.values()])
    if isinstance(data, torch.utils.data.Dataset):
        return np.stack([data[i][0] for i in range(len(data))])
    return data.toarray() if sp.issparse(data) else np.asarray(data)


CONTAINERS = {
    "ndarray": lambda a: a,
    "4-d": lambda a: a[:, :, None, None],
    "list": list,
    "DataFrame": frame,
    "tensor": torch.tensor,
    "csr_array": sp.csr_array,
    "csc_matrix": sp.csc_matrix,
    "coo_array": sp.coo_array,
    "dict": lambda a: {"left": a[:, :1], "right": torch.tensor(a[:, 1:])},
    "Dataset": lambda a: TensorDataset(torch.tensor(a)),
}


@pytest.mark.parametrize("make", CONTAINERS.values(), ids=CONTAINERS)
def test_rows_are_taken_and_stacked(make):
    expected = np.concatenate([X0, X_POOL[[4, 3, 2]]])
    learner = ActiveLearner(Recorder(), Counting(pair), X_training=make(X0), y_training=y0)
    pool = make(X_POOL)
    indices, instances = learner.query(pool, n_instances=3)
    assert isinstance(instances, Subset if isinstance(pool, TensorDataset) else type(pool))
    np.testing.assert_array_equal(to_dense(instances), to_dense(make(X_POOL[[4, 3, 2]])))

    learner.teach(instances, y[12:][indices])
    np.testing.assert_array_equal(to_dense(learner.X_training), to_dense(make(expected)))
    assert learner.y_training.shape == (15,)
    assert learner.estimator.seen_[0] is learner.X_training

    # A bootstrap sample: as many rows, drawn from NumPy's global generator as modAL does.
    state = np.random.get_state()  # noqa: NPY002
    np.random.seed(3)  # noqa: NPY002
    drawn = np.random.choice(range(15), 15)  # noqa: NPY002
    np.random.seed(3)  # noqa: NPY002
    learner._fit_to_known(bootstrap=True)
    np.random.set_state(state)  # noqa: NPY002
    seen, labels, _ = learner.estimator.seen_
    np.testing.assert_array_equal(to_dense(seen), to_dense(make(expected[drawn])))
    np.testing.assert_array_equal(labels, learner.y_training[drawn])


def test_ragged_rows_are_stacked():
    rows = [np.zeros(2), np.ones(3), np.ones(4)]
    learner = ActiveLearner(Recorder(), X_training=rows[:2], y_training=y0[:2])
    learner.teach(rows[2:], y0[2:3])
    assert [len(row) for row in learner.X_training] == [2, 3, 4]


def test_sparse_format_is_kept():
    learner = ActiveLearner(Recorder(), Counting(pair), X_training=sp.csc_array(X0), y_training=y0)
    _, instances = learner.query(sp.coo_array(X_POOL), n_instances=2)
    assert instances.format == "coo"
    learner.teach(instances, y[12:14])
    assert learner.X_training.format == "csc"


@pytest.mark.parametrize(
    "labels", [list, pd.Series, torch.tensor], ids=["list", "Series", "tensor"]
)
def test_labels_are_stacked(labels):
    codes = (y == "yes").astype(int)
    learner = ActiveLearner(Recorder(), X_training=X0, y_training=labels(codes[:12]))
    learner.teach(X[12:15], labels(codes[12:15]))
    assert type(learner.y_training) is type(labels(codes))
    np.testing.assert_array_equal(np.asarray(learner.y_training), codes[:15])


@pytest.mark.parametrize("make", [frame, CONTAINERS["dict"]], ids=["DataFrame", "dict"])
def test_other_columns_are_refused(make):
    learner = ActiveLearner(Recorder(), X_training=make(X0), y_training=y0)
    other = make(X[12:14])
    other["more"] = other.pop(next(iter(other.keys())))
    for samples in (other, X[12:14]):
        with pytest.raises(ValueError, match=r"expected .* like the training data"):
            learner.teach(samples, y[12:14])


def test_a_single_index_is_one_row():
    learner = ActiveLearner(GaussianNB(), Counting(lambda n: 5))
    np.testing.assert_array_equal(learner.query(X_POOL)[1], X_POOL[5])
    np.testing.assert_array_equal(learner.query(list(X_POOL))[1], X_POOL[5])
    np.testing.assert_array_equal(learner.query(frame(X_POOL))[1], X_POOL[5])


# -- an estimator among estimators ---------------------------------------------------------------


def test_modal_has_no_parameters():
    learner = ModALActiveLearner(LogisticRegression())
    for call in (learner.get_params, learner.__repr__, lambda: clone(learner)):
        with pytest.raises(AttributeError, match="bootstrap_init"):
            call()


def test_parameters():
    learner = ActiveLearner(
        LogisticRegression(C=2.0), entropy_sampling, X0, y0, force_all_finite=False
    )
    assert learner.get_params(deep=False) == {
        "estimator": learner.estimator,
        "query_strategy": entropy_sampling,
        "bootstrap_init": False,
        "on_transformed": False,
        "force_all_finite": False,
    }
    assert learner.get_params()["estimator__C"] == 2.0
    learner.set_params(estimator__C=3.0, query_strategy=uncertainty_sampling)
    assert learner.estimator.C == 3.0
    assert learner.query_strategy is uncertainty_sampling
    with pytest.raises(ValueError, match="X_training"):
        learner.set_params(X_training=X)
    assert "LogisticRegression(C=3.0)" in repr(learner)
    assert "LogisticRegression" in learner._repr_html_()


def test_a_clone_has_no_data_and_is_not_trained():
    learner = ActiveLearner(GaussianNB(), entropy_sampling, X0, y0, bootstrap_init=True)
    copy = clone(learner)
    assert type(copy) is ActiveLearner
    assert copy.X_training is copy.y_training is None
    assert copy.bootstrap_init is True
    assert copy.query_strategy is entropy_sampling
    assert not hasattr(copy, "classes_")
    check_is_fitted(learner)
    with pytest.raises(sklearn.exceptions.NotFittedError):
        check_is_fitted(copy)


def test_it_is_what_its_estimator_is():
    assert is_classifier(ActiveLearner(GaussianNB()))
    assert is_regressor(ActiveLearner(LinearRegression()))
    for estimator in (GaussianNB(), LinearRegression()):
        tags, expected = get_tags(ActiveLearner(estimator)), get_tags(estimator)
        assert tags.classifier_tags == expected.classifier_tags
        assert tags.regressor_tags == expected.regressor_tags
    assert ActiveLearner(GaussianNB(), X_training=X0, y_training=y0).classes_.tolist() == [
        "no",
        "yes",
    ]


@pytest.mark.parametrize("scoring", [None, "roc_auc"])
def test_cross_validation(scoring):
    # Sorted by class: without stratification a fold would lack one.
    order = np.argsort(y, kind="stable")
    scores = cross_val_score(ActiveLearner(GaussianNB()), X[order], y[order], cv=2, scoring=scoring)
    expected = cross_val_score(GaussianNB(), X[order], y[order], cv=2, scoring=scoring)
    np.testing.assert_array_equal(scores, expected)


def test_in_a_grid_search_and_a_pipeline():
    search = GridSearchCV(ActiveLearner(LogisticRegression()), {"estimator__C": [1e-6, 1.0]}, cv=2)
    pipeline = make_pipeline(StandardScaler(), search).fit(X, y)
    assert pipeline[-1].best_params_ == {"estimator__C": 1.0}
    assert pipeline.score(X, y) > 0.9


def test_committee():
    learners = [
        ActiveLearner(GaussianNB(), X_training=X0, y_training=y0),
        ActiveLearner(LogisticRegression(), X_training=X0, y_training=y0),
    ]
    committee = modal_models.Committee(learners, consensus_entropy_sampling)
    indices, instances = committee.query(X_POOL, n_instances=3)
    assert len(set(indices.tolist())) == 3
    committee.teach(instances, y[12:][indices])
    assert [len(learner.X_training) for learner in learners] == [15, 15]
    assert [set(learner.predict(X)) for learner in learners] == [{"no", "yes"}] * 2


def test_skorch_net():
    X32, codes = X.astype(np.float32), (y == "yes").astype(np.int64)
    learner = ActiveLearner(make_net(), X_training=X32[:12], y_training=codes[:12])
    indices, instances = learner.query(X32[12:], n_instances=2)
    assert len(set(indices.tolist())) == 2
    learner.teach(instances, codes[12:][indices])
    assert learner.X_training.shape == (14, 3)
    assert learner.predict_proba(X32).shape == (40, 2)
    learner.set_params(estimator__lr=0.5)
    assert learner.estimator.lr == 0.5
    scores = cross_val_score(ActiveLearner(make_net(), entropy_sampling), X32, codes, cv=3)
    assert np.isfinite(scores).all()


def test_without_modal_the_import_says_what_to_do(monkeypatch):
    def no_modal(name, *args, **kwargs):
        if name.partition(".")[0] == "modAL":
            raise ModuleNotFoundError("No module named 'modAL'")
        return real_import(name, *args, **kwargs)

    real_import = builtins.__import__
    monkeypatch.delitem(sys.modules, "skfishermask.modal")
    monkeypatch.setattr(builtins, "__import__", no_modal)
    with pytest.raises(
        ImportError, match=r"pip install --no-deps modAL-python==0\.4\.2\.1"
    ) as caught:
        importlib.import_module("skfishermask.modal")
    assert "skorch==0.9.0" in str(caught.value)
