"""The workers of a Dask client: tasks, waiting for them, and the error if the cluster is gone."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Self, TypeAlias

import dask
import distributed
from dask.utils import parse_timedelta
from distributed.comm.core import CommClosedError

from skfishermask.compat import memory_limit_of
from skfishermask.data import DaskObject

# distributed.Future, which has no types.
Future: TypeAlias = DaskObject

# Seconds between checks of whether the cluster is still there.
_CHECK_INTERVAL = 2.0


def _grace() -> float:
    """Return the seconds without a worker until a cluster is gone: the timeout of a connection."""
    seconds: float = parse_timedelta(dask.config.get("distributed.comm.timeouts.connect"))
    return seconds


class Cluster:
    """The workers of a Dask client, and the tasks of one query there.

    Leaving the context releases all tasks. ConnectionError, if there are no workers.
    """

    def __init__(self, client: DaskObject) -> None:
        self._client = client
        self._held: set[Future] = set()
        self._empty_since = math.inf
        # That went from here to the workers or back, by phase.
        self.n_bytes: dict[str, int] = {}
        limits = self._limits()
        self.n_workers = len(limits)
        # Bytes that they may take together, and that the smallest of them may take.
        self.memory, self.least_memory = sum(limits), min(limits)
        self.most_threads = max(self._client.nthreads().values(), default=1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        # Running tasks are stopped, results are forgotten.
        self.release(list(self._held))

    def count(self, phase: str, n_bytes: int) -> None:
        """Add to the bytes that went from here to the workers or back in a phase."""
        self.n_bytes[phase] = self.n_bytes.get(phase, 0) + n_bytes

    def compute(self, delayed: Sequence[DaskObject]) -> list[Future]:
        """Start the tasks of Dask collections."""
        with self._reaching(), _ignoring_size_warnings():
            futures: list[Future] = self._client.compute(list(delayed))
        self._held.update(futures)
        return futures

    def submit(self, function: Callable[..., object], *args: object, **options: object) -> Future:
        """Start a task."""
        with self._reaching(), _ignoring_size_warnings():
            future = self._client.submit(function, *args, pure=False, **options)
        self._held.add(future)
        return future

    def release(self, futures: Sequence[Future]) -> None:
        """Release tasks on the cluster, once nothing else needs them."""
        self._held.difference_update(futures)
        for future in futures:
            future.release()

    def wait(
        self, futures: Sequence[Future], on_done: Callable[[int], object] | None = None
    ) -> None:
        """Wait for tasks, without their results; raise what one of them raised."""
        waiting, interval = set(futures), min(_CHECK_INTERVAL, _grace() / 2)
        with self._reaching():
            while waiting:
                try:
                    done, waiting = distributed.wait(
                        waiting, interval, return_when="FIRST_COMPLETED"
                    )
                except TimeoutError:
                    self._check_alive()
                    continue
                for future in done:
                    if future.status == "error":
                        future.result()
                if on_done is not None:
                    on_done(len(done))

    def results(
        self, futures: Sequence[Future], on_done: Callable[[int], object] | None = None
    ) -> list[DaskObject]:
        """Wait for tasks, and return their results."""
        self.wait(futures, on_done)
        with self._reaching():
            results: list[DaskObject] = self._client.gather(list(futures))
        self.release(futures)
        return results

    def futures_by_worker(self, futures: Sequence[Future]) -> dict[str, list[Future]]:
        """Return the tasks by the address of a worker that has their results."""
        while True:
            self.wait(futures)
            with self._reaching():
                who_has = self._client.who_has(list(futures))
            by_worker: dict[str, list[Future]] = {}
            for future in futures:
                for address in sorted(who_has[future.key])[:1]:
                    by_worker.setdefault(address, []).append(future)
            # Results of a worker that has just died are computed again.
            if sum(map(len, by_worker.values())) == len(futures):
                return by_worker

    def _limits(self) -> list[float]:
        """Return the bytes that each worker may take."""
        with self._reaching():
            try:
                self._client.wait_for_workers(1, timeout=_grace())
            except TimeoutError as error:
                raise ConnectionError(self._gone(self._no_worker())) from error
            limits = self._client.run(memory_limit_of)
        return [limit or math.inf for limit in limits.values()]

    def _check_alive(self) -> None:
        try:
            n_threads = self._client.nthreads()
        except OSError as error:
            raise ConnectionError(self._gone(error)) from error
        if n_threads:
            self._empty_since = math.inf
        elif time.monotonic() - self._empty_since > _grace():
            raise ConnectionError(self._gone(self._no_worker()))
        else:
            self._empty_since = min(self._empty_since, time.monotonic())

    @staticmethod
    def _no_worker() -> str:
        return f"it has had no worker for {_grace():g} s"

    def _gone(self, why: object) -> str:
        address = self._client.scheduler.address if self._client.scheduler else "its address"
        return f"The Dask cluster at {address} is gone: {why}."

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except (distributed.CancelledError, CommClosedError) as error:
            raise ConnectionError(self._gone(error)) from error
        except Exception as error:
            if self._client.status == "closed":
                raise ConnectionError(self._gone(error)) from error
            raise


@contextmanager
def _ignoring_size_warnings() -> Iterator[None]:
    """Ignore the warning about large tasks: the size of what a worker needs is what it is."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sending large graph")
        yield
