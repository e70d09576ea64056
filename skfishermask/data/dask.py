"""Pools that are Dask arrays: their chunks, and the cluster that is active, if one is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import TypeAlias

import numpy as np
import skorch

from skfishermask.data.batches import N_COMPARED, NetBatches, NetSamples
from skfishermask.data.samples import as_rows, check_finite
from skfishermask.data.types import DaskObject, Data, SampleRole
from skfishermask.jacobian import Inputs


class DaskSamples:
    """Samples in chunks of rows, none of which is computed before it is asked for.

    `transform` turns computed rows into what the network sees. TypeError at another collection of
    Dask's than an array; ValueError if it holds no numbers, or if the lengths of its chunks are
    unknown.
    """

    role = SampleRole.POOL

    def __init__(
        self,
        net: skorch.NeuralNet,
        array: DaskObject,
        transform: Callable[[Data], Data],
        batch_size: int | None = None,
    ) -> None:
        import dask.array as da

        if not isinstance(array, da.Array):
            raise TypeError(
                f"Of Dask's collections X_pool may be a dask.array.Array, found "
                f"{type(array).__name__}. A DataFrame's to_dask_array(lengths=True) gives one, and "
                "the data of an xarray.DataArray is one."
            )
        if array.ndim == 0 or array.dtype.kind not in "biuf":
            raise ValueError(
                "Expected numbers in X_pool, one row a sample, found a dask.array of dtype "
                f"{array.dtype} with {array.ndim} axes."
            )
        if np.isnan(array.shape).any():
            raise ValueError(
                f"The lengths of X_pool's chunks must be known, found shape {array.shape}. "
                "X_pool.compute_chunk_sizes() finds them out."
            )
        self._net, self._batch_size = net, batch_size
        self.array = array.rechunk(dict.fromkeys(range(1, array.ndim), -1))
        self.transform = transform
        # First row of each chunk, and the number of rows.
        self.starts = np.cumsum([0, *self.array.chunks[0]])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def chunks(self) -> list[DaskObject]:
        """List the chunks, each an array once it is computed."""
        chunks: list[DaskObject] = self.array.to_delayed().ravel().tolist()
        return chunks

    def head(self, n: int) -> tuple[Data, NetBatches]:
        """Compute at most `N_COMPARED` first samples, for ``predict``, and their batches."""
        data = as_rows(self.transform(self._first_rows[:n]), self.role.argument)
        return data, NetBatches(self._net, data, batch_size=self._batch_size)

    @cached_property
    def _first_rows(self) -> np.ndarray:
        return np.asarray(self.array[:N_COMPARED].compute())

    def batches(self, rows: np.ndarray | None = None) -> ChunkBatches:
        """Return some rows, ascending, or all: computed in this process."""
        rows = np.arange(len(self)) if rows is None else rows
        return ChunkBatches(self._net, self, rows, self._batch_size)

    def rows_by_chunk(self, rows: np.ndarray) -> list[tuple[int, slice]]:
        """Return each chunk that has some of these rows, ascending, and which of them it has."""
        edges = np.searchsorted(rows, self.starts)
        cuts = enumerate(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True))
        return [(chunk, slice(a, b)) for chunk, (a, b) in cuts if a < b]


# Samples that a net reads.
Source: TypeAlias = NetSamples | DaskSamples


def chunk_batches(
    net: skorch.NeuralNet,
    chunk: Data,
    rows: np.ndarray,
    start: int,
    transform: Callable[[Data], Data],
    batch_size: int | None,
) -> NetBatches:
    """Return the network's inputs from one computed chunk, with the pool's rows for messages.

    `rows` are counted from the pool's first, in which the chunk begins at row `start`. Raises
    ValueError at NaN or infinity.
    """
    data = as_rows(transform(np.asarray(chunk)), "X_pool")
    check_finite(data, "X_pool", start)
    batches = NetBatches(net, data, rows - start, batch_size)
    batches.rows = rows
    return batches


class ChunkBatches(NetBatches):
    """The network's inputs from chunks that this process computes, one after the other.

    No batch spans two chunks, and the rows are ascending.
    """

    def __init__(
        self,
        net: skorch.NeuralNet,
        samples: DaskSamples,
        rows: np.ndarray,
        batch_size: int | None,
    ) -> None:
        self._net, self._samples, self._batch_size = net, samples, batch_size
        self.role, self.rows = samples.role, rows

    def __len__(self) -> int:
        """Return the number of batches: one a chunk at least."""
        size = NetBatches.size_of(self._net, self._batch_size)
        chunks = self._samples.rows_by_chunk(self.rows)
        return sum(1 if size == -1 else -(-(c.stop - c.start) // size) for _, c in chunks)

    def __iter__(self) -> Iterator[Inputs]:
        """Yield tensors on the net's device, what its module's forward takes first."""
        samples, chunks = self._samples, self._samples.chunks()
        for number, positions in samples.rows_by_chunk(self.rows):
            rows, start = self.rows[positions], int(samples.starts[number])
            chunk = chunks[number].compute()
            yield from chunk_batches(
                self._net, chunk, rows, start, samples.transform, self._batch_size
            )
