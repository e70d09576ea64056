"""Every kind of pool: the same rows are chosen, and come back in the container they came in."""

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

from skfishermask import FisherMaskSampler
from tests import nets

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


def to_dense(data: Any) -> np.ndarray:
    if isinstance(data, dict | tuple):
        parts = data.values() if isinstance(data, dict) else data
        return np.hstack([to_dense(part) for part in parts])
    if isinstance(data, Dataset):
        return np.stack([to_dense(data[i][0]) for i in range(len(data))])
    if isinstance(data, list):
        data = np.stack([to_dense(row) for row in data])
    data = data.toarray() if sp.issparse(data) else data
    data = data.numpy(force=True) if isinstance(data, Tensor) else np.asarray(data)
    return data.reshape(len(data), -1) if data.ndim > 1 else data


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
    "tensor with gradient": (lambda A: torch.tensor(A, requires_grad=True), AnyRank),
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
    "Dataset": (as_dataset, AnyRank),
    "Subset": (lambda A: Subset(as_dataset(np.repeat(A, 2, 0)), range(0, 2 * len(A), 2)), AnyRank),
}
both = pytest.mark.parametrize(("make", "module"), KINDS.values(), ids=KINDS)


@cache
def expected(labeled: bool = False) -> list[int]:
    """What is chosen from the plain array."""
    more = {"X_labeled": X_LABELED} if labeled else {}
    fitted = FisherMaskSampler(net(), **TINY).fit(X_LABELED, Y_LABELED)
    return fitted.query(X_POOL, 8, **more)[0].tolist()


@both
def test_through_the_sampler(make: Any, module: Any) -> None:
    fitted = FisherMaskSampler(net(module), **TINY)
    labeled = make(X_LABELED)
    is_list_of_tensors = isinstance(labeled, list) and isinstance(labeled[0], Tensor)
    fitted.fit(X_LABELED if is_list_of_tensors else labeled, Y_LABELED)
    pool = make(X_POOL)
    indices, instances, gains = fitted.query(pool, 8, return_metrics=True)
    assert indices.tolist() == expected()
    assert gains.shape == (8,)
    wanted = Subset if isinstance(pool, Dataset) else type(pool)
    assert isinstance(instances, wanted)
    np.testing.assert_array_equal(to_dense(instances), X_POOL[indices])
    assert fitted.predict(pool).shape == (100,)
    again, _ = fitted.query(pool, 8, X_labeled=make(X_LABELED))
    assert again.tolist() == expected(labeled=True)


@both
def test_through_the_bare_strategy(make: Any, module: Any) -> None:
    torch.manual_seed(0)
    bare = net(module).initialize()
    sampler = FisherMaskSampler(**TINY)
    split = {"left": X_POOL[:, :32], "right": X_POOL[:, 32:]}
    plain, _ = sampler(bare, {TwoInputs: split, Pair: (*split.values(),)}.get(module, X_POOL), 8)
    chosen, _ = sampler(bare, make(X_POOL), 8)
    assert chosen.tolist() == plain.tolist()


@pytest.mark.parametrize("columns", [None, range(5, 69), [f"pixel {i}" for i in range(64)]])
@pytest.mark.parametrize("inside", [False, True], ids=["sampler", "pipeline"])
def test_data_frames(columns: Any, inside: bool) -> None:
    make = named(columns)
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


@pytest.mark.parametrize("make", [list, np.array, pd.Series, tuple])
def test_texts_go_through_a_pipeline(make: Any) -> None:
    texts = [" ".join(f"w{i}" for i in np.flatnonzero(x > 0.5)) for x in X[:160]]
    words = {"vocabulary": [f"w{i}" for i in range(64)], "dtype": "float32"}
    steps = CountVectorizer(**words), Densifier()
    pipeline = make_pipeline(*steps, net())
    known, pool = make(texts[:60]), make(texts[60:])
    fitted = FisherMaskSampler(pipeline, **TINY).fit(known, Y_LABELED)
    indices, chosen = fitted.query(pool, 8, X_labeled=known)
    counts = make_pipeline(*steps).fit_transform(texts)
    plain = FisherMaskSampler(net(), **TINY).fit(counts[:60], Y_LABELED)
    assert indices.tolist() == plain.query(counts[60:], 8, X_labeled=counts[:60])[0].tolist()
    assert list(chosen) == [texts[60 + i] for i in indices]
    assert fitted.predict(pool).tolist() == plain.predict(counts[60:]).tolist()
    with pytest.raises(ValueError, match=r"Expected numbers in X, found strings"):
        FisherMaskSampler(net(), **TINY).fit(known, Y_LABELED)


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

    fitted = FisherMaskSampler(make_pipeline(Densifier(), net()), **TINY)
    fitted.fit(make(X_LABELED), Y_LABELED)
    pool = make(X_POOL)
    indices, instances = fitted.query(pool, 8)
    assert indices.tolist() == expected()
    assert instances.format == pool.format
    np.testing.assert_array_equal(instances.toarray(), X_POOL[indices])


@pytest.mark.parametrize(
    ("through", "dtype"),
    [("sampler", "float32"), ("sampler", "float64"), ("strategy", "float32")],  # the second is cast
)
def test_a_memory_map_is_never_read_whole(through: str, dtype: str, tmp_path: Path) -> None:
    fitted = FisherMaskSampler(net(), max_candidates=50, **(TINY | {"n_mask_samples": 50}))
    fitted.fit(X_LABELED, Y_LABELED)
    large = np.tile(X_POOL, (400, 1)).astype(dtype)
    np.save(tmp_path / "pool.npy", large)
    in_memory, _ = fitted.query(large, 8, X_labeled=X_LABELED)
    pool = np.load(tmp_path / "pool.npy", mmap_mode="r")
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


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize(
    "make",
    [lambda A: A, torch.tensor, lambda A: {"left": A[:, :32], "right": torch.tensor(A[:, 32:])}],
    ids=["ndarray", "tensor", "dict"],
)
def test_floating_point_input_is_cast(make: Any, dtype: str) -> None:
    module = TwoInputs if isinstance(make(X_POOL), dict) else AnyRank
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
        (inside, *kinds)
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
