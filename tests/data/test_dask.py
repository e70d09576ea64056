"""Pools that are Dask arrays, without a cluster: chunk after chunk in this process."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from torch.utils.data import default_collate

from skfishermask import PUBLISHED, FisherMaskSampler
from skfishermask.compat import client_that_computes
from skfishermask.data import DaskSamples, NetSamples, SampleRole, is_dask
from tests.nets import digits, fitted, logits_net

da = pytest.importorskip("dask.array")

CHUNKS = ((100, 1, 57, 242), (64,))


@pytest.fixture(scope="module")
def net() -> Any:
    return fitted(logits_net())


@pytest.fixture
def pool() -> np.ndarray:
    return digits()[0][100:500]


def same(X: Any) -> Any:
    return X


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_candidates": 150, "oversample": 1.5},
        {"n_directions": 0.9},
        {"mask": "output_layer", "target": "identity"},
    ],
    ids=str,
)
def test_same_as_the_array(net: Any, pool: np.ndarray, options: dict[str, Any]) -> None:
    X_labeled = digits()[0][:60]
    expected, theirs, found = (FisherMaskSampler(random_state=0, **options) for _ in range(3))
    indices, gains = expected(net, pool, 12, X_labeled=X_labeled)
    for sampler, labeled in ((theirs, X_labeled), (found, da.from_array(X_labeled, 25))):
        chosen = sampler(net, da.from_array(pool, CHUNKS), 12, X_labeled=labeled)
        assert chosen[0].tolist() == indices.tolist()
        np.testing.assert_allclose(chosen[1], gains, rtol=1e-5)
    assert found.query_info_["coverage_share"] == (not options)


def test_chunks_are_transformed_one_by_one(pool: np.ndarray) -> None:
    X, y = digits()
    pipeline = make_pipeline(StandardScaler(), logits_net()).fit(X[:60], y[:60])
    chunked = da.from_array(pool, CHUNKS)
    expected, _ = FisherMaskSampler(random_state=0)(pipeline, pool, 8)
    found, _ = FisherMaskSampler(random_state=0)(pipeline, chunked, 8)
    assert found.tolist() == expected.tolist()


class Dropping(FunctionTransformer):
    """Leaves out the samples that begin with a seven."""

    def __init__(self) -> None:
        super().__init__(lambda X: X[X[:, 0] != 7])


def test_a_transformer_that_drops_samples_is_refused(pool: np.ndarray) -> None:
    X, y = digits()
    pipeline = make_pipeline(Dropping(), logits_net()).fit(X[:60], y[:60])
    pool = pool.copy()
    pool[130, 0] = 7
    for X_pool, n in ((pool, 400), (da.from_array(pool, CHUNKS), 57)):
        with pytest.raises(ValueError, match=f"Expected {n} rows .* found {n - 1}"):
            FisherMaskSampler(random_state=0)(pipeline, X_pool, 8)


def readable_only(samples: list[Any]) -> Any:
    return default_collate([sample for sample in samples if sample[0][0] != 7])


def test_a_short_batch_is_named(pool: np.ndarray) -> None:
    pool = pool.copy()
    pool[130, 0] = 7
    net = fitted(logits_net(iterator_valid__collate_fn=readable_only))
    message = r"57 samples in batch 0 of X_pool \(row 101 to row 157\), found 56"
    with pytest.raises(ValueError, match=message):
        FisherMaskSampler(random_state=0)(net, da.from_array(pool, CHUNKS), 8)


def test_query_hands_back_a_dask_array(pool: np.ndarray) -> None:
    X, y = digits()
    sampler = FisherMaskSampler(logits_net(), random_state=0).fit(X[:60], y[:60])
    indices, instances = sampler.query(da.from_array(pool, CHUNKS), 5)
    assert isinstance(instances, da.Array)
    np.testing.assert_array_equal(instances.compute(), pool[indices])


def test_one_chunk_at_a_time(net: Any, pool: np.ndarray) -> None:
    computed: list[int] = []

    def note(chunk: np.ndarray) -> np.ndarray:
        computed.append(len(chunk))
        return chunk

    chunked = da.from_array(pool, CHUNKS).map_blocks(note, dtype=pool.dtype, meta=pool[:0])
    FisherMaskSampler(mask="output_layer", **PUBLISHED, random_state=0)(net, chunked, 5)
    # Some rows to try the network, then each chunk once.
    assert computed[1:] == list(CHUNKS[0])


def test_batches_are_those_of_the_array(net: Any, pool: np.ndarray) -> None:
    rows = np.array([0, 3, 99, 100, 102, 399])
    X = da.from_array(pool, CHUNKS)
    batches = DaskSamples(net, X, same, 2).batches(rows)
    found = list(batches)
    assert len(found) == len(batches) == 5
    assert len(batches.rows) == 6
    expected = NetSamples(net, pool, SampleRole.POOL).batches(rows)
    assert torch.equal(torch.cat(found), torch.cat(list(expected)))
    whole = list(DaskSamples(net.set_params(batch_size=-1), X, same).batches(rows))
    net.set_params(batch_size=32)
    assert list(map(len, whole)) == [3, 1, 1, 1]


def test_other_axes_become_one_chunk(net: Any) -> None:
    X = da.from_array(np.arange(60.0).reshape(6, 5, 2), (4, 2, 1))
    pool = DaskSamples(net, X, same)
    assert pool.array.chunks == ((4, 2), (5,), (2,))
    assert len(pool) == 6
    assert pool.rows_by_chunk(np.array([1, 3, 5])) == [(0, slice(0, 2)), (1, slice(2, 3))]
    assert pool.rows_by_chunk(np.array([4, 5])) == [(1, slice(0, 2))]


def test_bad_rows_are_named(net: Any, pool: np.ndarray) -> None:
    bad = pool.copy()
    bad[321, 5] = np.nan
    with pytest.raises(ValueError, match="X_pool contains NaN or infinity, first in row 321"):
        FisherMaskSampler(random_state=0)(net, da.from_array(bad, CHUNKS), 5)


@pytest.mark.parametrize(
    ("X", "error", "message"),
    [
        (lambda: da.from_array(np.array(["a", "b"]), 1), ValueError, "found a dask.array of dtype"),
        (lambda: da.from_array(np.array(1.0)), ValueError, "single value"),
        (lambda: _unknown(), ValueError, "compute_chunk_sizes"),
        (lambda: _bag(), TypeError, "found Bag"),
        (lambda: da.zeros((0, 64)), ValueError, "at least one sample"),
        (lambda: da.zeros((5, 7), dtype="float32"), ValueError, "cannot read the pool"),
    ],
)
def test_what_is_not_a_pool(net: Any, X: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        FisherMaskSampler(random_state=0)(net, X(), 1)


def _unknown() -> Any:
    X = da.from_array(np.ones((6, 64)), 3)
    return X[X[:, 0] > 0]


def _bag() -> Any:
    from dask.bag import from_sequence

    return from_sequence([1, 2, 3])


def test_no_client_is_active() -> None:
    X = da.ones((4, 2))
    assert is_dask(X)
    assert not is_dask(np.ones(3))
    assert client_that_computes(X) is None
