"""A pool on the workers of a Dask cluster: its chunks are read where they are.

The network travels to the workers, embeddings are made and stay where the chunks are, diagonals and
Fisher matrices are summed up in a tree, and the greedy loop runs here and asks the workers as
`skfishermask.cluster.remote` describes. Whatever a worker holds is the result of a Dask task, so
Dask makes it again where a worker dies. `skfishermask.cluster.worker` has what the tasks do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from types import TracebackType
from typing import Self, TypeVar

import numpy as np
import psutil
import torch
from sklearn.utils import gen_batches
from torch import Tensor

from skfishermask.cluster import worker
from skfishermask.cluster.client import Cluster, Future
from skfishermask.cluster.remote import RemoteCandidatePool
from skfishermask.cluster.shards import Shards
from skfishermask.data import DaskObject, DaskSamples, ReadableNet, in_one_length, net_state
from skfishermask.fisher import ParameterMask
from skfishermask.parameters import Settings
from skfishermask.pool import Embedded, LocalSamples, picks_bar
from skfishermask.progress import Progress
from skfishermask.selection import Batch, Needs, SelectionProblem, gigabytes, select_and_prune

T = TypeVar("T")
# Picks to attempt for each question to the workers, and the share of their memory that the states
# of these may take.
_PICKS_A_ROUND, _STATES_SHARE = 16, 0.2
# Sums of so many parts are made at a time.
_FAN_IN = 8


class ClusterPool:
    """A pool on a Dask cluster. For the methods see :class:`skfishermask.pool.Pool`.

    Parameters
    ----------
    net : ReadableNet
        Read here for the labelled samples, and on the workers for the pool.
    samples : DaskSamples
        The pool.
    settings : Settings
        How it is embedded and chosen from.
    progress : Progress
        Is told how far it is.
    cluster : Cluster
        The workers.
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
        self._needs: Needs | None = None
        self._parts: list[Future] = []
        self._round_trips = 0

    def __enter__(self) -> Self:
        self._cluster.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._cluster.__exit__(kind, error, traceback)

    def __len__(self) -> int:
        return len(self._samples)

    @cached_property
    def _packed(self) -> Future:
        """The network on its way to the workers, sent where it is first asked for."""
        import cloudpickle

        how = self._net.module.criteria, self._settings.to_logits, self._samples.transform
        packed = cloudpickle.dumps((*net_state(self._net.net), *how))
        self._cluster.count("network", len(packed) * self._cluster.n_workers)
        # A task's argument, not its result alone: so it outlives the worker that has it.
        return self._cluster.submit(worker.identity, packed)

    def info(self) -> dict[str, object]:  # noqa: D102, see Pool
        return {
            "n_workers": self._cluster.n_workers,
            "n_chunks": len(self._samples.starts) - 1,
            "bytes_moved": self._cluster.n_bytes,
            "round_trips": self._round_trips,
        }

    def place(self, needs: Needs) -> str:  # noqa: D102, see Pool
        free, there = psutil.virtual_memory().available, self._cluster
        if needs.matrices > free or needs.embedding + needs.states > there.memory:
            raise MemoryError(
                f"The Fisher embedding of {needs.n} candidates x {needs.r} directions x "
                f"{needs.k} parameters needs {gigabytes(needs.embedding)} and the candidates' "
                f"gains {gigabytes(needs.states)}; the cluster's {there.n_workers} workers may "
                f"take {gigabytes(there.memory)} together. The {needs.k} x {needs.k} Fisher "
                f"matrices need {gigabytes(needs.matrices)} here, where {gigabytes(free)} are "
                "free. mask_fraction, max_candidates, n_directions and embedding_dtype make them "
                "smaller; more workers have more memory."
            )
        return "cluster"

    def _tasks(
        self,
        function: Callable[..., object],
        rows: np.ndarray,
        arguments: Callable[[int], Sequence[object]] = lambda position: (),
    ) -> list[DaskObject]:
        """Make a task for each chunk that holds some of these rows of the pool.

        Parameters
        ----------
        function : callable
            Of the network, the chunk, what to read of it, and more.
        rows : ndarray of int
            Ascending.
        arguments : callable, optional
            Gives what more, for a chunk whose first row is at this position of `rows`.
        """
        from dask.delayed import delayed

        task, samples = delayed(function, pure=False), self._samples
        chunks, found = samples.chunks(), []
        for number, part in samples.parts(rows):
            first = int(samples.starts[number])
            which = worker.Chunk(rows[part], first, self._settings.batch_size)
            found.append(task(self._packed, chunks[number], which, *arguments(part.start)))
        return found

    def diagonal(  # noqa: D102, see Pool
        self, rows: np.ndarray, n_directions: int
    ) -> dict[str, Tensor]:
        tasks = self._tasks(worker.diagonal_of, rows, lambda position: (n_directions,))
        *parts, total = self._cluster.compute([*tasks, _tree(tasks)])
        with self._progress.bar(len(parts), "Fisher diagonal", "chunk") as bar:
            self._cluster.wait(parts, bar.update)
        self._cluster.release(parts)
        [(n, sums)] = self._cluster.results([total])
        self._cluster.count("diagonal", sum(value.nbytes for value in sums.values()))
        return {name: value / n for name, value in sums.items()}

    def probabilities(self, rows: np.ndarray) -> Tensor:  # noqa: D102, see Pool
        found = torch.cat(self._predicted(worker.probabilities_of, rows))
        self._cluster.count("predictions", found.nbytes)
        return found

    def _predicted(self, function: Callable[..., T], rows: np.ndarray) -> list[T]:
        tasks = self._cluster.compute(self._tasks(function, rows))
        with self._progress.bar(len(tasks), "Predictions", "chunk") as bar:
            return self._cluster.results(tasks, bar.update)

    def predictions_and_inputs(  # noqa: D102, see Pool
        self, rows: np.ndarray
    ) -> tuple[Tensor, Tensor | None]:
        found = self._predicted(worker.predictions_and_inputs_of, rows)
        p = torch.cat([p for p, _ in found])
        inputs = in_one_length([part for _, part in found])
        self._cluster.count("predictions", p.nbytes)
        self._cluster.count("inputs", 0 if inputs is None else inputs.nbytes)
        return p, None if inputs is None else inputs.to(self._net.device)

    def embed(  # noqa: D102, see Pool
        self,
        rows: np.ndarray,
        mask: ParameterMask,
        needs: Needs,
        others: Sequence[LocalSamples],
        wants_fisher: bool,
    ) -> Embedded:
        how = mask, needs.dtype, needs.r
        with self._progress.step("embedding"):
            found = [other.mean_fisher(mask, needs.r) for other in others]
            tasks = self._tasks(worker.embedding_of, rows, lambda position: (position, *how))
            sums = [_tree(_fisher_tasks(tasks))] if wants_fisher else []
            futures = self._cluster.compute([*tasks, *sums])
            self._parts, totals = futures[: len(tasks)], futures[len(tasks) :]
            with self._progress.bar(len(tasks), "Fisher embedding", "chunk") as bar:
                self._cluster.wait(self._parts, bar.update)
        self._needs, fisher = needs, None
        with self._progress.step("fisher"):
            for n, of_parts in self._cluster.results(totals):
                fisher = (of_parts[""] / n).to(self._net.device)
                self._cluster.count("fisher", of_parts[""].nbytes)
        return Embedded(needs.k, fisher, found)

    @torch.no_grad()
    def select(  # noqa: D102, see Pool
        self, problem: SelectionProblem, preselected: Sequence[int]
    ) -> Batch:
        if self._needs is None:
            raise RuntimeError("The pool was not embedded before it was to be chosen from.")
        needs, n_parts, device = self._needs, len(self._parts), self._net.device
        n_states = int(min(_STATES_SHARE * self._cluster.memory // (needs.states / 2), 1e9))
        width = max(1, min(_PICKS_A_ROUND, n_states - 1, problem.n_instances))
        with self._progress.bar(2, "Preparing", "step") as bar:
            inverse, target = problem.start()
            bar.update(1)
            shards = self._shards(
                worker.Start(
                    inverse.cpu() if isinstance(inverse, Tensor) else inverse,
                    target.cpu(),
                    width,
                )
            )
            bar.update(1)
        with picks_bar(self._progress, needs.n, problem) as picked:
            batch = select_and_prune(
                RemoteCandidatePool(shards.ask, n_parts, width, device),
                inverse,
                problem,
                (needs.n, needs.r, needs.k),
                picks_a_round=width,
                forced=preselected,
                on_pick=picked.update,
            )
        self._round_trips = shards.round_trips
        return batch

    def _shards(self, start: worker.Start) -> Shards:
        """Put the embeddings on each worker together."""
        cluster = self._cluster
        shards = [
            cluster.submit(worker.Shard, some, workers=[home], allow_other_workers=True)
            for home, some in cluster.homes(self._parts).items()
        ]
        cluster.wait(shards)
        cluster.release(self._parts)
        self._parts = []
        size = start.target.nbytes * (2 if isinstance(start.inverse, Tensor) else 1)
        cluster.count("start", size * len(shards))
        started = cluster.submit(worker.identity, start)
        return Shards(cluster, shards, started, self._settings.dtype, self._net.device)


def _tree(parts: Sequence[DaskObject]) -> DaskObject:
    """Add up what tasks give, a few at a time."""
    from dask.delayed import delayed

    add = delayed(worker.added, pure=False)
    while len(parts) > 1:
        parts = [add(parts[some]) for some in gen_batches(len(parts), _FAN_IN)]
    return parts[0]


def _fisher_tasks(parts: Sequence[DaskObject]) -> list[DaskObject]:
    from dask.delayed import delayed

    return [delayed(worker.fisher_of, pure=False)(part) for part in parts]
