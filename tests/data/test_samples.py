"""What a net is given of samples: in mixed containers, cast, from files, by datasets of its own."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, MinMaxScaler
from skorch import NeuralNetClassifier
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset, TensorDataset

from skfishermask import FisherMaskSampler, active_learning_curve
from skfishermask.data import take_rows
from skfishermask.modal import ActiveLearner
from tests import nets
from tests.pairs import each_with_one

X, Y = nets.digits()
X_LABELED, Y_LABELED, X_POOL = X[:60], Y[:60], X[60:160]
TINY = {"mask_fraction": 140, "n_mask_samples": None, "random_state": 0}


class TwoInputs(nn.Module):
    """The MLP of `nets`, for images cut into halves."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nets.mlp()

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.mlp(torch.cat([left, right], dim=1))


class Pair(TwoInputs):
    """The same for two inputs in a list, which is what skorch makes of a tuple."""

    def forward(self, X: list[Tensor]) -> Tensor:
        return super().forward(*X)


class AnyRank(nn.Module):
    """The MLP of `nets`, for samples of any rank."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nets.mlp()

    def forward(self, X: Tensor) -> Tensor:
        return self.mlp(X.flatten(1))


class Densifier(FunctionTransformer):
    def __init__(self) -> None:
        super().__init__(lambda A: np.asarray(A.todense()), accept_sparse=True)


def net(module: type[nn.Module] = AnyRank, **more: Any) -> NeuralNetClassifier:
    return NeuralNetClassifier(module, criterion=nn.CrossEntropyLoss, **nets.options(**more))


def named(columns: Any) -> Callable[[np.ndarray], pd.DataFrame]:
    """A DataFrame with an index other than the positions of its rows."""
    return lambda A: pd.DataFrame(A, columns=columns, index=np.arange(len(A))[::-1] + 100)


def as_dataset(A: np.ndarray) -> TensorDataset:
    return TensorDataset(torch.tensor(A), torch.tensor(Y[: len(A)]))


class Unlabeled(Dataset):
    """Samples without labels."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __getitem__(self, i: int) -> Any:
        return self.rows[i]

    def __len__(self) -> int:
        return len(self.rows)


# What makes the container, and a module for it.
KINDS = {
    "2-d": (lambda A: A, AnyRank),
    "3-d": (lambda A: A.reshape(-1, 8, 8), AnyRank),
    "4-d": (lambda A: A.reshape(-1, 1, 8, 8), AnyRank),
    "not contiguous": (lambda A: np.repeat(A, 2, axis=0)[::2], AnyRank),
    "Fortran order": (np.asfortranarray, AnyRank),
    "read only": (lambda A: np.frombuffer(A.tobytes(), "float32").reshape(A.shape), AnyRank),
    "tensor": (torch.tensor, AnyRank),
    "list of lists of rank 0": (lambda A: [list(row) for row in A], AnyRank),
    "list of arrays": (list, AnyRank),
    "list of images": (lambda A: list(A.reshape(-1, 8, 8)), AnyRank),
    "list of tensors": (lambda A: list(torch.tensor(A)), AnyRank),
    "dict": (lambda A: {"left": A[:, :32], "right": A[:, 32:]}, TwoInputs),
    "dict of tensors": (
        lambda A: {"left": torch.tensor(A[:, :32]), "right": torch.tensor(A[:, 32:])},
        TwoInputs,
    ),
    "tuple": (lambda A: (A[:, :32], A[:, 32:]), Pair),
    "tuple of tensors": (lambda A: (torch.tensor(A[:, :32]), torch.tensor(A[:, 32:])), Pair),
    "big-endian": (lambda A: A.astype(">f4"), AnyRank),
    "reversed": (lambda A: A[:, ::-1].copy()[:, ::-1], AnyRank),
    "polars": (lambda A: pytest.importorskip("polars").DataFrame(A), AnyRank),
    "pyarrow": (
        lambda A: pytest.importorskip("pyarrow").Table.from_pandas(pd.DataFrame(A)),
        AnyRank,
    ),
    "xarray": (lambda A: pytest.importorskip("xarray").DataArray(A), AnyRank),
    "zarr": (lambda A: pytest.importorskip("zarr").array(A), AnyRank),
    "Dataset": (as_dataset, AnyRank),
    "Subset": (lambda A: Subset(as_dataset(np.repeat(A, 2, 0)), range(0, 2 * len(A), 2)), AnyRank),
}


@cache
def expected() -> list[int]:
    """What is chosen from the plain array."""
    fitted = FisherMaskSampler(net(), **TINY).fit(X_LABELED, Y_LABELED)
    return fitted.query(X_POOL, 8)[0].tolist()


@cache
def bare_net_and_choice(module: Any) -> tuple[Any, list[int]]:
    """Return a net that has not been trained, and what it chooses from arrays."""
    torch.manual_seed(0)
    bare = net(module).initialize()
    split = {"left": X_POOL[:, :32], "right": X_POOL[:, 32:]}
    pool = {TwoInputs: split, Pair: (*split.values(),)}.get(module, X_POOL)
    return bare, FisherMaskSampler(**TINY)(bare, pool, 8)[0].tolist()


@pytest.mark.parametrize(("make", "module"), KINDS.values(), ids=KINDS)
def test_a_pool_for_the_bare_strategy(make: Any, module: Any) -> None:
    bare, expected = bare_net_and_choice(module)
    chosen, _ = FisherMaskSampler(**TINY)(bare, make(X_POOL), 8)
    assert chosen.tolist() == expected


COLUMNS = {"none": None, "numbers": range(5, 69), "names": [f"pixel {i}" for i in range(64)]}


@pytest.mark.parametrize(("columns", "within"), each_with_one(COLUMNS, ["sampler", "pipeline"]))
def test_data_frames(columns: str, within: str) -> None:
    make, inside = named(COLUMNS[columns]), within == "pipeline"
    estimator = make_pipeline(MinMaxScaler((0, 1)), net()) if inside else net()
    plain = FisherMaskSampler(estimator, **TINY).fit(X_LABELED, Y_LABELED)
    framed = FisherMaskSampler(estimator, **TINY).fit(make(X_LABELED), Y_LABELED)
    pool = make(X_POOL)
    indices, instances = framed.query(pool, 8)
    assert indices.tolist() == plain.query(X_POOL, 8)[0].tolist()
    pd.testing.assert_frame_equal(instances, pool.iloc[indices])
    classifier = framed.estimator_ if inside else framed
    strategy, _ = FisherMaskSampler(**TINY)(classifier, pool, 8, X_labeled=make(X_LABELED))
    assert strategy.tolist() == indices.tolist()


def test_cross_validation_of_texts() -> None:
    texts = ["good", "bad"] * 20
    pipeline = make_pipeline(CountVectorizer(dtype="float32"), Densifier(), net(wide(2)))
    scores = cross_val_score(FisherMaskSampler(pipeline, random_state=0), texts, [0, 1] * 20, cv=2)
    assert scores.tolist() == [1, 1]


def wide(n: int) -> Any:
    return partial(nn.Linear, n, 10)


def test_columns_of_many_types_go_through_a_pipeline() -> None:
    frame = pd.DataFrame({"digit": Y.astype(str), "mean": X.mean(1)})

    def encode(frame: pd.DataFrame) -> np.ndarray:
        digits = frame["digit"].to_numpy().astype(int)[:, None] == np.arange(63)
        return np.hstack([digits, frame[["mean"]].to_numpy()]).astype("float32")

    pipeline = make_pipeline(FunctionTransformer(encode), net())
    framed = FisherMaskSampler(pipeline, **TINY).fit(frame[:60], Y_LABELED)
    plain = FisherMaskSampler(net(), **TINY).fit(encode(frame[:60]), Y_LABELED)
    indices, instances = framed.query(frame[60:160], 8)
    assert indices.tolist() == plain.query(encode(frame[60:160]), 8)[0].tolist()
    pd.testing.assert_frame_equal(instances, frame[60:160].iloc[indices])


@pytest.mark.parametrize(
    "make", [sp.csr_array, sp.csc_matrix, sp.coo_array, sp.lil_matrix, sp.dok_array]
)
def test_sparse_matrices_go_through_a_pipeline(make: Any) -> None:
    pipeline = make_pipeline(Densifier(), net()).fit(sp.csr_array(X_LABELED), Y_LABELED)
    plain, _ = FisherMaskSampler(**TINY)(pipeline[-1], X_POOL, 8)
    for classifier in (pipeline, pipeline[-1]):  # skorch makes them dense, row by row
        chosen, _ = FisherMaskSampler(**TINY)(classifier, make(X_POOL), 8)
        assert chosen.tolist() == plain.tolist()


def from_npy(path: Path, array: np.ndarray) -> Any:
    np.save(path.with_suffix(".npy"), array)
    return np.load(path.with_suffix(".npy"), mmap_mode="r")


def from_hdf5(path: Path, array: np.ndarray) -> Any:
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "w") as file:
        file["X"] = array
    return h5py.File(path, "r")["X"]


@pytest.mark.parametrize("load", [from_npy, from_hdf5])
@pytest.mark.parametrize(
    ("through", "dtype"),
    [("sampler", "float32"), ("sampler", "float64"), ("strategy", "float32")],  # the second is cast
)
def test_a_file_is_never_read_whole(through: str, dtype: str, load: Any, tmp_path: Path) -> None:
    fitted = FisherMaskSampler(net(), max_candidates=50, **(TINY | {"n_mask_samples": 50}))
    fitted.fit(X_LABELED, Y_LABELED)
    large = np.tile(X_POOL, (400, 1)).astype(dtype)
    in_memory, _ = fitted.query(large, 8, X_labeled=X_LABELED)
    pool = load(tmp_path / "pool", large)
    # NumPy tells tracemalloc of its arrays; what is mapped is none.
    tracemalloc.start()
    try:
        indices = (fitted.query if through == "sampler" else fitted)(
            *(() if through == "sampler" else (fitted.estimator_,)), pool, 8, X_labeled=X_LABELED
        )[0]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert indices.tolist() == in_memory.tolist()
    assert peak < pool.nbytes / 4


@pytest.mark.cuda
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_tensors_on_cuda(device: str) -> None:
    fitted = FisherMaskSampler(net(device=device), **TINY)
    fitted.fit(torch.tensor(X_LABELED, device="cuda"), Y_LABELED)
    plain, _ = fitted.query(X_POOL, 8)
    indices, instances = fitted.query(torch.tensor(X_POOL, device="cuda"), 8)
    assert indices.tolist() == plain.tolist()
    assert instances.device.type == "cuda"
    np.testing.assert_array_equal(instances.cpu(), X_POOL[indices])


# -- kinds are mixed, and numbers are cast -------------------------------------------------------


CAST: dict[str, Callable[[np.ndarray], Any]] = {
    "ndarray": lambda A: A,
    "tensor": torch.tensor,
    "dict": lambda A: {"left": A[:, :32], "right": torch.tensor(A[:, 32:])},
}


@pytest.mark.parametrize(("kind", "dtype"), each_with_one(CAST, ["float16", "float64", "float32"]))
def test_floating_point_input_is_cast(kind: str, dtype: str) -> None:
    make, module = CAST[kind], TwoInputs if kind == "dict" else AnyRank
    fitted = FisherMaskSampler(net(module), **TINY)
    # The digits are sixteenths: exact in every one of these dtypes.
    fitted.fit(make(X_LABELED.astype(dtype)), Y_LABELED)
    assert fitted.query(make(X_POOL.astype(dtype)), 8)[0].tolist() == expected()


@pytest.mark.parametrize("make", [lambda A: A, torch.tensor], ids=["ndarray", "tensor"])
def test_integers_are_left_to_the_network(make: Any) -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.output = nn.EmbeddingBag(17, 12), nn.Linear(12, 10)

        def forward(self, X: Tensor) -> Tensor:
            return self.output(self.embed(X))

    tokens = make((16 * X).astype("int64"))
    fitted = FisherMaskSampler(net(Tokens), mask_fraction=140).fit(tokens[:60], Y_LABELED)
    indices, instances = fitted.query(tokens[60:160], 8)
    assert len(set(indices.tolist())) == 8
    assert instances.dtype == tokens.dtype


FITS = {
    "ndarray": lambda A: A,
    "tensor": torch.tensor,
    "DataFrame": named(range(64)),
    "Dataset": as_dataset,
}


@pytest.mark.parametrize(
    ("inside", "trained", "queried"),
    [
        # Each kind with an array, in both directions; the rest is slow.
        pytest.param(inside, *kinds, marks=() if kinds.count("ndarray") == 1 else pytest.mark.slow)
        for inside in ("net", "pipeline")
        for kinds in product(FITS, FITS)
        # A pipeline's transformers take no Dataset.
        if inside == "net" or "Dataset" not in kinds
    ],
)
def test_trained_on_one_kind_and_queried_with_another(
    inside: str, trained: str, queried: str
) -> None:
    scaled = make_pipeline(FunctionTransformer(np.asarray), net())
    estimator = scaled if inside == "pipeline" else net()
    fitted = FisherMaskSampler(estimator, **TINY).fit(FITS[trained](X_LABELED), Y_LABELED)
    pool = FITS[queried](X_POOL)
    if trained == "DataFrame" and queried == "ndarray":
        assert fitted.n_features_in_ == 64
    assert fitted.query(pool, 8)[0].tolist() == expected()


def test_labels_given_with_a_dataset_are_those_that_count() -> None:
    names = np.array([f"digit {i}" for i in range(10)])
    shuffled = TensorDataset(torch.tensor(X_LABELED), torch.tensor(Y_LABELED[::-1].copy()))
    plain = FisherMaskSampler(net(), **TINY).fit(X_LABELED, names[Y_LABELED])
    for data in (shuffled, Unlabeled(X_LABELED)):
        fitted = FisherMaskSampler(net(), **TINY).fit(data, names[Y_LABELED])
        np.testing.assert_array_equal(fitted.predict(X_POOL), plain.predict(X_POOL))


def test_what_an_earlier_fit_saw_is_forgotten() -> None:
    fitted = FisherMaskSampler(net(), **TINY).fit(named([f"{i}" for i in range(64)])(X), Y)
    fitted.fit(torch.tensor(X_LABELED).reshape(-1, 8, 8), Y_LABELED)
    assert fitted.n_features_in_ == 8
    assert not hasattr(fitted, "feature_names_in_")
    assert fitted.predict(X_POOL.reshape(-1, 8, 8)).shape == (100,)
    with pytest.raises(ValueError, match=r"expecting samples of shape \(8, 8\)"):
        fitted.predict(torch.tensor(X_POOL))
    fitted.fit(as_dataset(X_LABELED))
    assert not hasattr(fitted, "n_features_in_")


@pytest.mark.filterwarnings("error::UserWarning")
def test_read_only_data_are_no_reason_to_warn(tmp_path: Path) -> None:
    np.save(tmp_path / "pool.npy", np.random.default_rng(0).normal(size=(80, 4)))
    pool = np.load(tmp_path / "pool.npy", mmap_mode="r")
    frame = pd.DataFrame(pool[:40])
    # PyTorch would warn once in a process, perhaps in an earlier test.
    torch.set_warn_always(True)
    try:
        for X, last in [(frame, frame), (np.array(pool[:40]), pool)]:
            sampler = FisherMaskSampler(**TINY).fit(X, np.arange(40) % 2)
            sampler.query(last, 3)
            if X is frame:
                sampler.predict(last)
        FisherMaskSampler(random_state=0)(sampler, pool, 3)
    finally:
        torch.set_warn_always(False)


# -- a dataset of the net's own takes anything ---------------------------------------------------


class Reading(Dataset):
    """Reads numbers from names of files, from texts in a DataFrame, or from rows of any length."""

    def __init__(self, X: Any, y: Any = None) -> None:
        self.X, self.y = X, y

    def __len__(self) -> int:
        return len(self.X)

    def __getitem__(self, i: int) -> tuple[np.ndarray, Any]:
        row = self.X["text"].iloc[i] if isinstance(self.X, pd.DataFrame) else self.X[i]
        row = row["text"] if isinstance(row, dict) else row
        row = row.read_text() if isinstance(row, Path) else row
        row = row.split() if isinstance(row, str) else row
        full = np.zeros(64, "float32")
        full[: len(row)] = row
        return full, 0 if self.y is None else self.y[i]


def as_files(A: np.ndarray, folder: Path) -> list[Path]:
    paths = [folder / f"{i}.txt" for i in range(len(A))]
    for path, row in zip(paths, A, strict=True):
        path.write_text(" ".join(map(str, row.tolist())))
    return paths


# Without the zeros at the end, which makes them of many lengths.
ITEMS = {
    "ragged lists": lambda A, folder: [np.trim_zeros(row, "b").tolist() for row in A],
    "texts": lambda A, folder: [" ".join(map(str, row.tolist())) for row in A],
    "files": as_files,
    "names of files": lambda A, folder: np.array([str(path) for path in as_files(A, folder)]),
    "Hugging Face": lambda A, folder: pytest.importorskip("datasets").Dataset.from_dict(
        {"text": [" ".join(map(str, row)) for row in A]}
    ),
    "a frame": lambda A, folder: pd.DataFrame({"text": [" ".join(map(str, row)) for row in A]}),
}


class ReadingNames(Reading):
    def __getitem__(self, i: int) -> tuple[np.ndarray, Any]:
        return Reading([Path(self.X[i])], None if self.y is None else self.y[i : i + 1])[0]


@pytest.mark.parametrize(("name", "wrapping"), each_with_one(ITEMS, ["net", "sampler"]))
def test_a_dataset_of_the_net(name: str, wrapping: str, tmp_path: Path) -> None:
    wrapped = wrapping == "sampler"
    own = net(dataset=ReadingNames if name == "names of files" else Reading)
    estimator = FisherMaskSampler(own, **TINY) if wrapped else own
    items = ITEMS[name](X[:160], tmp_path)
    known, pool = (take_rows(items, np.arange(*rows)) for rows in ((60,), (60, 160)))
    torch.manual_seed(0)
    learner = ActiveLearner(estimator, FisherMaskSampler(**TINY), known, Y_LABELED)
    plain = net()
    torch.manual_seed(0)
    plain = FisherMaskSampler(plain, **TINY) if wrapped else plain
    plain = ActiveLearner(plain, FisherMaskSampler(**TINY), X_LABELED, Y_LABELED)
    assert learner.predict(pool).tolist() == plain.predict(X_POOL).tolist()
    indices, instances = learner.query(pool, n_instances=8)
    assert indices.tolist() == plain.query(X_POOL, n_instances=8)[0].tolist()
    assert type(instances) is type(pool)
    learner.teach(instances, Y[60:160][indices])
    assert len(learner.X_training) == 68
    # A first batch, too, is read by the dataset.
    first, _ = FisherMaskSampler(own, random_state=0).query(pool, 5)
    assert first.tolist() == FisherMaskSampler(net(), random_state=0).query(X_POOL, 5)[0].tolist()


def test_a_first_batch_refuses_rows_that_are_dicts() -> None:
    rows = pytest.importorskip("datasets").Dataset.from_dict({"pixel": [0.0, 1.0]})
    with pytest.raises(TypeError, match=r"X_pool cannot be .*\.with_format"):
        FisherMaskSampler(random_state=0).query(rows)


def test_missing_values_are_for_the_dataset_to_fill() -> None:
    class Filling(Reading):
        def __getitem__(self, i: int) -> tuple[np.ndarray, Any]:
            row, label = super().__getitem__(i)
            return np.nan_to_num(row), label

    items = [[float("nan"), *row[1:].tolist()] for row in X[:160]]
    fitted = FisherMaskSampler(net(dataset=Filling), **TINY).fit(items[:60], Y_LABELED)
    assert fitted.query(items[60:], 8)[0].shape == (8,)


# -- refused before any work ---------------------------------------------------------------------


class Columns:
    """Has a length and takes an array for names of columns, as some tables do."""

    def __len__(self) -> int:
        return len(X_POOL)

    def __getitem__(self, index: Any) -> np.ndarray:
        return X_POOL[:, index]


class Whole(Columns):
    """Returns all rows, of which some were asked for."""

    def __getitem__(self, index: Any) -> np.ndarray:
        return X_POOL


def lazy_frame() -> Any:
    return pytest.importorskip("polars").LazyFrame({"a": [1.0, 2.0]})


def lazy_xarray() -> Any:
    da = pytest.importorskip("dask.array")
    return pytest.importorskip("xarray").DataArray(da.from_array(X_POOL))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: {"pixels": Columns()}, r"Expected X_pool\['pixels'\] to be .* found Columns"),
        (Whole, "found Whole, of which no rows can be taken"),
        (lazy_frame, "found LazyFrame"),
        (lazy_xarray, "the data of an xarray.DataArray is one"),
        (lambda: pytest.importorskip("pyarrow").array([1.0, 2.0]), "found DoubleArray"),
    ],
)
def test_what_rows_cannot_be_taken_of(make: Any, message: str) -> None:
    def strategy(learner: Any, pool: Any, **more: Any) -> Any:
        raise AssertionError("no work is done")

    fitted = FisherMaskSampler(net(), **TINY).fit(X_LABELED, Y_LABELED)
    data = make()
    with pytest.raises(TypeError, match=message):
        FisherMaskSampler(**TINY)(fitted, data, 2)
    if "xarray" not in message:  # another strategy may take it
        with pytest.raises(TypeError, match=message):
            ActiveLearner(fitted, strategy).query(data)
        with pytest.raises(TypeError, match=message.replace("X_pool", "X")):
            active_learning_curve(
                fitted,
                data,
                [0, 1],
                query_strategy="random",
                n_initial=1,
                n_instances=1,
                n_queries=1,
            )
