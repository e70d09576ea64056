"""Tasks of one query on a cluster: waited for, counted, released, and a cluster that is gone."""

from __future__ import annotations

import signal
import time
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import pytest

from skfishermask.cluster.client import Cluster
from tests import forked
from tests.cluster.local import (
    UNEVEN,
    WatchedClient,
    at_request,
    chosen_by,
    cluster,
    da,
    dask,
    distributed,
    sampler,
    tasks,
)

pytestmark = pytest.mark.xdist_group("processes")


def square(x: int) -> int:
    return x * x


def fail(x: int) -> int:
    raise ZeroDivisionError(f"no {x}")


def test_results_come_in_the_order_of_the_tasks(threads: Any) -> None:
    done: list[int] = []
    with Cluster(threads) as own:
        tasks = [own.submit(square, i) for i in range(5)]
        assert own.results(tasks, done.append) == [0, 1, 4, 9, 16]
    assert sum(done) == 5


def test_the_error_of_a_task_is_raised(threads: Any) -> None:
    with Cluster(threads) as own, pytest.raises(ZeroDivisionError, match="no 7"):
        own.wait([own.submit(square, 1), own.submit(fail, 7)])
    # And the cluster goes on.
    assert threads.submit(square, 3).result() == 9


def test_leaving_releases_all_tasks(threads: Any) -> None:
    with Cluster(threads) as own:
        kept = own.submit(square, 6)
        own.wait([kept])
        assert own.futures_by_worker([kept])
    assert tasks(threads) == []


def test_each_result_is_on_one_worker(threads: Any) -> None:
    with Cluster(threads) as own:
        tasks = [own.submit(square, i) for i in range(20)]
        by_worker = own.futures_by_worker(tasks)
        assert set(by_worker) <= set(threads.scheduler_info()["workers"])
        spread = [task for some in by_worker.values() for task in some]
        assert sorted(map(id, spread)) == sorted(map(id, tasks))


def test_sizes_are_counted(threads: Any) -> None:
    with Cluster(threads) as own:
        own.count("network", 10)
        own.count("network", 5)
        own.count("fisher", 1)
        assert own.n_bytes == {"network": 15, "fisher": 1}
        assert own.n_workers == 2


@pytest.mark.parametrize("phase", ["diagonal", "embedding", "selection"])
def test_interrupting_leaves_nothing_on_the_cluster(
    threads: Any,
    net: Any,
    pool: np.ndarray,
    labeled: np.ndarray,
    phase: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Ctrl-C comes while this process waits: here as soon as it does so in the phase.
    wait = distributed.wait
    started = {"diagonal": "diagonal_of", "embedding": "embedding_of", "selection": "ask"}

    def interrupted(futures: Any, *args: Any, **options: Any) -> Any:
        if any(str(future.key).startswith(started[phase]) for future in futures):
            raise KeyboardInterrupt
        return wait(futures, *args, **options)

    monkeypatch.setattr(distributed, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        chosen_by(sampler(), net, da.from_array(pool, UNEVEN), labeled)
    assert tasks(threads) == []
    # And the cluster goes on.
    assert threads.submit(sum, [1, 2]).result() == 3


# How long to look for a cluster that does not answer.
SOON = {"distributed.comm.timeouts.connect": "500ms"}


def test_a_cluster_without_workers_is_gone(net: Any, pool: np.ndarray) -> None:
    with cluster(1, processes=False) as client, dask.config.set(SOON):
        client.on_start = at_request(3, lambda: client.cluster.scale(0))
        with pytest.raises(ConnectionError, match=r"cluster at .* is gone: it has had no worker"):
            sampler()(net, da.from_array(pool, UNEVEN), 10)


def test_a_cluster_that_never_had_a_worker_is_gone(net: Any, pool: np.ndarray) -> None:
    with (
        cluster(0),
        dask.config.set(SOON),
        pytest.raises(ConnectionError, match="it has had no worker"),
    ):
        sampler()(net, da.from_array(pool, UNEVEN), 10)


def run_a_scheduler(sender: Connection) -> None:
    options = {"n_workers": 1, "processes": False, "dashboard_address": ":0"}
    made = distributed.LocalCluster(protocol="tcp://", **options)
    sender.send(made.scheduler_address)
    time.sleep(600)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
@pytest.mark.kills
def test_a_scheduler_that_is_killed_is_gone(net: Any, pool: np.ndarray) -> None:
    process, receiver = forked.begin(run_a_scheduler)

    def kill() -> None:
        process.kill()
        process.join()

    try:
        with (
            dask.config.set({"distributed.comm.timeouts.connect": "2s"}),
            WatchedClient(receiver.recv()) as client,
        ):
            client.on_start = at_request(3, kill)
            with pytest.raises(ConnectionError, match=r"Dask cluster at tcp://.* is gone"):
                sampler()(net, da.from_array(pool, UNEVEN), 10)
    finally:
        kill()


def test_a_cluster_that_is_closed_is_gone(net: Any, pool: np.ndarray) -> None:
    with cluster(1, processes=False) as client:
        client.on_start = at_request(3, client.cluster.close)
        with pytest.raises(ConnectionError, match=r"Dask cluster at .* is gone"):
            sampler()(net, da.from_array(pool, UNEVEN), 10)
