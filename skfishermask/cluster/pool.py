"""A query where the pool's chunks are: on the workers of a Dask cluster.

The network travels to the workers, embeddings are made and stay where the chunks are, diagonals and
Fisher matrices are summed up in a tree, and the greedy loop runs here and asks the workers as
`skfishermask.selection.remote` describes. Whatever a worker holds is the result of a Dask task, so
Dask makes it again where a worker dies. `skfishermask.cluster.worker` has what the tasks do.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from types import TracebackType
from typing import Any, Self

import numpy as np
import psutil
import torch
from sklearn.utils import gen_batches
from torch import Tensor

from skfishermask.cluster import worker
from skfishermask.data import DaskPool, net_state
from skfishermask.query import Query
from skfishermask.selection import (
    CAREFUL,
    Answer,
    Batch,
    Needs,
    Objective,
    Question,
    RemotePool,
    Step,
    chosen_from,
    gigabytes,
    merged,
)

# Picks to attempt for each question to the workers, and the share of their memory that the states
# of these may take.
_PICKS_A_ROUND, _STATES_SHARE = 16, 0.2
# Sums of so many parts are made at a time.
_FAN_IN = 8
# Seconds between looks at whether the cluster is still there, and without a worker until it is not.
_LOOK, _GRACE = 2.0, 30.0
_NO_WORKER = f"it has had no worker for {_GRACE:.0f} s"


class _Cluster:
    """The workers behind a Dask client, and whatever one query has there.

    Leaving the context takes back all tasks.
    """

    def __init__(self, client: Any) -> None:
        self._client = client
        self._held: set[Any] = set()
        self._empty_since = math.inf
        self.n_bytes: dict[str, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # Tasks that nobody wants are stopped, or forgotten once they are through.
        self.release(list(self._held))

    def count(self, phase: str, n_bytes: int) -> None:
        """Note that so many bytes went from here to the workers or back."""
        self.n_bytes[phase] = self.n_bytes.get(phase, 0) + n_bytes

    def compute(self, delayed: Sequence[Any]) -> list[Any]:
        """Start the tasks of Dask collections."""
        with self._reaching(), _quiet():
            futures: list[Any] = self._client.compute(list(delayed))
        self._held.update(futures)
        return futures

    def submit(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Start a task."""
        with self._reaching(), _quiet():
            future = self._client.submit(function, *args, pure=False, **options)
        self._held.add(future)
        return future

    def release(self, futures: Sequence[Any]) -> None:
        """Let the cluster forget tasks, once nothing else needs them."""
        self._held.difference_update(futures)
        for future in futures:
            future.release()

    def wait(self, futures: Sequence[Any], on_done: Callable[[int], object] | None = None) -> None:
        """Wait for tasks, without their results; raise what one of them raised."""
        from distributed import wait

        waiting = set(futures)
        with self._reaching():
            while waiting:
                try:
                    done, waiting = wait(waiting, _LOOK, return_when="FIRST_COMPLETED")
                except TimeoutError:
                    self._look()
                    continue
                for future in done:
                    if future.status == "error":
                        future.result()
                if on_done is not None:
                    on_done(len(done))

    def results(
        self, futures: Sequence[Any], on_done: Callable[[int], object] | None = None
    ) -> list[Any]:
        """Wait for tasks, and give their results."""
        self.wait(futures, on_done)
        with self._reaching():
            found: list[Any] = self._client.gather(list(futures))
        self.release(futures)
        return found

    def homes(self, futures: Sequence[Any]) -> dict[str, list[Any]]:
        """Say which worker has which results."""
        while True:
            self.wait(futures)
            with self._reaching():
                who_has = self._client.who_has(list(futures))
            found: dict[str, list[Any]] = {}
            for future in futures:
                for address in sorted(who_has[future.key])[:1]:
                    found.setdefault(address, []).append(future)
            # Those of a worker that has just died are on their way.
            if sum(map(len, found.values())) == len(futures):
                return found

    def memory(self) -> tuple[int, float]:
        """Give the number of workers, and how much memory they may take together."""
        with self._reaching():
            try:
                self._client.wait_for_workers(1, timeout=_GRACE)
            except TimeoutError as error:
                raise ConnectionError(self._gone(_NO_WORKER)) from error
            limits = self._client.run(worker.memory_limit)
        return len(limits), sum(limit or math.inf for limit in limits.values())

    def _look(self) -> None:
        try:
            n_threads = self._client.nthreads()
        except OSError as error:
            raise ConnectionError(self._gone(error)) from error
        if n_threads:
            self._empty_since = math.inf
        elif time.monotonic() - self._empty_since > _GRACE:
            raise ConnectionError(self._gone(_NO_WORKER))
        else:
            self._empty_since = min(self._empty_since, time.monotonic())

    def _gone(self, why: object) -> str:
        address = self._client.scheduler.address if self._client.scheduler else "its address"
        return f"The Dask cluster at {address} is gone: {why}."

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        from distributed import CancelledError
        from distributed.comm.core import CommClosedError

        try:
            yield
        except (CancelledError, CommClosedError) as error:
            raise ConnectionError(self._gone(error)) from error
        except Exception as error:
            if self._client.status == "closed":
                raise ConnectionError(self._gone(error)) from error
            raise


@contextmanager
def _quiet() -> Iterator[None]:
    """Let tasks be large: what a worker must be told has a size that cannot be helped."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sending large graph")
        yield


class ClusterQuery(Query):
    """One query over a pool on a Dask cluster.

    Parameters
    ----------
    parameters, net, X_pool, X_labeled, n_instances
        As for :class:`skfishermask.query.Query`, `X_pool` a DaskPool.
    client : distributed.Client
        The cluster's.
    """

    def __init__(
        self,
        parameters: Any,
        net: Any,
        X_pool: DaskPool,
        X_labeled: Any,
        n_instances: int,
        client: Any,
    ) -> None:
        super().__init__(parameters, net, X_pool, X_labeled, n_instances)
        self._pool = X_pool
        self._cluster = _Cluster(client)
        self._n_workers, self._memory = self._cluster.memory()
        # What the shards were told: the start, all updates for good, and the last attempt.
        self._start: Any = None
        self._history: list[Step] = []
        self._attempt: Sequence[Step] = ()
        self._shards: list[Any] = []
        self._round_trips = 0

    def run(self) -> tuple[np.ndarray, np.ndarray]:
        """Go through the steps.

        Returns
        -------
        indices : ndarray of shape (n_instances,), int64
            Rows of the pool in the order chosen.
        gains : ndarray of shape (n_instances,), float64
            Decrease of the objective when each was chosen.
        """
        with self._cluster:
            return super().run()

    @cached_property
    def _packed(self) -> Any:
        """The network on its way to the workers, sent where it is first asked for."""
        import cloudpickle

        how = self._module.criteria, self._p.to_logits, self._pool.transform
        packed = cloudpickle.dumps((*net_state(self._net), *how))
        self._cluster.count("network", len(packed) * self._n_workers)
        # A task's argument, not its result alone: so it outlives the worker that has it.
        return self._cluster.submit(worker.same, packed)

    def _told(self) -> dict[str, Any]:
        return {
            "n_workers": self._n_workers,
            "n_chunks": len(self._pool.starts) - 1,
            "bytes_moved": self._cluster.n_bytes,
            "round_trips": self._round_trips,
        }

    def _place(self, needs: Needs) -> str:
        free = psutil.virtual_memory().available
        if needs.matrices > free or needs.embedding + needs.states > self._memory:
            raise MemoryError(
                f"The Fisher embedding of {needs.n} candidates x {needs.r} directions x "
                f"{needs.k} parameters needs {gigabytes(needs.embedding)} and the candidates' "
                f"gains {gigabytes(needs.states)}; the cluster's {self._n_workers} workers may "
                f"take {gigabytes(self._memory)} together. The {needs.k} x {needs.k} Fisher "
                f"matrices need {gigabytes(needs.matrices)} here, where {gigabytes(free)} are "
                "free. mask_fraction, max_candidates, n_directions and embedding_dtype make them "
                "smaller; more workers have more memory."
            )
        return "cluster"

    def _tasks(self, function: Callable[..., Any], rows: np.ndarray, *args: Any) -> list[Any]:
        """Make a task for each chunk that holds some of these rows of the pool."""
        from dask.delayed import delayed

        task, chunks, pool = delayed(function, pure=False), self._pool.chunks(), self._pool
        found = []
        for number, part in pool.parts(rows):
            which = worker.Chunk(rows[part], int(pool.starts[number]), self._p.batch_size)
            more = [arg(part.start) if callable(arg) else arg for arg in args]
            found.append(task(self._packed, chunks[number], which, *more))
        return found

    @staticmethod
    def _tree(parts: Sequence[Any]) -> Any:
        """Add up what tasks give, a few at a time."""
        from dask.delayed import delayed

        add = delayed(worker.added, pure=False)
        while len(parts) > 1:
            parts = [add(parts[some]) for some in gen_batches(len(parts), _FAN_IN)]
        return parts[0]

    def _sample_diagonal(self, sample: tuple[np.ndarray, np.ndarray], r: int) -> dict[str, Tensor]:
        labeled, pool = sample
        n, sums = 0, {}
        if len(labeled):
            n = len(labeled)
            means = super()._sample_diagonal((labeled, pool[:0]), r)
            sums = {name: n * mean.cpu() for name, mean in means.items()}
        if len(pool):
            tasks = self._tasks(worker.diagonal_of, pool, r)
            *parts, total = self._cluster.compute([*tasks, self._tree(tasks)])
            with self._bar(len(parts), "Fisher diagonal", "chunk") as bar:
                self._cluster.wait(parts, bar.update)
            self._cluster.release(parts)
            [(n_pool, more)] = self._cluster.results([total])
            self._cluster.count("diagonal", sum(value.nbytes for value in more.values()))
            n, sums = worker.added([(n_pool, more), *([(n, sums)] if n else [])])
        return {name: value / n for name, value in sums.items()}

    def _sample_probabilities(self, sample: tuple[np.ndarray, np.ndarray]) -> Tensor:
        labeled, pool = sample
        parts = []
        if len(labeled):
            parts.append(super()._sample_probabilities((labeled, pool[:0])).cpu())
        if len(pool):
            parts.append(self._pool_probabilities(pool))
        return torch.cat(parts)

    def _pool_probabilities(self, rows: np.ndarray) -> Tensor:
        tasks = self._cluster.compute(self._tasks(worker.probabilities_of, rows))
        with self._bar(len(tasks), "Predictions", "chunk") as bar:
            found = torch.cat(self._cluster.results(tasks, bar.update))
        self._cluster.count("predictions", found.nbytes)
        return found

    @torch.no_grad()
    def _choose(self, rows: np.ndarray, needs: Needs, place: str) -> Batch:
        cluster, n = self._cluster, needs.n
        with self._step("embedding"):
            self._embed_labeled(needs.r)
            options = {"n_directions": needs.r, "weighting": self._p.weighting}
            tasks = self._tasks(
                worker.embedding_of,
                rows,
                lambda position: position,
                self.mask,
                needs.dtype,
                options,
            )
            sums = [] if self._aims_at_identity else [self._tree(self._fisher_tasks(tasks))]
            futures = cluster.compute([*tasks, *sums])
            parts, totals = futures[: len(tasks)], futures[len(tasks) :]
            with self._bar(len(parts), "Fisher embedding", "chunk") as bar:
                cluster.wait(parts, bar.update)
        with self._bar(2, "Preparing", "step") as bar:
            with self._step("fisher"):
                fisher = None
                for n_summed, sums in cluster.results(totals):
                    fisher = (sums[""] / n_summed).to(self._device)
                    cluster.count("fisher", sums[""].nbytes)
                objective = self._objective(self._target(fisher, n, needs.k))
            bar.update(1)
            with self._step("selection"):
                inverse, target = objective.start()
                bar.update(1)
                return self._found_there(rows, parts, needs, objective, inverse, target)

    def _found_there(
        self,
        rows: np.ndarray,
        parts: Sequence[Any],
        needs: Needs,
        objective: Objective,
        inverse: Tensor | float,
        target: Tensor,
    ) -> Batch:
        cluster = self._cluster
        self._shards = [
            cluster.submit(worker.Shard, some, workers=[home], allow_other_workers=True)
            for home, some in cluster.homes(parts).items()
        ]
        cluster.wait(self._shards)
        cluster.release(parts)
        n_states = int(min(_STATES_SHARE * self._memory // (needs.states / 2), 1e9))
        width = max(1, min(_PICKS_A_ROUND, n_states - 1, self._n_instances))
        inverse = inverse.cpu() if isinstance(inverse, Tensor) else inverse
        start = worker.Start(inverse, target.cpu(), width, self._p.lazy)
        size = start.target.nbytes * (2 if isinstance(inverse, Tensor) else 1)
        cluster.count("start", size * len(self._shards))
        self._start = cluster.submit(worker.same, start)
        first = self._by_entropy(rows)
        with self._picks_bar(needs.n) as bar:
            return chosen_from(
                RemotePool(self._put, len(parts), width, self._p.lazy, self._device),
                inverse.to(self._device) if isinstance(inverse, Tensor) else inverse,
                objective,
                (needs.n, needs.r, needs.k),
                picks_a_round=width,
                forced=first,
                on_pick=bar.update,
            )

    @staticmethod
    def _fisher_tasks(parts: Sequence[Any]) -> list[Any]:
        from dask.delayed import delayed

        return [delayed(worker.fisher_of, pure=False)(part) for part in parts]

    def _put(self, question: Question) -> Answer:
        """Put a question to all shards; tell those that have lost their state all over again."""
        cluster, first = self._cluster, question.number == 0
        # Shards compute the first steps in float64, together with those that wait for them.
        careful = len(self._history) < CAREFUL or self._p.embedding_dtype == "float64"
        question = question.to("cpu", torch.float64 if careful else torch.float32)
        self._history += [*self._attempt[: question.keep], *question.updates]
        self._attempt = question.steps
        # To a shard that is told everything, what went before is history.
        anew = replace(question, keep=0, updates=())
        found: list[Answer] = []
        waiting = [(shard, first) for shard in self._shards]
        while waiting:
            told = [
                cluster.submit(worker.ask, shard, anew, self._start, self._history)
                if lost
                else cluster.submit(worker.ask, shard, question)
                for shard, lost in waiting
            ]
            self._round_trips += 1
            answers = cluster.results(told)
            for (_, lost), given in zip(waiting, answers, strict=True):
                size = (anew if lost else question).n_bytes
                size += sum(step.factors.nbytes for step in self._history) if lost else 0
                cluster.count("selection", size + (given.n_bytes if given is not None else 0))
            waiting = [
                (shard, True)
                for (shard, _), given in zip(waiting, answers, strict=True)
                if given is None
            ]
            found += [given for given in answers if given is not None]
        return merged([given.to(self._device) for given in found])
