"""What runs on the workers of a Dask cluster: its tasks, and the shards of a selection."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from skfishermask.cluster.remote import Block, Reply, Request, merged
from skfishermask.compat import memory_limit_of
from skfishermask.data import (
    Batches,
    DaskObject,
    Data,
    NetModule,
    ReadableNet,
    UnitInputs,
    chunk_batches,
    naming_rows,
    net_from_state,
    to_logits_of,
)
from skfishermask.fisher import (
    ParameterMask,
    embedding_blocks,
    fisher_diagonal,
    fisher_matrix,
    predicted_probabilities,
)
from skfishermask.selection import LocalCandidatePool, Pick, stored

S = TypeVar("S")
T = TypeVar("T")
# What tasks give to be summed up: the number of samples, and sums over them.
Sums = tuple[int, dict[str, Tensor]]


@dataclass(frozen=True)
class Chunk:
    """Samples of one chunk that a task shall read, and how.

    Attributes
    ----------
    rows : ndarray of int
        Their rows in the pool.
    start : int
        The row of the chunk's first sample in the pool.
    batch_size : int or None
        Samples in a pass; None: the net's own.
    """

    rows: np.ndarray
    start: int
    batch_size: int | None

    @contextmanager
    def read(self, packed: bytes, chunk: Data) -> Iterator[tuple[ReadableNet, Batches]]:
        """Give the network and the batches of its inputs."""
        import cloudpickle

        # Anew in each task, because the tasks of a worker share its memory.
        kind, parts, criteria, to_logits, transform = cloudpickle.loads(packed)
        net = net_from_state(kind, parts, "cuda" if torch.cuda.is_available() else "cpu")
        batches = chunk_batches(net, chunk, self.rows, self.start, transform, self.batch_size)
        readable = ReadableNet(net, NetModule(net, criteria), to_logits_of(net, to_logits))
        with naming_rows(batches, readable.to_logits):
            yield readable, batches


def diagonal_of(packed: bytes, chunk: Data, which: Chunk, r: int) -> Sums:
    """Sum up the diagonal Fisher information of a chunk's samples."""
    with which.read(packed, chunk) as (net, batches):
        means = fisher_diagonal(net.module, batches, n_directions=r, to_logits=net.to_logits)
    n = len(which.rows)
    return n, {name: n * mean.cpu() for name, mean in means.items()}


def probabilities_of(packed: bytes, chunk: Data, which: Chunk) -> Tensor:
    """Predict the class probabilities of a chunk's samples."""
    with which.read(packed, chunk) as (net, batches):
        return predicted_probabilities(net.module, batches, to_logits=net.to_logits).cpu()


def predictions_and_inputs_of(
    packed: bytes, chunk: Data, which: Chunk
) -> tuple[Tensor, Tensor | None]:
    """Give the probabilities, and the inputs flat and of unit length; None: no one length."""
    with which.read(packed, chunk) as (net, batches):
        read = UnitInputs(batches)
        p = predicted_probabilities(net.module, read, to_logits=net.to_logits).cpu()
        inputs = read.together()
        return p, None if inputs is None else inputs.cpu()


class ChunkEmbedding:
    """Fisher embeddings of one chunk's candidates, whose first has this position."""

    def __init__(self, position: int, values: Tensor) -> None:
        self.position = position
        self.values = values

    def __sizeof__(self) -> int:
        return object.__sizeof__(self) + self.values.nbytes


def embedding_of(
    packed: bytes,
    chunk: Data,
    which: Chunk,
    position: int,
    mask: ParameterMask,
    dtype: torch.dtype,
    r: int,
) -> ChunkEmbedding:
    """Embed a chunk's candidates."""
    with which.read(packed, chunk) as (net, batches):
        values = torch.empty((len(which.rows), r, len(mask)), dtype=dtype, device=net.device)
        start = 0
        for block in embedding_blocks(
            net.module,
            batches,
            mask,
            n_directions=r,
            to_logits=net.to_logits,
        ):
            values[start : start + len(block)] = block
            start += len(block)
    return ChunkEmbedding(position, values)


@torch.no_grad()
def fisher_of(part: ChunkEmbedding) -> Sums:
    """Sum up the Fisher matrices of a chunk's candidates."""
    n = len(part.values)
    return n, {"": n * fisher_matrix(part.values).cpu()}


def added(parts: Sequence[Sums]) -> Sums:
    """Add up, into new tensors: results of tasks are not to be changed."""
    names = parts[0][1]
    sums = {name: torch.stack([sums[name] for _, sums in parts]).sum(0) for name in names}
    return sum(n for n, _ in parts), sums


@dataclass(frozen=True)
class Start:
    """What a shard starts from: M_0^-1 and M_0^-1 F M_0^-1, and how it goes on."""

    inverse: Tensor | float
    target: Tensor
    picks_a_round: int


class Shard:
    """All embeddings on one worker, and the state of the selection there.

    The embeddings are what the task gives. The state follows from them and the steps so far; it
    does not travel, and a shard that has lost it says so.
    """

    def __init__(self, parts: Sequence[ChunkEmbedding]) -> None:
        self._parts = list(parts)
        self._blocks: list[Block] = []
        self._number = -1
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[Shard], tuple[list[ChunkEmbedding]]]:
        return Shard, (self._parts,)

    def __sizeof__(self) -> int:
        return object.__sizeof__(self) + sum(map(ChunkEmbedding.__sizeof__, self._parts))

    @torch.no_grad()
    def begin(self, start: Start, history: Sequence[Pick], number: int) -> None:
        """Bring the blocks into the state that question `number` expects."""
        device = self._parts[0].values.device
        inverse, target = start.inverse, start.target.to(device)
        inverse = inverse.to(device) if isinstance(inverse, Tensor) else inverse
        steps = [step.to(device) for step in history]

        def build(part: ChunkEmbedding) -> Block:
            with torch.no_grad():
                pool = LocalCandidatePool(stored(part.values), start.picks_a_round, part.position)
                pool.candidates.start(inverse, target)
                pool.advance(steps)
            return Block(pool)

        with self._lock:
            self._blocks = self._each(build, self._parts)
            self._number = number

    def ask(self, question: Request) -> Reply | None:
        """Answer a question; None: the state is not the one that it expects."""
        with self._lock:
            if question.number != self._number:
                return None
            here = question.to(self._parts[0].values.device)

            def ask(block: Block) -> Reply:
                with torch.no_grad():
                    return block.answer(here)

            found = merged(self._each(ask, self._blocks)).to("cpu")
            self._number += 1
            return found

    @staticmethod
    def _each(act: Callable[[S], T], items: Sequence[S]) -> list[T]:
        """Act on all items, with as many threads as the worker may use."""
        from distributed import get_worker

        with ThreadPoolExecutor(get_worker().state.nthreads) as threads:
            return list(threads.map(act, items))


def ask(
    shard: Shard,
    question: Request,
    start: Start | None = None,
    history: Sequence[Pick] = (),
) -> Reply | None:
    """Put a question to a shard, which a start and what went before bring up to date first."""
    if start is not None:
        shard.begin(start, history, question.number)
    return shard.ask(question)


def identity(value: T) -> T:
    """Give what was sent."""
    return value


def memory_limit(dask_worker: DaskObject) -> int | None:
    """Tell how much memory a worker may take."""
    return memory_limit_of(dask_worker)
