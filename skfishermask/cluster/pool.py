"""A pool on the workers of a Dask cluster: each chunk is read on the worker that has it.

The network is sent to the workers, embeddings are computed and stay where the chunks are, diagonals
and Fisher matrices are summed in a tree, and the greedy loop runs here and sends requests to the
workers, as `skfishermask.cluster.remote` describes. Everything on a worker is the result of a Dask
task (`skfishermask.cluster.worker`), so Dask computes it again where a worker dies.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import cached_property, partial
from typing import Self, TypeVar

import numpy as np
import psutil
import torch
from dask.delayed import delayed
from sklearn.utils import gen_batches
from torch import Tensor

from skfishermask.cluster import worker
from skfishermask.cluster.client import Cluster, Future
from skfishermask.cluster.remote import RemoteCandidatePool
from skfishermask.cluster.shards import Shards
from skfishermask.data import DaskObject, DaskSamples, LayerValue, ReadableNet, covered_predictions
from skfishermask.fisher import ParameterMask, Predictions
from skfishermask.parameters import Settings
from skfishermask.placement import MemoryEstimate, Placement
from skfishermask.pool import Embedded, LocalSamples, picks_bar
from skfishermask.progress import Progress
from skfishermask.selection import (
    Batch,
    SelectionProblem,
    gigabytes,
    select_and_prune,
    state_bytes,
)

T = TypeVar("T")
# Picks to attempt with each request to the workers.
_PICKS_PER_ROUND = 16
# Share of the workers' memory that the states after these may take.
_STATES_SHARE = 0.2
# Matrices that are packed here for the workers or come from them, beside those computed with.
_N_PACKED_MATRICES = 4


class ClusterPool:
    """A pool on a Dask cluster. For the methods see :class:`skfishermask.pool.Pool`.

    The net is read here for the labelled samples, and on the workers for the pool.
    """

    def __init__(
        self,
        net: ReadableNet,
        samples: DaskSamples,
        settings: Settings,
        progress: Progress,
        cluster: Cluster,
    ) -> None:
        self._net, self._samples = net, samples
        self._settings, self._progress = settings, progress
        self._cluster = cluster
        self._estimate: MemoryEstimate | None = None
        self._embeddings: list[Future] = []
        self._round_trips = 0

    def __enter__(self) -> Self:
        self._cluster.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._cluster.__exit__(*error)

    def __len__(self) -> int:
        return len(self._samples)

    @cached_property
    def _packed(self) -> Future:
        """The network on the workers, sent when it is first needed."""
        packed = worker.pack(self._net, self._settings.to_logits, self._samples.transform)
        self._cluster.count("network", len(packed) * self._cluster.n_workers)
        # The argument of a task as well as its result, so it outlives the worker that has it.
        return self._cluster.submit(worker.identity, packed)

    def info(self) -> dict[str, object]:
        return {
            "n_workers": self._cluster.n_workers,
            "n_chunks": len(self._samples.starts) - 1,
            "bytes_moved": self._cluster.n_bytes,
            "round_trips": self._round_trips,
        }

    def place(self, n: int, r: int, k: int, n_others: int, names: Collection[str]) -> Placement:
        dtype, there = self._settings.dtype, self._cluster
        # Chunks lie on several workers, so that nothing is put into the space of the rows.
        estimate = MemoryEstimate(n, r, k, dtype, n_others, uses_row_space=False)
        free = psutil.virtual_memory().available
        matrices = worker.matrices_bytes(k, there.most_threads)
        spread = estimate.embedding_bytes + estimate.gains_bytes
        is_full = matrices > there.least_memory or (
            spread + there.n_workers * matrices > there.memory
        )
        here = estimate.matrices_bytes + _N_PACKED_MATRICES * 8 * k**2
        if here > free or is_full:
            raise MemoryError(
                f"The Fisher embedding of {n} candidates x {r} directions x {k} parameters needs "
                f"{gigabytes(estimate.embedding_bytes)} and the candidates' gains "
                f"{gigabytes(estimate.gains_bytes)}, spread over {there.n_workers} workers, each "
                f"of which needs {gigabytes(matrices)} for {k} x {k} matrices besides. Together "
                f"they may take {gigabytes(there.memory)}, the smallest of them "
                f"{gigabytes(there.least_memory)}. Here the matrices need "
                f"{gigabytes(here)}, where {gigabytes(free)} are free. "
                "mask_fraction, max_candidates, n_directions and embedding_dtype make them "
                "smaller; more workers have more memory."
            )
        self._estimate = estimate
        return Placement(estimate, "cluster")

    def _tasks(
        self, function: Callable[..., object], rows: np.ndarray, *arguments: object
    ) -> list[DaskObject]:
        """Return a task for each chunk that holds some of these rows of the pool, ascending.

        The function takes the network, the chunk, its rows to read, and the `arguments`.
        """
        task, samples = delayed(function, pure=False), self._samples
        chunks, tasks = samples.chunks(), []
        for number, positions in samples.rows_by_chunk(rows):
            first = int(samples.starts[number])
            some = rows[positions]
            chunk_rows = worker.ChunkRows(some, first, positions.start, self._settings.batch_size)
            tasks.append(task(self._packed, chunks[number], chunk_rows, *arguments))
        return tasks

    def diagonal(self, rows: np.ndarray, n_directions: int) -> dict[str, Tensor]:
        tasks = self._tasks(worker.diagonal_of, rows, n_directions)
        *of_chunks, total = self._cluster.compute([*tasks, _tree(tasks)])
        with self._progress.bar(len(of_chunks), "Fisher diagonal", "chunk") as bar:
            self._cluster.wait(of_chunks, bar.update)
        if len(of_chunks) > 1:  # the total of a single one is its own task
            self._cluster.release(of_chunks)
        [(n, sums)] = self._cluster.results([total])
        self._cluster.count("diagonal", sum(value.nbytes for value in sums.values()))
        return {name: value / n for name, value in sums.items()}

    def predicted(self, function: Callable[..., T], rows: np.ndarray) -> list[T]:
        tasks = self._cluster.compute(self._tasks(worker.predicted_of, rows, function))
        with self._progress.bar(len(tasks), "Predictions", "chunk") as bar:
            values: list[T] = self._cluster.results(tasks, bar.update)
        self._cluster.count("predictions", sum(getattr(value, "nbytes", 0) for value in values))
        return values

    def predictions(self, rows: np.ndarray, layer: LayerValue | None) -> Predictions:
        of_chunks = self.predicted(partial(covered_predictions, layer), rows)
        return Predictions.concatenate(of_chunks).to(self._net.device)

    def embed(
        self,
        rows: np.ndarray,
        mask: ParameterMask,
        others: Sequence[LocalSamples],
        wants_fisher: bool,
    ) -> Embedded:
        if self._estimate is None:
            raise RuntimeError("The embedding has no place yet.")
        how = mask, self._estimate.dtype, self._estimate.r
        with self._progress.step("embedding"):
            fisher_of_others = [other.mean_fisher(mask, self._estimate) for other in others]
            tasks = self._tasks(worker.embedding_of, rows, *how)
            fisher_of = delayed(worker.fisher_of, pure=False)
            in_total = [_tree([fisher_of(task) for task in tasks])] if wants_fisher else []
            futures = self._cluster.compute([*tasks, *in_total])
            self._embeddings, totals = futures[: len(tasks)], futures[len(tasks) :]
            with self._progress.bar(len(tasks), "Fisher embedding", "chunk") as bar:
                self._cluster.wait(self._embeddings, bar.update)
        fisher = None
        with self._progress.step("fisher"):
            for n, sums in self._cluster.results(totals):
                fisher = (sums[""] / n).to(self._net.device)
                self._cluster.count("fisher", sums[""].nbytes)
        return Embedded(len(mask), fisher, fisher_of_others)

    @torch.no_grad()
    def select(self, problem: SelectionProblem, preselected: Sequence[int]) -> Batch:
        if self._estimate is None or not self._embeddings:
            raise RuntimeError("The pool was not embedded before it was to be chosen from.")
        n, r, k = self._estimate.n, self._estimate.r, self._estimate.k
        n_chunks = len(self._embeddings)
        n_states = int(min(_STATES_SHARE * self._cluster.memory / state_bytes(n, r), 1e9))
        width = max(1, min(_PICKS_PER_ROUND, n_states - 1, problem.n_instances))
        with self._progress.bar(2, "Preparing", "step") as bar:
            inverse, target = problem.start()
            bar.update(1)
            shards = self._shards(
                worker.InitialState(
                    inverse.cpu() if isinstance(inverse, Tensor) else inverse,
                    target.cpu(),
                    width,
                )
            )
            bar.update(1)
        with picks_bar(self._progress, n, problem) as picked:
            batch = select_and_prune(
                RemoteCandidatePool(shards.send, n_chunks, width, self._net.device),
                inverse,
                problem,
                (n, r, k),
                picks_per_round=width,
                preselected=preselected,
                on_pick=picked.update,
            )
        self._round_trips = shards.round_trips
        return batch

    def _shards(self, start: worker.InitialState) -> Shards:
        """Join the embeddings on each worker."""
        cluster = self._cluster
        shards = [
            cluster.submit(worker.Shard, some, workers=[home], allow_other_workers=True)
            for home, some in cluster.futures_by_worker(self._embeddings).items()
        ]
        cluster.wait(shards)
        cluster.release(self._embeddings)
        self._embeddings = []
        size = start.target.nbytes * (2 if isinstance(start.inverse, Tensor) else 1)
        cluster.count("start", size * len(shards))
        started = cluster.submit(worker.identity, start)
        return Shards(cluster, shards, started, self._settings.dtype, self._net.device)


def _tree(tasks: Sequence[DaskObject]) -> DaskObject:
    """Add the results of tasks in a tree."""
    add = delayed(worker.add_sums, pure=False)
    while len(tasks) > 1:
        tasks = [add(tasks[some]) for some in gen_batches(len(tasks), worker.FAN_IN)]
    return tasks[0]
