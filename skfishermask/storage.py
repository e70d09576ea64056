"""Where embeddings lie: on the device that computes, in the host's memory, or in a scratch file.

Whoever reads them sees chunks on the computing device, in the order of the samples.
"""

from __future__ import annotations

import math
import tempfile
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

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
        """Size in bytes.

        Returns
        -------
        int
            Of the embeddings as they are kept.
        """
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def is_fetched(self) -> bool:
        """Whether chunks come from elsewhere than the memory of the computing device.

        Returns
        -------
        bool
            Then it pays to use what is read for several picks.
        """
        return True

    @property
    def chunk_rows(self) -> int:
        """How many samples a chunk holds, at most.

        Returns
        -------
        int
            At least one.
        """
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
        """Keep the embeddings of some samples.

        Parameters
        ----------
        start : int
            Number of the first of them.
        values : Tensor of shape (m, r, k)
            Converted to `dtype`.
        """

    @abstractmethod
    def take(self, rows: Sequence[int]) -> Tensor:
        """Read the embeddings of some samples.

        Parameters
        ----------
        rows : sequence of int
            Their numbers.

        Returns
        -------
        Tensor of shape (m, r, k)
            In `dtype`, on `device`.
        """

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
        The computing device; None: the tensor's. With CUDA and a tensor in the host's pinned
        memory, the next chunk travels while one is computed with.
    """

    def __init__(self, values: Tensor, device: torch.device | None = None) -> None:
        super().__init__(values.shape, values.dtype, device or values.device)
        self._values = values

    @property
    def is_fetched(self) -> bool:  # noqa: D102, see StoredEmbedding
        return self._values.device != self.device

    def write(self, start: int, values: Tensor) -> None:  # noqa: D102, see StoredEmbedding
        self._values[start : start + len(values)] = values

    def take(self, rows: Sequence[int]) -> Tensor:  # noqa: D102, see StoredEmbedding
        index = torch.tensor(rows, dtype=torch.int64, device=self._values.device)
        return self._values[index].to(self.device)

    def _read(self, parts: Sequence[slice]) -> Iterator[Tensor]:
        if not self.is_fetched or not parts:
            yield from (self._values[part] for part in parts)
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
        self._file: Any = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()

    def write(self, start: int, values: Tensor) -> None:  # noqa: D102, see StoredEmbedding
        self._transfer(self._file.write, start, values.to("cpu", self.dtype).contiguous())

    def take(self, rows: Sequence[int]) -> Tensor:  # noqa: D102, see StoredEmbedding
        found = [self._load(slice(row, row + 1)) for row in rows]
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
    """Give a tensor the interface of a stored embedding.

    Parameters
    ----------
    embedding : Tensor or StoredEmbedding
        One of these.

    Returns
    -------
    StoredEmbedding
        The same embedding, not copied.
    """
    return TensorEmbedding(embedding) if isinstance(embedding, Tensor) else embedding
