"""Every container, from fit to learning curve: right, or refused before any work, as documented."""

from __future__ import annotations

import csv
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from sklearn.base import BaseEstimator, TransformerMixin, clone
from sklearn.model_selection import ShuffleSplit
from sklearn.pipeline import make_pipeline
from skorch import NeuralNetClassifier
from skorch.helper import SliceDict
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset, TensorDataset

from skfishermask import FisherMaskSampler, active_learning_curve
from skfishermask.data import is_dask, stack_rows, take_rows
from skfishermask.modal import ActiveLearner

# The table of the user guide: it is what is tested.
TABLE = {
    row["Container"]: row
    for row in csv.DictReader(
        (Path(__file__).parents[2] / "docs/user_guide/containers.csv").open(encoding="utf-8")
    )
}


def labels(A: np.ndarray) -> np.ndarray:
    return (A[:, 0] + A[:, 1] > 0).astype("int64")


RNG = np.random.default_rng(0)
X = RNG.normal(size=(48, 4)).round(2).astype("float32")
Y = labels(X)
NUMBERS = count()
COLUMNS = ["a", "b", "c", "d"]


class Tiny(nn.Module):
    """Takes samples alone, in a list, or by name, and begins with the same weights every time."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.hidden, self.output = nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, X: Any = None, **parts: Tensor) -> Tensor:
        if parts:
            X = [parts[name] for name in sorted(parts)]
        if isinstance(X, list):
            X = torch.cat(X, dim=1)
        X = X.real if X.is_complex() else X
        return self.output(torch.relu(self.hidden(X.reshape(len(X), 4))))


def texts(A: np.ndarray) -> list[str]:
    return [" ".join(map(str, row)) for row in A.tolist()]


def to_array(data: Any) -> np.ndarray:
    """The numbers in any container: a transformer, and what tests compare."""
    if sp.issparse(data):
        return data.toarray()
    if isinstance(data, dict):
        return np.hstack([np.asarray(data[name], "float32") for name in sorted(data)])
    if isinstance(data, tuple) and not isinstance(data[0], str):
        return np.hstack(data)
    if isinstance(data, Dataset):
        return np.stack([data[i][0] for i in range(len(data))])
    if isinstance(data, Tensor):
        data = data.detach()
    if hasattr(data, "with_format"):  # of Hugging Face
        return np.stack([np.asarray(data[name], "float32") for name in data.column_names], axis=1)
    array = np.asarray(data)
    if array.ndim == 1:
        return np.array([row.split() for row in array.tolist()], dtype="float32")
    return array.real.astype("float32").reshape(len(array), 4)


def named(make: Callable[[dict[str, np.ndarray]], Any]) -> Callable[[np.ndarray], Any]:
    return lambda A: make({name: A[:, j] for j, name in enumerate(COLUMNS)})


def library(name: str) -> Any:
    return pytest.importorskip(name)


def in_hdf5(A: np.ndarray) -> Any:
    name = f"file {next(NUMBERS)}"  # in memory
    file = library("h5py").File(name, "w", driver="core", backing_store=False)
    return file.create_dataset("x", data=A)


def in_zarr(A: np.ndarray) -> Any:
    return library("zarr").array(A)


def mapped(A: np.ndarray) -> np.ndarray:
    import tempfile

    with tempfile.NamedTemporaryFile() as file:
        array = np.memmap(file, A.dtype, "w+", shape=A.shape)
    array[:] = A
    return array


# Row of the table -> ways to make such a container.
CASES: dict[str, list[Callable[[np.ndarray], Any]]] = {
    "NumPy array": [
        np.asfortranarray,
        lambda A: A[::-1].copy()[::-1],
        lambda A: A.reshape(-1, 2, 2),
        lambda A: A.astype("complex64"),
        lambda A: np.frombuffer(A.tobytes(), "float32").reshape(A.shape),
    ],
    "NumPy array of another byte order, or reversed": [
        lambda A: A.astype(">f4"),
        lambda A: A[:, ::-1].copy()[:, ::-1],
    ],
    "memory map": [mapped],
    "memory map of another byte order, or reversed": [
        lambda A: mapped(A.astype(">f4")),
        lambda A: mapped(A[:, ::-1])[:, ::-1],
    ],
    "HDF5 array": [in_hdf5],
    "HDF5 array of another byte order": [lambda A: in_hdf5(A.astype(">f4"))],
    "zarr array": [in_zarr],
    ":class:`torch.Tensor`": [torch.tensor, lambda A: torch.tensor(A, requires_grad=True)],
    "``dask.array.Array``": [lambda A: library("dask.array").from_array(A, chunks=(7, 4))],
    "``xarray.DataArray``": [lambda A: library("xarray").DataArray(A, dims=("row", "column"))],
    ":class:`pandas.DataFrame`": [
        lambda A: pd.DataFrame(A, columns=COLUMNS, index=np.arange(len(A))[::-1])
    ],
    "``polars.DataFrame``": [named(lambda columns: library("polars").DataFrame(columns))],
    "``pyarrow.Table``": [named(lambda columns: library("pyarrow").table(columns))],
    "Hugging Face Dataset": [named(lambda columns: library("datasets").Dataset.from_dict(columns))],
    "SciPy ``csr_matrix`` or ``csc_matrix``": [sp.csr_matrix, sp.csc_matrix],
    "another sparse matrix or array of SciPy": [sp.csr_array, sp.coo_array, sp.dok_array],
    "dict of arrays, ``SliceDict``": [
        named(lambda columns: {name: part[:, None] for name, part in columns.items()}),
        lambda A: {"left": torch.tensor(A[:, :1]), "right": A[:, 1:]},
        lambda A: SliceDict(left=A[:, :1], right=A[:, 1:]),
    ],
    "dict of lists": [lambda A: {"left": A[:, :1].tolist(), "right": A[:, 1:].tolist()}],
    "tuple of arrays": [lambda A: (A[:, :1], A[:, 1:])],
    "list of rows": [list, lambda A: A.tolist(), lambda A: list(torch.tensor(A))],
    ":class:`torch.utils.data.Dataset`": [
        lambda A: TensorDataset(torch.tensor(A), torch.tensor(labels(A))),
        lambda A: Subset(TensorDataset(torch.tensor(A), torch.tensor(labels(A))), range(len(A))),
    ],
    "list or Series of strings": [
        texts,
        lambda A: tuple(texts(A)),
        lambda A: np.array(texts(A)),
        lambda A: pd.Series(texts(A)),
        lambda A: library("polars").Series(texts(A)),
    ],
}
NET = NeuralNetClassifier(
    Tiny,
    criterion=nn.CrossEntropyLoss,
    train_split=None,
    verbose=0,
    callbacks__print_log=None,
    max_epochs=3,
    lr=0.5,
)
FISHERMASK = FisherMaskSampler(mask="all", coverage_share=0)


class ToArray(TransformerMixin, BaseEstimator):
    """A transformer of any container."""

    def fit(self, X: Any, y: Any = None) -> ToArray:
        return self

    def transform(self, X: Any) -> np.ndarray:
        return to_array(X)

    def __sklearn_is_fitted__(self) -> bool:
        return True


PIPELINE = make_pipeline(ToArray(), NET)
# What is asked -> the column of the table, and the estimator.
WAYS: dict[str, tuple[str, Any]] = {
    "net": ("Net", NET),
    "sampler": ("``FisherMaskSampler(net)``", FisherMaskSampler(NET)),
    "pipeline": ("Pipeline", PIPELINE),
    "sampler of a pipeline": ("Pipeline", FisherMaskSampler(PIPELINE)),
}
# What is not "itself".
BACK = {"NumPy array": np.ndarray, ":class:`~torch.utils.data.Subset`": Subset}


def run(estimator: Any, make: Callable[[np.ndarray], Any], folder: Path | None = None) -> list[Any]:
    """Query, teach and query again, and draw a curve; return what was chosen and predicted."""
    pool = make(X[16:])
    learner = ActiveLearner(estimator, FISHERMASK, X_training=make(X[:16]), y_training=Y[:16])
    predicted = learner.predict(pool)
    first, instances = learner.query(pool, n_instances=4)
    learner.teach(instances, Y[16:][first])
    kinds = [type(instances), type(learner.X_training)]
    np.testing.assert_array_equal(to_array(instances), X[16:][first])
    np.testing.assert_array_equal(to_array(learner.X_training), X[[*range(16), *(16 + first)]])
    second, _ = learner.query(pool, n_instances=4)
    curve = active_learning_curve(
        estimator,
        make(X),
        Y,
        query_strategy="random",
        n_initial=12,
        n_instances=4,
        n_queries=1,
        cv=ShuffleSplit(1, random_state=0),
        random_state=0,
        return_indices=True,
        checkpoint=folder,
    )
    return [kinds, predicted.tolist(), first.tolist(), second.tolist(), curve["indices"].tolist()]


@cache
def expected(way: str) -> list[Any]:
    return run(WAYS[way][1], lambda A: A)[1:]


def containers_and_ways() -> Iterator[Any]:
    """The first container of a row in every way, with one of the pipelines; the others in one each.

    The rest is slow.
    """
    for row, (name, makes) in enumerate(CASES.items()):
        for i, make in enumerate(makes):
            for j, way in enumerate(WAYS):
                is_slow = i % len(WAYS) != j if i else j == 2 + row % 2
                marks = pytest.mark.slow if is_slow else ()
                yield pytest.param(name, make, way, id=f"{name} {i} {way}", marks=marks)


@pytest.mark.parametrize(("name", "make", "way"), [*containers_and_ways()])
def test_a_container(
    name: str, make: Callable[[np.ndarray], Any], way: str, tmp_path: Path
) -> None:
    row, (column, estimator) = TABLE[name], WAYS[way]
    if row[column] == "yes":
        kinds, *found = run(estimator, make, tmp_path)
        assert found == expected(way)
        assert kinds[0] is BACK.get(row["Rows come back as"], type(make(X)))
    else:
        remedy = re.escape(row["Otherwise"].replace("``", ""))
        with pytest.raises((TypeError, ValueError, LookupError, RuntimeError), match=remedy):
            ActiveLearner(estimator, X_training=make(X[:16]), y_training=Y[:16])


def test_every_row_of_the_table_is_tested() -> None:
    assert CASES.keys() == TABLE.keys()


# -- columns and inputs are known by their names -------------------------------------------------

TABLES: dict[str, Callable[[dict[str, np.ndarray]], Any]] = {
    "pandas": pd.DataFrame,
    "polars": lambda columns: library("polars").DataFrame(columns),
    "pyarrow": lambda columns: library("pyarrow").table(columns),
    "datasets": lambda columns: library("datasets").Dataset.from_dict(columns),
    "dict": dict,
    "SliceDict": lambda columns: SliceDict(**columns),
}


@pytest.mark.parametrize("make", TABLES.values(), ids=TABLES)
def test_columns_in_another_order(make: Callable[[dict[str, np.ndarray]], Any]) -> None:
    old = make({"a": np.arange(3.0), "b": np.arange(3.0) + 10})
    new = make({"b": np.arange(2.0) + 20, "a": np.arange(2.0)})
    both = stack_rows(old, new)
    assert type(both) is type(old)
    assert np.asarray(both["a"]).tolist() == [0, 1, 2, 0, 1]
    assert np.asarray(both["b"]).tolist() == [10, 11, 12, 20, 21]
    for other, found in [(make({"a": np.zeros(2)}), r"\['a'\]"), (np.zeros((2, 2)), "ndarray")]:
        with pytest.raises(ValueError, match=rf"have {found}; expected \['a', 'b'\] like the tr"):
            stack_rows(old, other)


@pytest.mark.parametrize("make", ["polars", "pyarrow"])
def test_numbers_of_another_width_are_stacked(make: str) -> None:
    old, new = (TABLES[make]({"a": np.arange(2, dtype=kind)}) for kind in ("float32", "float64"))
    assert np.asarray(stack_rows(old, new)["a"]).tolist() == [0, 1, 0, 1]


SERIES: dict[str, Callable[[list[int]], Any]] = {
    "pandas": pd.Series,
    "polars": lambda values: library("polars").Series(values),
    "xarray": lambda values: library("xarray").DataArray(values),
    "tensor": torch.tensor,
    "tuple": tuple,
}


@pytest.mark.parametrize("make", SERIES.values(), ids=SERIES)
def test_labels_in_another_container(make: Callable[[list[int]], Any]) -> None:
    for other in (np.array([3]), [3], pd.Series([3])):
        assert [int(label) for label in stack_rows(make([1, 2]), other)] == [1, 2, 3]
    assert [int(label) for label in stack_rows(make([1, 2]), make([3]))] == [1, 2, 3]
    assert type(stack_rows(make([1, 2]), make([3]))) is type(make([1]))


@pytest.mark.parametrize("make", [in_hdf5, in_zarr], ids=["HDF5", "zarr"])
def test_rows_of_a_file_in_any_order(make: Callable[[np.ndarray], Any]) -> None:
    data, rows = make(X), [5, 2, 40, 2]
    np.testing.assert_array_equal(take_rows(data, rows), X[rows])
    np.testing.assert_array_equal(take_rows(data, []), X[:0])
    np.testing.assert_array_equal(take_rows(data, 3), X[3])


def test_a_mapping_that_is_made_of_something_else() -> None:
    class Counts(defaultdict):
        pass

    taken = take_rows(Counts(list, {"a": X}), [1])
    assert type(taken) is dict
    np.testing.assert_array_equal(taken["a"], X[[1]])


def test_a_class_derived_from_a_frame() -> None:
    class Own(pd.DataFrame):
        pass

    frames = Own({"a": [1, 2], "b": ["x", "y"]}), pd.DataFrame({"a": [3], "b": ["z"]})
    for old, new in (frames, frames[::-1]):
        both = stack_rows(old, new)
        assert isinstance(both, pd.DataFrame)
        assert both["a"].tolist() == [*old["a"], *new["a"]]


def test_a_graph_of_tensors_is_no_part_of_their_rows() -> None:
    computed = torch.tensor(X, requires_grad=True) * 2
    assert not take_rows(computed, [1]).requires_grad
    assert not stack_rows(computed, computed).requires_grad


def test_what_is_in_memory_is_not_a_pool_of_dask() -> None:
    library("dask.array")
    assert not is_dask(library("xarray").DataArray(X))
    assert is_dask(library("xarray").DataArray(X).chunk())


class Unknown:
    """An array of a library that nothing is known of."""

    def __init__(self, A: np.ndarray) -> None:
        self._A, self.shape, self.dtype = A, A.shape, A.dtype

    def __len__(self) -> int:
        return len(self._A)

    def __getitem__(self, rows: Any) -> Any:
        taken = self._A[rows]
        return type(self)(taken) if taken.ndim == self._A.ndim else taken

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return np.asarray(self._A, dtype)


def test_an_array_of_an_unknown_library() -> None:
    net = clone(NET).fit(X, Y)
    expected = FISHERMASK(net, X[16:], 4, X_labeled=X[:16])
    found = FISHERMASK(net, Unknown(X[16:]), 4, X_labeled=Unknown(X[:16]))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)
    bad = X[16:].copy()
    bad[5, 1] = np.nan
    with pytest.raises(ValueError, match="X_pool contains NaN or infinity, first in row 5"):
        FISHERMASK(net, Unknown(bad), 4)
    assert stack_rows(Unknown(X[:2]), X[2:3]).tolist() == X[:3].tolist()
