"""What is wrong is said at once, in words, by an error of a kind that scikit-learn's users know."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.ensemble import RandomForestClassifier
from sklearn.exceptions import NotFittedError
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils._param_validation import InvalidParameterError
from skorch import NeuralNetClassifier, NeuralNetRegressor
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from skfishermask import FisherMaskSampler, fisher_mask_sampling
from tests import nets

X, Y = nets.digits()
X_LABELED, Y_LABELED, X_POOL = X[:60], Y[:60], X[60:100]


class Counting(nn.Module):
    """Counts the samples that go through it."""

    n_samples = 0

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nets.mlp()

    def forward(self, X: Tensor) -> Tensor:
        type(self).n_samples += len(X)
        return self.mlp(X)


def net(**more: Any) -> NeuralNetClassifier:
    options = {"module": Counting, "criterion": nn.CrossEntropyLoss, "max_epochs": 2} | more
    return NeuralNetClassifier(**nets.options(**options))


def pipeline() -> Any:
    return make_pipeline(StandardScaler(), net())


FITTED = FisherMaskSampler(net(), mask_fraction=140, random_state=0).fit(X_LABELED, Y_LABELED)
NET = FITTED.estimator_


def bad(value: float, row: int, column: int = 3) -> np.ndarray:
    pool = X_POOL.copy()
    pool[row, column] = value
    return pool


def ask(pool: Any = X_POOL, n_instances: Any = 3, classifier: Any = NET, **more: Any) -> Any:
    labeled = more.pop("X_labeled", None)
    return lambda: FisherMaskSampler(**more)(classifier, pool, n_instances, X_labeled=labeled)


def query(pool: Any = X_POOL, n_instances: Any = 3, **more: Any) -> Any:
    return lambda: FITTED.query(pool, n_instances, **more)


def fit(X: Any, y: Any, estimator: Any = None) -> Any:
    return lambda: FisherMaskSampler(estimator or net()).fit(X, y)


def first(pool: Any = X_POOL, **more: Any) -> Any:
    return lambda: FisherMaskSampler().query(pool, 3, **more)


TOWNS = pd.DataFrame({"age": np.arange(10.0), "town": ["York", "Bath"] * 5})
NAN, INF = float("nan"), float("inf")
LOADER = DataLoader(TensorDataset(torch.tensor(X_POOL)), batch_size=8)
NOT_FITTED = "not (fitted|initialized)"

# What is called, the error, and the words in it that help.
TABLE = {
    "net not fitted": (ask(classifier=net()), NotFittedError, NOT_FITTED),
    "pipeline not fitted": (ask(classifier=pipeline()), NotFittedError, NOT_FITTED),
    "sampler not fitted": (ask(classifier=FisherMaskSampler(net())), NotFittedError, NOT_FITTED),
    "predict not fitted": (lambda: FisherMaskSampler().predict(X_POOL), NotFittedError, NOT_FITTED),
    "no net": (ask(classifier=RandomForestClassifier()), TypeError, "RandomForestClassifier"),
    "a module": (
        ask(classifier=nets.mlp()),
        TypeError,
        r"Sequential, a torch module: wrap it",
    ),
    "no classifier": (ask(classifier=None), TypeError, "NoneType"),
    "a regressor of classes": (
        ask(classifier=NeuralNetRegressor(nets.mlp(), criterion=nn.CrossEntropyLoss).initialize()),
        TypeError,
        "NeuralNetRegressor is a regressor, but its criterion CrossEntropyLoss is for classes",
    ),
    "a classifier of numbers": (
        ask(classifier=net(criterion=nn.MSELoss).initialize()),
        TypeError,
        "NeuralNetClassifier is a classifier, but its criterion MSELoss is for numbers",
    ),
    "a loss without a likelihood": (
        ask(classifier=net(criterion=nn.MultiLabelMarginLoss).initialize()),
        TypeError,
        "MultiLabelMarginLoss, of which no likelihood is known. Known are.*gaussian: MSELoss",
    ),
    "empty pool": (ask(X_POOL[:0]), ValueError, "at least one sample"),
    "empty pool of a sampler": (query(X_POOL[:0]), ValueError, "0 sample"),
    "empty list": (ask([]), ValueError, "empty"),
    "empty dict": (query({}), ValueError, "empty"),
    "no instances": (query(n_instances=0), ValueError, "between 1 and the 40 .* got 0"),
    "fewer than none": (query(n_instances=-2), ValueError, "between 1 and the 40 .* got -2"),
    "more than all": (query(n_instances=41), ValueError, "between 1 and the 40 .* got 41"),
    "a share": (query(n_instances=0.5), ValueError, "must be an int, got 0.5"),
    "NaN in the pool": (ask(bad(NAN, 17)), ValueError, "X_pool contains NaN .* row 17"),
    "NaN in a sampler's pool": (query(bad(NAN, 17)), ValueError, "X contains NaN .* row 17"),
    "infinity": (ask(bad(-INF, 5)), ValueError, "X_pool contains .*infinity.* row 5"),
    "NaN in a tensor": (ask(torch.tensor(bad(NAN, 9))), ValueError, "row 9"),
    "NaN in a list": (ask(list(bad(NAN, 9))), ValueError, "row 9"),
    "NaN in a dict": (ask({"X": bad(NAN, 9)}), ValueError, r"X_pool\['X'\] .* row 9"),
    "NaN in a frame": (query(pd.DataFrame(bad(NAN, 9))), ValueError, "row 9"),
    "NaN in labelled samples": (ask(X_labeled=bad(NAN, 9)), ValueError, "X_labeled .* row 9"),
    "feature count": (
        query(X_POOL[:, :63]),
        ValueError,
        "X has 63 features, but FisherMaskSampler is expecting 64 features",
    ),
    "feature count of a net": (ask(X_POOL[:, :63]), ValueError, r"float32 of shape \(1, 63\)"),
    "one sample alone": (query(X_POOL[0]), ValueError, "1D array"),
    "one number": (query(3.0), ValueError, "single value: 3.0"),
    "shape": (query(X_POOL[:, :, None]), ValueError, r"shape \(64, 1\), but .* expecting"),
    "labelled shape": (ask(X_labeled=X_POOL[:, :9]), ValueError, r"shape \(64,\), but .*\(9,\)"),
    "integers": (ask(X_POOL.astype("int64")), ValueError, r"int64 of shape \(1, 64\)"),
    "labelled integers": (ask(X_labeled=X_POOL.astype("int64")), ValueError, "int64 of shape"),
    "text": (query(np.full((3, 64), "a")), ValueError, "numeric|string"),
    "sparse": (query(sp.csr_array(X_POOL)), TypeError, "[Ss]parse"),
    "other inputs": (
        ask({"a": X_POOL, "b": X_POOL}),
        ValueError,
        r"\{'a': float32 of shape \(1, 64\), 'b': float32 of shape \(1, 64\)\}, and PyTorch says",
    ),
    "no data": (ask(None), TypeError, "found NoneType"),
    "one class": (fit(X_LABELED, np.zeros(60)), ValueError, "at least 2 classes in y, found 1"),
    "no labels": (fit(X_LABELED, None), ValueError, "requires y"),
    "NaN among labels": (fit(X_LABELED, np.r_[NAN, Y[1:60]]), ValueError, "y contains NaN"),
    "continuous labels": (fit(X_LABELED, np.linspace(0, 1, 60)), ValueError, "continuous"),
    "several labels": (fit(X_LABELED, np.zeros((60, 2))), ValueError, "1d array"),
    "too few labels": (fit(X_LABELED, Y[:59]), ValueError, r"\[60, 59\]"),
    "NaN to fit": (fit(bad(NAN, 4), Y[:40]), ValueError, "X contains NaN .* row 4"),
    "NaN in a sampler's labelled samples": (
        query(X_labeled=bad(NAN, 9)),
        ValueError,
        "X contains NaN .* row 9.*\nX is X_labeled here",
    ),
    "NaN in labelled samples of a first batch": (
        first(X_labeled=bad(NAN, 9)),
        ValueError,
        "Input X_labeled contains NaN .* row 9",
    ),
    "labelled features of a first batch": (
        first(X_labeled=X_POOL[:3, :9]),
        ValueError,
        "in X_labeled, of 64 numbers each, found 9",
    ),
    "row numbers": (query(X_labeled=np.array([1, 2])), ValueError, r"in X_labeled, found.*X\[rows"),
    "row numbers to a first batch": (
        first(X_labeled=np.array([1, 2])),
        ValueError,
        r"found integers of shape \(2,\). If these are rows of an array X, give X\[rows\]",
    ),
    "a table of a first batch": (first(TOWNS), ValueError, "X_pool, found column 'town' of .*Col"),
    "a table": (
        lambda: FisherMaskSampler().fit(TOWNS, [0, 1] * 5),
        ValueError,
        r"X, found column 'town' of .*'York'.*make_pipeline\(ColumnTransformer",
    ),
    "a table of a net": (fit(TOWNS, [0, 1] * 5), ValueError, "X, found column 'town'"),
    "numbers as text": (
        first(X_POOL.astype(str)),
        ValueError,
        r'strings such as \'0.0\'. .*X.astype\("float32"\)',
    ),
    "numbers as text to fit": (fit(X_POOL.astype(str), Y[:40]), ValueError, r"X.astype\("),
    "lists of several lengths": (
        lambda: FisherMaskSampler().fit([[1.0], [1.0, 2.0]], [0, 1]),
        ValueError,
        "elements of a list must be numbers or arrays of one shape.*dataset= of the net's own",
    ),
    "mask": (ask(mask="best"), InvalidParameterError, "'mask' parameter"),
    "mask_fraction": (ask(mask_fraction=0.0), InvalidParameterError, "'mask_fraction'"),
    "n_mask_samples": (ask(n_mask_samples=0), InvalidParameterError, "'n_mask_samples'"),
    "n_directions": (ask(n_directions=1.5), InvalidParameterError, "'n_directions'"),
    "target": (ask(target=None), InvalidParameterError, "'target'"),
    "use_labeled": (ask(use_labeled="yes"), InvalidParameterError, "'use_labeled'"),
    "regularization": (ask(regularization=-1.0), InvalidParameterError, "'regularization'"),
    "oversample": (ask(oversample=0.9), InvalidParameterError, "'oversample'"),
    "coverage_share": (ask(coverage_share="all"), InvalidParameterError, "'coverage_share'"),
    "max_candidates": (ask(max_candidates=0), InvalidParameterError, "'max_candidates'"),
    "batch_size": (ask(batch_size=0), InvalidParameterError, "'batch_size'"),
    "to_logits": (ask(to_logits="logits"), InvalidParameterError, "'to_logits'"),
    "embedding_dtype": (ask(embedding_dtype="int8"), InvalidParameterError, "'embedding_dty"),
    "random_state": (ask(random_state=-1), InvalidParameterError, "'random_state'"),
    "verbose": (ask(verbose="loud"), InvalidParameterError, "'verbose'"),
    "estimator": (fit(X_LABELED, Y_LABELED, "net"), InvalidParameterError, "'estimator'"),
    "a module to fit": (
        fit(X_LABELED, Y_LABELED, nets.mlp()),
        TypeError,
        r"Sequential, a torch module: wrap it",
    ),
    "NaN in a tuple": (ask((X_POOL, bad(NAN, 9))), ValueError, r"X_pool\[1\] .* row 9"),
    "several inputs for one": (
        ask((X_POOL, X_POOL)),
        ValueError,
        r"\[float32 of shape \(1, 64\), float32 of shape \(1, 64\)\], and PyTorch says",
    ),
    "uneven inputs": (ask((X_POOL, X_POOL[:9])), ValueError, r"numbers of samples: \[40, 9\]"),
    "a loader": (ask(LOADER), TypeError, r"X_pool.*found DataLoader.*its dataset"),
    "a sampler's loader": (query(LOADER), TypeError, r"X_pool.*found DataLoader.*its dataset"),
    "a labelled loader": (query(X_labeled=LOADER), TypeError, r"X_labeled.*found DataLoader"),
    "a loader to fit": (fit(LOADER, Y_LABELED), TypeError, r"X, found DataLoader.*its dataset"),
    "no such parameter": (
        lambda: fisher_mask_sampling(NET, X_POOL, 3, masks="global"),
        TypeError,
        "masks",
    ),
}


def state() -> list[Any]:
    modules = list(NET.module_.modules())
    return [
        [m.training for m in modules],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules],
        [(p.requires_grad, p.grad, p.tolist()) for p in NET.module_.parameters()],
        torch.get_rng_state().tolist(),
    ]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("call", "kind", "words"), TABLE.values(), ids=TABLE)
def test_said_before_any_work(call: Any, kind: type, words: str, training: bool) -> None:
    NET.module_.train(training)
    before = state()
    Counting.n_samples = 0
    with pytest.raises(kind, match=words):
        call()
    assert Counting.n_samples <= 2  # The first of the pool and the first labelled one.
    assert state() == before


class Breaking(nn.Module):
    """Gives NaN where the first number of a sample is 100."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nets.mlp()

    def forward(self, X: Tensor) -> Tensor:
        return torch.where(X[:, :1] == 100, float("nan"), 1.0) * self.mlp(X)


@pytest.mark.parametrize("estimator", [Breaking, nets.mlp])
@pytest.mark.parametrize("method", ["query", "predict", "predict_proba"])
def test_output_that_is_not_finite(method: str, estimator: Any) -> None:
    fitted = FisherMaskSampler(net(module=Breaking), mask_fraction=140, random_state=0)
    fitted.fit(X_LABELED, Y_LABELED)
    row = 23
    if estimator is nets.mlp:  # As after a training that diverged.
        torch.nn.init.constant_(fitted.estimator_.module_.mlp[0].weight, float("nan"))
        row = 0
    with pytest.raises(ValueError, match=rf"not finite.*\b{row}\b|NaN.*\b{row}\b"):
        getattr(fitted, method)(bad(100.0, 23, 0))


# -- other arguments -------------------------------------------------------------------------------


class Endless(IterableDataset):
    def __iter__(self) -> Any:
        while True:
            yield X[0]


class Mute(Dataset):
    """A Dataset without length."""

    def __getitem__(self, i: int) -> Any:
        return X[i]


def not_finite(value: float, position: tuple[int, int], make: Any) -> Any:
    return make(bad(value, *position))


MAKES = [np.asarray, torch.tensor, list, pd.DataFrame, lambda A: A.tolist()]
ARRAYS = st.one_of(
    # No side is 64.
    hnp.arrays(
        st.sampled_from(["float32", "float64", "int64", "bool"]),
        hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4),
        elements=st.sampled_from([0, 1]),
    ),
    st.builds(
        np.full,
        st.sampled_from([(3, 64), (1, 64), (40, 64)]),
        st.sampled_from(["a", b"a", 1j, object(), np.datetime64("2020-01-01"), None]),
    ),
)
NOT_FINITE = st.builds(
    not_finite,
    st.sampled_from([NAN, INF, -INF]),
    st.tuples(st.integers(0, 39), st.integers(0, 63)),
    st.sampled_from(MAKES),
)
LEAVES = st.none() | st.booleans() | st.floats() | st.text(max_size=3) | st.complex_numbers()
NESTED = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3), max_leaves=8)
OTHERS = st.sampled_from(
    [
        {},
        {"a": X_POOL},
        {1: X_POOL[:2]},
        {"X": X_POOL[:, :3]},
        {"X": None},
        {"X": "text"},
        {"X": 3},
        {"X": [[1.0], [1.0, 2.0]]},
        {"X": X_POOL, "Y": X_POOL[:2]},
        set(),
        {1, 2},
        range(3),
        b"bytes",
        object(),
        object,
        len,
        (i for i in range(3)),
        torch.zeros(3, 5),
        torch.zeros(()),
        torch.zeros(0, 64),
        torch.zeros(3, 64, dtype=torch.complex64),
        torch.zeros(3, 64, dtype=torch.bool),
        [torch.zeros(64), torch.zeros(3)],
        [torch.zeros(64), 1],
        [X_POOL[0], X_POOL[1][:5]],
        sp.csr_array(X_POOL),
        sp.csr_matrix((0, 64)),
        pd.DataFrame({"a": ["x", "y"]}),
        pd.DataFrame(),
        pd.Series([1.0, 2.0]),
        Endless(),
        Mute(),
        TensorDataset(torch.zeros(3, 5)),
        TensorDataset(torch.zeros(0, 64)),
        net(),
        nn.Linear(2, 2),
    ]
)
BAD = st.one_of(ARRAYS, NOT_FINITE, NESTED, OTHERS)
BAD_LABELS = st.one_of(
    st.none() | st.text(max_size=3) | st.integers() | NESTED,
    st.integers(0, 59).map(lambda n: Y[:n]),
    st.sampled_from(
        [
            np.zeros(60),
            np.linspace(0, 1, 60),
            np.full(60, NAN),
            np.r_[INF, Y[1:60]],
            Y[:60, None] * np.ones(2),
            np.array([None, *Y[1:60]], dtype=object),
            np.array(["a", *Y[1:60]], dtype=object),
            np.full(60, 1j),
            Y[:120],
            {"y": Y[:60]},
            object(),
            np.arange(60),
            sp.csr_array(Y[:60, None]),
        ]
    ),
)
CALLS = {
    "query": lambda data: FITTED.query(data, 1),
    "query, labelled": lambda data: FITTED.query(X_POOL, 1, X_labeled=data),
    "strategy": lambda data: FisherMaskSampler()(NET, data, 1),
    "strategy, labelled": lambda data: FisherMaskSampler()(NET, X_POOL, 1, X_labeled=data),
    "predict": FITTED.predict,
    "predict_proba": FITTED.predict_proba,
    "fit": lambda data: FisherMaskSampler(net()).fit(data, Y[: length(data)]),
    "score": lambda data: FITTED.score(data, Y[: length(data)]),
}


def length(data: Any) -> int:
    try:
        return len(data)
    except TypeError:
        return 40


def is_empty(data: Any) -> bool:
    if isinstance(data, list | TensorDataset):
        return len(data) == 0
    return getattr(data, "shape", ())[:1] == (0,)


def assert_refused(call: Any, *args: Any) -> None:
    with pytest.raises((ValueError, TypeError)) as caught:
        call(*args)
    assert str(caught.value).strip()
    last = Path(traceback.extract_tb(caught.value.__traceback__)[-1].filename)
    # Said by us or by scikit-learn and what it uses, not from the depths of the network.
    assert not {"torch", "skorch"} & set(last.parts), last


BAD_COUNTS = st.one_of(
    st.integers(max_value=0),
    st.integers(min_value=41),
    st.floats(),
    NESTED.filter(lambda n: n is not None),
    st.sampled_from([None, True, np.float64(3), np.array([3]), object(), "3", [3]]),
)
EXAMPLES = pytest.mark.parametrize("n_examples", [20, pytest.param(200, marks=pytest.mark.slow)])


def check(strategy: Any, refused: Any, n_examples: int) -> None:
    settings(max_examples=n_examples)(given(strategy)(refused))()


@EXAMPLES
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CALLS)
def test_bad_data_are_refused(name: str, n_examples: int) -> None:
    def refused(data: Any) -> None:
        if name.endswith("labelled"):  # No labelled samples are none.
            assume(data is not None and not is_empty(data))
        if name.startswith("strategy"):  # Nets take sparse matrices.
            assume(not (sp.issparse(data) and data.shape == X_POOL.shape))
        assert_refused(CALLS[name], data)

    check(BAD, refused, n_examples)


@EXAMPLES
@pytest.mark.filterwarnings("ignore")
def test_bad_labels_are_refused(n_examples: int) -> None:
    def refused(y: Any) -> None:
        assert_refused(lambda: FisherMaskSampler(net()).fit(X_LABELED, y))

    check(BAD_LABELS, refused, n_examples)


@EXAMPLES
def test_bad_counts_are_refused(n_examples: int) -> None:
    def refused(n_instances: Any) -> None:
        assert_refused(FITTED.query, X_POOL, n_instances)

    check(BAD_COUNTS, refused, n_examples)
