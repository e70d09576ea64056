"""Where embeddings lie: on the device that computes, in the host's memory, or in a scratch file.

Whoever reads them sees chunks on the computing device, in the order of the samples. How much memory
a query needs, and where its embeddings go, is here too.
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

EMBEDDING_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}
# Selection holds the Fisher matrices, their factors and products: so many k x k in float64.
_N_MATRICES = 6
# It also holds A, B and bounds of every candidate, before a step that it tries and after it. It
# tries more at a time where there is room.
_N_STATES = 2
# Of one chunk of an embedding.
_CHUNK_BYTES = 2**23
# A GPU reads so many times that in the time that the calls for a chunk take.
_LARGER_ON_CUDA = 16
# Rows r of a chunk, about: MKL multiplies fewer than 370 at half the rate.
_CHUNK_VECTORS = 512


class StoredEmbedding(ABC):
    """Fisher embeddings of n samples, (n, r, k), wherever they lie.

    Parameters
    ----------
    shape : sequence of int
        (n, r, k).
    dtype : torch.dtype
        In which they are kept.
    device : torch.device or str
        On which they are computed with, and where chunks are given.

    Attributes
    ----------
    shape, dtype, device
        As above.
    work_dtype : torch.dtype
        In which they are computed with: float64 where they are float64, else float32.
    """

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
        room = _CHUNK_BYTES * (_LARGER_ON_CUDA if self.device.type == "cuda" else 1)
        wanted = math.ceil(len(self) * r * k * self.work_dtype.itemsize / room)
        # Of one size, lest the last one be too small.
        n_chunks = max(1, min(wanted, len(self) * r // _CHUNK_VECTORS))
        return max(1, math.ceil(len(self) / n_chunks))

    def chunks(self, dtype: torch.dtype | None = None) -> Iterator[tuple[slice, Tensor]]:
        """Read all of it once.

        Parameters
        ----------
        dtype : torch.dtype, optional
            Of the values given. None: `work_dtype`.

        Yields
        ------
        part : slice
            Which samples.
        values : Tensor of shape (m, r, k)
            Theirs, on `device`; not to be written to, and only valid until the next ones.
        """
        dtype = dtype or self.work_dtype
        size = self.chunk_rows
        parts = [slice(a, min(len(self), a + size)) for a in range(0, len(self), size)]
        room: Tensor | None = None
        for part, values in zip(parts, self._read(parts), strict=True):
            if values.dtype == dtype:
                yield part, values
            else:
                # Memory that was written to before is much faster than new memory.
                if room is None:
                    room = torch.empty_like(values, dtype=dtype)
                yield part, room[: len(values)].copy_(values)

    @abstractmethod
    def write(self, start: int, values: Tensor) -> None:
        """Keep the embeddings of some samples."""

    @abstractmethod
    def take(self, rows: Tensor | Sequence[int]) -> Tensor:
        """Read the embeddings of some samples."""

    @abstractmethod
    def _read(self, parts: Sequence[slice]) -> Iterator[Tensor]:
        """Give part after part, on `device`."""


class TensorEmbedding(StoredEmbedding):
    """Embeddings in a tensor, on the computing device or else in the host's memory.

    Parameters
    ----------
    values : Tensor of shape (n, r, k), floating point
        The embeddings, or room for them.
    device : torch.device, optional
        The computing device; None: the tensor's. Where it is on CUDA, the next chunk travels
        while one is computed with, if the tensor is in pinned memory.
    """

    def __init__(self, values: Tensor, device: torch.device | None = None) -> None:
        super().__init__(values.shape, values.dtype, device or values.device)
        self._values = values

    @property
    def is_fetched(self) -> bool:  # noqa: D102, see StoredEmbedding
        return self._values.device != self.device

    def write(self, start: int, values: Tensor) -> None:  # noqa: D102, see StoredEmbedding
        self._values[start : start + len(values)] = values

    def take(self, rows: Tensor | Sequence[int]) -> Tensor:  # noqa: D102, see StoredEmbedding
        index = torch.as_tensor(rows, dtype=torch.int64, device=self._values.device)
        return self._values.index_select(0, index).to(self.device)

    def _read(self, parts: Sequence[slice]) -> Iterator[Tensor]:
        if not self.is_fetched or not parts:
            yield from (self._values[part] for part in parts)
            return
        if self.device.type != "cuda":
            yield from (self._values[part].to(self.device) for part in parts)
            return
        stream = torch.cuda.Stream(self.device)

        def send(part: slice) -> Tensor:
            with torch.cuda.stream(stream):
                return self._values[part].to(self.device, non_blocking=True)

        sent = send(parts[0])
        for following in [*parts[1:], None]:
            now = torch.cuda.current_stream(self.device)
            now.wait_stream(stream)
            # It was allocated for the other stream, and must not be given away while in use here.
            sent.record_stream(now)
            values, sent = sent, sent if following is None else send(following)
            yield values


class ScratchEmbedding(StoredEmbedding):
    """Embeddings in a temporary file, which is gone when it is closed or the process ends.

    The file is read, not mapped: pages of a map would count as memory of this process. What the
    operating system can keep of it in memory that is free, it does.

    Parameters
    ----------
    shape : sequence of int
        (n, r, k).
    dtype : torch.dtype
        In which the embeddings are kept.
    device : torch.device or str
        On which they are computed with.
    folder : str or Path, optional
        Where to put the file. None: the system's temporary folder.
    """

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
        # Closed by __exit__; where files have no name of their own, a killed process leaves none.
        self._file: io.FileIO = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def write(self, start: int, values: Tensor) -> None:  # noqa: D102, see StoredEmbedding
        self._transfer(self._file.write, start, values.to("cpu", self.dtype).contiguous())

    def take(self, rows: Tensor | Sequence[int]) -> Tensor:  # noqa: D102, see StoredEmbedding
        found = [self._load(slice(row, row + 1)) for row in torch.as_tensor(rows).tolist()]
        empty = torch.empty(0, *self.shape[1:], dtype=self.dtype)
        return torch.cat([empty, *found]).to(self.device)

    def _load(self, part: slice) -> Tensor:
        values = torch.empty(part.stop - part.start, *self.shape[1:], dtype=self.dtype)
        self._transfer(self._file.readinto, part.start, values)
        return values

    def _transfer(self, move: Callable[[memoryview], int], start: int, values: Tensor) -> None:
        view = values.flatten().view(torch.uint8).numpy().data
        with self._lock:
            self._file.seek(start * self._row_bytes)
            while view:  # The system may move less at a time.
                moved = move(view)
                if not moved:
                    raise OSError(f"The scratch file of embeddings ended at row {start}.")
                view = view[moved:]

    def _read(self, parts: Sequence[slice]) -> Iterator[Tensor]:
        if not parts:
            return
        # A thread reads the next part while one is computed with.
        with ThreadPoolExecutor(1) as pool:
            ahead = pool.submit(self._load, parts[0])
            for following in [*parts[1:], None]:
                values = ahead.result()
                if following is not None:
                    ahead = pool.submit(self._load, following)
                yield values.to(self.device)


def stored(embedding: Tensor | StoredEmbedding) -> StoredEmbedding:
    """Give a tensor the interface of a stored embedding."""
    return TensorEmbedding(embedding) if isinstance(embedding, Tensor) else embedding


@dataclass(frozen=True)
class Needs:
    """Memory that a query needs beside the network.

    Attributes
    ----------
    n, r, k : int
        Candidates, directions and masked parameters.
    dtype : torch.dtype
        Of the embedding.
    n_labeled : int, default=0
        Labelled samples.
    reading : int, default=0
        Bytes that reading the network holds at most while V is written.
    """

    n: int
    r: int
    k: int
    dtype: torch.dtype
    n_labeled: int = 0
    reading: int = 0

    @property
    def dimensions(self) -> int:
        """In which the choice is made: the parameters, or the rows if these are fewer."""
        return min(self.k, (self.n + self.n_labeled) * self.r)

    @property
    def embedding(self) -> int:
        """Of V."""
        return self.n * self.r * self.k * self.dtype.itemsize

    @property
    def matrices(self) -> int:
        """Of the matrices, which are as large as the dimensions worked in."""
        return _N_MATRICES * 8 * self.dimensions**2

    @property
    def states(self) -> int:
        """Of the candidates' state in the selection."""
        return _N_STATES * state_bytes(self.n, self.r)


@dataclass(frozen=True)
class Room:
    """Where there is memory for a query on one machine.

    Attributes
    ----------
    device : torch.device
        Where the network is.
    share : float
        Share of the free memory that embeddings may take.
    folder : str or None
        For a scratch file. None: the system's temporary folder.
    """

    device: torch.device
    share: float
    folder: str | None

    def place(self, needs: Needs) -> str:
        """Say where the embedding goes.

        Raises
        ------
        MemoryError
            If none is, or the rest of the selection is too large for the device.
        """
        host = psutil.virtual_memory().available
        on_cuda, free = self.device.type == "cuda", free_bytes(self.device)
        others = needs.matrices + needs.states
        beside = max(others, needs.reading)  # First one, then the other.
        if needs.embedding <= self.share * free and needs.embedding + beside <= free:
            return "memory"
        if on_cuda and needs.embedding <= self.share * host:
            place, room = "host memory", host
        else:
            place, folder = "scratch file", self.folder or tempfile.gettempdir()
            room = shutil.disk_usage(folder).free
        if others > free or needs.embedding > room:
            where = "" if place == "host memory" else f" and {gigabytes(room)} in {folder}"
            raise MemoryError(
                f"The Fisher embedding of {needs.n} candidates x {needs.r} directions x "
                f"{needs.k} parameters needs {gigabytes(needs.embedding)}, the "
                f"{needs.dimensions} x {needs.dimensions} Fisher matrices "
                f"{gigabytes(needs.matrices)} and the candidates' gains "
                f"{gigabytes(needs.states)}, but {gigabytes(free)} are free on "
                f"{self.device}{where}. mask_fraction makes the first two smaller; max_candidates "
                "and n_directions the first and the last; embedding_dtype the first. An embedding "
                "larger than memory_share of the free memory goes to a file in scratch_folder."
            )
        return place

    def make(self, place: str, needs: Needs, cleanup: ExitStack) -> StoredEmbedding:
        """Make an embedding to be written."""
        shape, dtype, device = (needs.n, needs.r, needs.k), needs.dtype, self.device
        if place == "scratch file":
            return cleanup.enter_context(ScratchEmbedding(shape, dtype, device, self.folder))
        if place == "host memory":
            values = torch.empty(shape, dtype=dtype)
            _pin(values, device, cleanup)
            return TensorEmbedding(values, device)
        return TensorEmbedding(torch.empty(shape, dtype=dtype, device=device))


def _pin(values: Tensor, device: torch.device, cleanup: ExitStack) -> None:
    """Let a device read memory of the host by itself, until the cleanup.

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
    """Say how large something is."""
    return f"{n_bytes / 1e9:.2f} GB"


def free_bytes(device: torch.device) -> int:
    """Say how much memory is free."""
    if device.type != "cuda":
        return int(psutil.virtual_memory().available)
    # PyTorch keeps what was freed for itself; the driver counts that as taken.
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def state_bytes(n: int, r: int) -> int:
    """Say how large a state of the candidates is."""
    return 8 * n * (2 * r * r + 4)
