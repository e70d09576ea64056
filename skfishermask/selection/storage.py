"""Storage of embeddings: on the computing device, in the host's memory, or in a scratch file.

It is read in chunks on the computing device, in the order of the samples.
"""

from __future__ import annotations

import io
import math
import shutil
import tempfile
import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import psutil
import torch
from torch import Tensor

from skfishermask.selection.linalg import Product, QuadraticForm, lower_products

EMBEDDING_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}
# Of one chunk of an embedding.
_CHUNK_BYTES = 2**23
# Chunks on a GPU are larger by this factor, lest the calls take longer than the reading.
_CUDA_CHUNK_FACTOR = 16
# Of the products of embeddings and picks' factors that are held at a time.
_PRODUCT_BYTES = 2**23
# Rows r of a chunk, about: MKL multiplies fewer than 370 at half the rate.
_MIN_CHUNK_VECTORS = 512


@dataclass(frozen=True)
class Location:
    """The memory of one machine, as far as embeddings may take it."""

    device: torch.device  # that computes with them
    memory_share: float  # share of the free memory to take; a file may take all there is
    folder: str | None  # for a scratch file; None: the system's temporary folder

    @property
    def scratch_folder(self) -> str:
        """The folder of a scratch file."""
        return self.folder or tempfile.gettempdir()


class StoredEmbedding(ABC):
    """Fisher embeddings of n samples, `shape` (n, r, k), kept in `dtype` in some kind of memory.

    They are computed with on `device`, in the `work_dtype`: float64 where they are float64, else
    float32. Users read the `storage_name`.
    """

    storage_name: str

    def __init__(
        self, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str
    ) -> None:
        self.shape = torch.Size(shape)
        self.dtype = dtype
        self.work_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self.device = torch.device(device)

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def n_bytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def is_fetched(self) -> bool:
        """Whether chunks come from elsewhere than the memory of the computing device."""
        return True

    @property
    def chunk_rows(self) -> int:
        """How many samples a chunk holds, at most."""
        r, k = self.shape[1:]
        room = _CHUNK_BYTES * (_CUDA_CHUNK_FACTOR if self.device.type == "cuda" else 1)
        wanted = math.ceil(len(self) * r * k * self.work_dtype.itemsize / room)
        # Of one size, lest the last one be too small.
        n_chunks = max(1, min(wanted, len(self) * r // _MIN_CHUNK_VECTORS))
        return max(1, math.ceil(len(self) / n_chunks))

    def chunks(self, dtype: torch.dtype | None = None) -> Iterator[tuple[slice, Tensor]]:
        """Read the whole embedding once: yield slices of samples, and their embeddings on `device`.

        These are in `dtype`, or else the `work_dtype`; not to be written to, and valid until the
        next ones.
        """
        dtype = dtype or self.work_dtype
        size = self.chunk_rows
        chunks = [slice(a, min(len(self), a + size)) for a in range(0, len(self), size)]
        room: Tensor | None = None
        for chunk, values in zip(chunks, self._read(chunks), strict=True):
            if values.dtype == dtype:
                yield chunk, values
            else:
                # Memory that was written to before is much faster than new memory.
                if room is None:
                    room = torch.empty_like(values, dtype=dtype)
                yield chunk, room[: len(values)].copy_(values)

    def information(self, most_rows: int) -> Iterator[tuple[int, Iterator[Product]]]:
        """Yield numbers of samples, and products that make up their sum of V^T V.

        Each is (a, b, A, B), for A^T B in columns a to b of the lower triangle, rows from a on; it
        sums up at most `most_rows` rows, or one sample.
        """
        for _, v in self.chunks():
            for some in v.split(max(1, most_rows // v.shape[1])):
                yield len(some), lower_products(some.reshape(-1, v.shape[2]))

    def quadratic_forms(
        self, forms: Sequence[QuadraticForm]
    ) -> Iterator[tuple[slice, Tensor, list[tuple[Tensor, Tensor]]]]:
        """Yield slices of samples, their norms, and of each form V Q V^T and a bound of its error.

        All are computed in float64.
        """
        for chunk, v in self.chunks(torch.float64):
            norms = torch.linalg.vector_norm(v.flatten(1), dim=1)
            yield chunk, norms, [form(v, norms) for form in forms]

    def products(self, factors: Tensor) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """Multiply all embeddings with factors (k, width), in their dtype, a group at a time.

        Yields the group, its products, (m, r, width), valid until the next ones, and squares of
        what the bound of errors, |V| times a column's norm, lacks, (m, width), or None if that is
        nothing. What follows are small operations, so a group is many chunks of the embedding.
        """
        (n, r, k), width, dtype = self.shape, factors.shape[1], factors.dtype
        size = self.chunk_rows
        rows = min(n, size * max(1, _PRODUCT_BYTES // (size * r * width * dtype.itemsize)))
        products, start = factors.new_empty((rows, r, width)), 0
        for chunk, v in self.chunks(dtype):
            into = products[chunk.start - start : chunk.stop - start]
            torch.mm(v.reshape(-1, k), factors, out=into.view(-1, width))
            if chunk.stop - start == rows or chunk.stop == n:
                yield slice(start, chunk.stop), products[: chunk.stop - start], None
                start = chunk.stop

    @abstractmethod
    def write(self, start: int, values: Tensor) -> None:
        """Write the embeddings of the samples from `start` on."""

    @abstractmethod
    def columns(self, start: int, stop: int) -> Tensor:
        """Read some columns of all embeddings, (n, r, stop - start), on `device`."""

    @abstractmethod
    def take(self, rows: Tensor | Sequence[int]) -> Tensor:
        """Read the embeddings of some samples."""

    @abstractmethod
    def _read(self, chunks: Sequence[slice]) -> Iterator[Tensor]:
        """Yield chunk after chunk, on `device`."""


class AllocatedEmbedding(StoredEmbedding):
    """Embeddings for which room is looked for and allocated, before they are written."""

    @classmethod
    @abstractmethod
    def room_bytes(cls, where: Location) -> float:
        """Return the bytes that an embedding may take there; below 0 where there is none."""

    @classmethod
    @abstractmethod
    def allocate(
        cls, shape: Sequence[int], dtype: torch.dtype, where: Location, cleanup: ExitStack
    ) -> AllocatedEmbedding:
        """Return an embedding to be written, which lasts until the cleanup at least."""


class TensorEmbedding(AllocatedEmbedding):
    """Embeddings in a tensor, on the computing device or else in the host's memory.

    Where that `device` is on CUDA, the next chunk travels while one is computed with, if the tensor
    is in pinned memory.
    """

    storage_name = "memory"

    def __init__(self, values: Tensor, device: torch.device | None = None) -> None:
        super().__init__(values.shape, values.dtype, device or values.device)
        self._values = values

    @classmethod
    def room_bytes(cls, where: Location) -> float:
        return where.memory_share * free_bytes(where.device)

    @classmethod
    def allocate(
        cls, shape: Sequence[int], dtype: torch.dtype, where: Location, cleanup: ExitStack
    ) -> AllocatedEmbedding:
        return TensorEmbedding(torch.empty(tuple(shape), dtype=dtype, device=where.device))

    @property
    def is_fetched(self) -> bool:
        return self._values.device != self.device

    def write(self, start: int, values: Tensor) -> None:
        self._values[start : start + len(values)] = values

    def columns(self, start: int, stop: int) -> Tensor:
        return self._values[:, :, start:stop].to(self.device)

    def take(self, rows: Tensor | Sequence[int]) -> Tensor:
        index = torch.as_tensor(rows, dtype=torch.int64, device=self._values.device)
        return self._values.index_select(0, index).to(self.device)

    def _read(self, chunks: Sequence[slice]) -> Iterator[Tensor]:
        if not self.is_fetched or not chunks or self.device.type != "cuda":
            yield from (self._values[chunk].to(self.device) for chunk in chunks)
            return
        stream = torch.cuda.Stream(self.device)

        def send(chunk: slice) -> Tensor:
            with torch.cuda.stream(stream):
                return self._values[chunk].to(self.device, non_blocking=True)

        sent = send(chunks[0])
        for following in [*chunks[1:], None]:
            now = torch.cuda.current_stream(self.device)
            now.wait_stream(stream)
            # It was allocated for the other stream, and must not be given away while in use here.
            sent.record_stream(now)
            values, sent = sent, sent if following is None else send(following)
            yield values


class HostEmbedding(TensorEmbedding):
    """Embeddings in the host's memory, pinned, for a CUDA device."""

    storage_name = "host memory"

    @classmethod
    def room_bytes(cls, where: Location) -> float:
        host = torch.device("cpu")
        return where.memory_share * free_bytes(host) if where.device.type == "cuda" else -1

    @classmethod
    def allocate(
        cls, shape: Sequence[int], dtype: torch.dtype, where: Location, cleanup: ExitStack
    ) -> AllocatedEmbedding:
        values = torch.empty(tuple(shape), dtype=dtype)
        _pin(values, where.device, cleanup)
        return cls(values, where.device)


class ScratchEmbedding(AllocatedEmbedding):
    """Embeddings in a temporary file, which is gone when it is closed or the process ends.

    The file is read, not mapped: pages of a map would count as memory of this process. The
    operating system keeps of it in free memory what it can.
    """

    storage_name = "scratch file"

    def __init__(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device | str,
        folder: str | Path | None = None,
    ) -> None:
        super().__init__(shape, dtype, device)
        self._row_bytes = math.prod(self.shape[1:]) * dtype.itemsize
        self._lock = threading.Lock()
        self._folder = str(folder or tempfile.gettempdir())
        # Closed by __exit__; where files have no name of their own, a killed process leaves none.
        self._file: io.FileIO = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    @classmethod
    def room_bytes(cls, where: Location) -> float:
        return shutil.disk_usage(where.scratch_folder).free

    @classmethod
    def allocate(
        cls, shape: Sequence[int], dtype: torch.dtype, where: Location, cleanup: ExitStack
    ) -> AllocatedEmbedding:
        return cleanup.enter_context(cls(shape, dtype, where.device, where.folder))

    def write(self, start: int, values: Tensor) -> None:
        values = values.to("cpu", self.dtype).contiguous()
        try:
            self._transfer(self._file.write, start * self._row_bytes, values)
        except OSError as error:
            n_left = gigabytes((len(self) - start) * self._row_bytes)
            raise OSError(
                error.errno,
                f"{error.strerror}: {n_left} of the Fisher embedding are still to be written to "
                "the scratch file. Set scratch_folder to a folder with more room, or make the "
                "embedding smaller by mask_fraction, max_candidates, n_directions or "
                "embedding_dtype",
                self._folder,
            ) from error

    def columns(self, start: int, stop: int) -> Tensor:
        n, r, k = self.shape
        values = torch.empty(n * r, stop - start, dtype=self.dtype)
        for number, row in enumerate(values):
            offset = (number * k + start) * self.dtype.itemsize
            self._transfer(self._file.readinto, offset, row)
        return values.view(n, r, -1).to(self.device)

    def take(self, rows: Tensor | Sequence[int]) -> Tensor:
        samples = [self._load(slice(row, row + 1)) for row in torch.as_tensor(rows).tolist()]
        empty = torch.empty(0, *self.shape[1:], dtype=self.dtype)
        return torch.cat([empty, *samples]).to(self.device)

    def _load(self, chunk: slice) -> Tensor:
        values = torch.empty(chunk.stop - chunk.start, *self.shape[1:], dtype=self.dtype)
        self._transfer(self._file.readinto, chunk.start * self._row_bytes, values)
        return values

    def _transfer(self, move: Callable[[memoryview], int], offset: int, values: Tensor) -> None:
        view = values.flatten().view(torch.uint8).numpy().data
        with self._lock:
            self._file.seek(offset)
            while view:  # The system may move less at a time.
                moved = move(view)
                if not moved:
                    row = offset // self._row_bytes
                    raise OSError(f"The scratch file of embeddings ended at row {row}.")
                view = view[moved:]

    def _read(self, chunks: Sequence[slice]) -> Iterator[Tensor]:
        if not chunks:
            return
        # A thread reads the next chunk while one is computed with.
        with ThreadPoolExecutor(1) as pool:
            ahead = pool.submit(self._load, chunks[0])
            for following in [*chunks[1:], None]:
                values = ahead.result()
                if following is not None:
                    ahead = pool.submit(self._load, following)
                yield values.to(self.device)


def stored(embedding: Tensor | StoredEmbedding) -> StoredEmbedding:
    """Return a tensor as a stored embedding; stored ones as they are."""
    return TensorEmbedding(embedding) if isinstance(embedding, Tensor) else embedding


# In the order in which they are tried.
STORAGES: tuple[type[AllocatedEmbedding], ...] = (
    TensorEmbedding,
    HostEmbedding,
    ScratchEmbedding,
)


def _pin(values: Tensor, device: torch.device, cleanup: ExitStack) -> None:
    """Pin memory of the host for a device, until the cleanup.

    PyTorch's own pinned memory takes up to twice the room, and stays with the process.
    """
    runtime = torch.cuda.cudart()
    error = int(runtime.cudaHostRegister(values.data_ptr(), values.nbytes, 0))
    if error:
        warnings.warn(
            f"{gigabytes(values.nbytes)} of the host's memory could not be pinned for {device} "
            f"(CUDA error {error}), so that embeddings travel to it more slowly.",
            UserWarning,
            stacklevel=2,
        )
        return

    def release() -> None:
        torch.cuda.synchronize(device)
        runtime.cudaHostUnregister(values.data_ptr())

    cleanup.callback(release)


def gigabytes(n_bytes: float) -> str:
    """Return a number of bytes as text."""
    return f"{n_bytes / 1e9:.2f} GB"


def free_bytes(device: torch.device) -> int:
    """Return the bytes of free memory."""
    if device.type != "cuda":
        return int(psutil.virtual_memory().available)
    # PyTorch keeps what was freed for itself; the driver counts that as taken.
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def chunk_bytes(n: int, r: int, k: int) -> int:
    """Return the most bytes that a chunk of an embedding takes in float64."""
    return min(8 * n * r * k, max(2 * _CHUNK_BYTES, 8 * (_MIN_CHUNK_VECTORS + r) * k))


def state_bytes(n: int, r: int) -> int:
    """Return the bytes of one state of n candidates."""
    return 8 * n * (2 * r * r + 4)
