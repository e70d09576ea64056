"""Tasks on the workers of a Dask cluster, and the shards of a selection there."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import cloudpickle
import distributed
import numpy as np
import torch
from torch import Tensor

from skfishermask.cluster.remote import Block, Reply, Request, merge_replies
from skfishermask.data import (
    Data,
    NetBatches,
    NetModule,
    ReadableNet,
    chunk_batches,
    naming_rows,
    net_from_state,
    net_state,
    to_logits_of,
)
from skfishermask.fisher import (
    ParameterMask,
    diagonal_sums,
    embedding_blocks,
    fisher_matrix,
)
from skfishermask.jacobian import ToOutputs
from skfishermask.selection import LocalCandidatePool, Pick, stored

S = TypeVar("S")
T = TypeVar("T")
# Sums that are added in one task.
FAN_IN = 4
# Matrices that a worker holds for all of its threads, and for each thread.
_N_SHARED_MATRICES, _N_THREAD_MATRICES = 2 * FAN_IN, 4
# Results of tasks that are added up: the number of samples, and sums over them.
Sums = tuple[int, dict[str, Tensor]]


def pack(net: ReadableNet, to_logits: ToOutputs | None, transform: Callable[[Data], Data]) -> bytes:
    """Return what a task needs to read a chunk, pickled: the network and a transform of samples."""
    reading = net.module.criteria, to_logits, net.likelihood, transform
    packed: bytes = cloudpickle.dumps((*net_state(net.net), *reading))
    return packed


@dataclass(frozen=True)
class ChunkRows:
    """Samples of one chunk that a task reads."""

    rows: np.ndarray  # in the pool
    start: int  # the row of the chunk's first sample in the pool
    position: int  # the number of the first of them among all that are read, in all chunks
    batch_size: int | None  # None: the net's own

    @contextmanager
    def read(self, packed: bytes, chunk: Data) -> Iterator[tuple[ReadableNet, NetBatches]]:
        """Return the network and the batches of its inputs."""
        # Anew in each task, because the tasks of a worker share its memory.
        kind, state, criteria, to_logits, likelihood, transform = cloudpickle.loads(packed)
        net = net_from_state(kind, state, "cuda" if torch.cuda.is_available() else "cpu")
        batches = chunk_batches(net, chunk, self.rows, self.start, transform, self.batch_size)
        module = NetModule(net, criteria)
        readable = ReadableNet(net, module, to_logits_of(net, to_logits, likelihood), likelihood)
        with naming_rows(batches, readable.to_logits):
            yield readable, batches


def diagonal_of(packed: bytes, chunk: Data, samples: ChunkRows, r: int) -> Sums:
    """Return the sum of the diagonal Fisher information of a chunk's samples."""
    with samples.read(packed, chunk) as (net, batches):
        n, sums = diagonal_sums(
            net.module, batches, n_directions=r, first_row=samples.position, **net.read_options
        )
    return n, {name: total.cpu() for name, total in sums.items()}


def predicted_of(packed: bytes, chunk: Data, samples: ChunkRows, function: Callable[..., T]) -> T:
    """Return a function of the predictions of a chunk's samples, see `Pool.predicted`."""
    with samples.read(packed, chunk) as (net, batches):
        value = function(net.module, batches, **net.read_options)
    there: T = value.to("cpu") if hasattr(value, "to") else value
    return there


class ChunkEmbedding:
    """Fisher embeddings of one chunk's candidates, and the position of the first."""

    def __init__(self, position: int, values: Tensor) -> None:
        self.position = position
        self.values = values

    def __sizeof__(self) -> int:
        return object.__sizeof__(self) + self.values.nbytes


def embedding_of(
    packed: bytes,
    chunk: Data,
    samples: ChunkRows,
    mask: ParameterMask,
    dtype: torch.dtype,
    r: int,
) -> ChunkEmbedding:
    """Return the Fisher embeddings of a chunk's candidates."""
    with samples.read(packed, chunk) as (net, batches):
        values = torch.empty((len(samples.rows), r, len(mask)), dtype=dtype, device=net.device)
        blocks = embedding_blocks(
            net.module,
            batches,
            mask,
            n_directions=r,
            first_row=samples.position,
            **net.read_options,
        )
        start = 0
        for block in blocks:
            values[start : start + len(block)] = block
            start += len(block)
    return ChunkEmbedding(samples.position, values)


@torch.no_grad()
def fisher_of(embedding: ChunkEmbedding) -> Sums:
    """Return the sum of the Fisher matrices of a chunk's candidates."""
    n = len(embedding.values)
    return n, {"": fisher_matrix(embedding.values).cpu().mul_(n)}


def add_sums(several: Sequence[Sums]) -> Sums:
    """Return the sums of sums, in new tensors: results of tasks are not to be changed."""
    total = {name: value.clone() for name, value in several[0][1].items()}
    for _, sums in several[1:]:
        for name, value in sums.items():
            total[name] += value
    return sum(n for n, _ in several), total


def matrices_bytes(k: int, n_threads: int) -> int:
    """Return the bytes of the k x k float64 matrices that a worker holds at a time."""
    return (_N_SHARED_MATRICES + _N_THREAD_MATRICES * n_threads) * 8 * k**2


@dataclass(frozen=True)
class InitialState:
    """M_0^-1 and M_0^-1 F M_0^-1, with which a shard starts, and the picks of a round."""

    inverse: Tensor | float
    target: Tensor
    picks_per_round: int


class Shard:
    """All embeddings on one worker, and the state of the selection there.

    The embeddings are the result of the task. The state follows from them and the picks so far; it
    is not pickled, and a shard that has lost it returns None in place of a reply.
    """

    def __init__(self, embeddings: Sequence[ChunkEmbedding]) -> None:
        self._embeddings = list(embeddings)
        self._blocks: list[Block] = []
        self._number = -1
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[Shard], tuple[list[ChunkEmbedding]]]:
        return Shard, (self._embeddings,)

    def __sizeof__(self) -> int:
        return object.__sizeof__(self) + sum(map(ChunkEmbedding.__sizeof__, self._embeddings))

    @torch.no_grad()
    def initialize(self, start: InitialState, history: Sequence[Pick], number: int) -> None:
        """Compute the state that request `number` expects."""
        device = self._embeddings[0].values.device
        inverse, target = start.inverse, start.target.to(device)
        inverse = inverse.to(device) if isinstance(inverse, Tensor) else inverse
        picks = [pick.to(device) for pick in history]

        def build(embedding: ChunkEmbedding) -> Block:
            with torch.no_grad():
                values, position = stored(embedding.values), embedding.position
                pool = LocalCandidatePool(values, start.picks_per_round, position)
                pool.candidates.initialize(inverse, target)
                pool.apply(picks)
            return Block(pool)

        with self._lock:
            self._blocks = self._map(build, self._embeddings)
            self._number = number

    def reply(self, request: Request) -> Reply | None:
        """Return the reply to a request; None where the state is not the one it expects."""
        with self._lock:
            if request.number != self._number:
                return None
            local = request.to(self._embeddings[0].values.device)

            def reply(block: Block) -> Reply:
                with torch.no_grad():
                    return block.reply(local)

            merged = merge_replies(self._map(reply, self._blocks)).to("cpu")
            self._number += 1
            return merged

    @staticmethod
    def _map(function: Callable[[S], T], items: Sequence[S]) -> list[T]:
        """Apply a function to all items, in as many threads as the worker may use."""
        with ThreadPoolExecutor(distributed.get_worker().state.nthreads) as threads:
            return list(threads.map(function, items))


def ask(
    shard: Shard,
    request: Request,
    start: InitialState | None = None,
    history: Sequence[Pick] = (),
) -> Reply | None:
    """Return a shard's reply to a request; with `start`, after `history` from a new state."""
    if start is not None:
        shard.initialize(start, history, request.number)
    return shard.reply(request)


def identity(value: T) -> T:
    """Return the value, which so becomes the result of a task."""
    return value
