"""Requests to shards that may lose their state, without a cluster."""

from __future__ import annotations

import os
import pickle
import signal
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from skfishermask.cluster import worker
from skfishermask.cluster.remote import RemoteCandidatePool
from skfishermask.cluster.shards import Shards
from skfishermask.selection import Batch, SelectionProblem, select_and_prune
from tests.cluster.local import (
    UNEVEN,
    assert_same,
    at_request,
    at_start,
    chosen_by,
    da,
    sampler,
    tasks,
)
from tests.problems import problem
from tests.selection.selectors import check_any_problem, cut

pytestmark = pytest.mark.xdist_group("processes")


class Immediate:
    """A cluster that runs tasks at once, in this process."""

    def __init__(self) -> None:
        self.n_bytes = 0
        self.n_tasks = 0
        self.before_task: Callable[[int], object] = lambda number: None

    def submit(self, function: Any, shard: list[worker.Shard], *args: Any) -> Any:
        self.before_task(self.n_tasks)
        self.n_tasks += 1
        # Pickled like on the way to a worker and back.
        return pickle.loads(pickle.dumps(function(shard[0], *pickle.loads(pickle.dumps(args)))))

    def results(self, tasks: Sequence[Any]) -> list[Any]:
        return list(tasks)

    def count(self, phase: str, n_bytes: int) -> None:
        assert phase == "selection"
        self.n_bytes += n_bytes


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    state = SimpleNamespace(nthreads=1)
    monkeypatch.setattr("distributed.get_worker", lambda: SimpleNamespace(state=state))


def on_shards(
    V: Tensor,
    problem: SelectionProblem,
    width: int,
    *,
    preselected: Sequence[int] = (),
    lost: Sequence[int] = (),
) -> tuple[Batch, Shards, Immediate]:
    """Select on two shards of two chunks; the second one loses its state before some tasks."""
    inverse, target = problem.start()
    chunks = [worker.ChunkEmbedding(part.start, V[part].clone()) for part in cut(len(V), 4)]
    # Each in a list, in place of a result that a worker may compute again.
    shards = [[worker.Shard(chunks[i::2])] for i in range(2) if chunks[i::2]]
    cluster = Immediate()

    def lose(number: int) -> None:
        if number in lost:
            shards[1][0] = pickle.loads(pickle.dumps(shards[1][0]))

    cluster.before_task = lose
    start = worker.InitialState(inverse, target, width)
    # In place of futures and a cluster.
    sender = Shards(cluster, shards, start, V.dtype, V.device)
    pool = RemoteCandidatePool(sender.send, len(chunks), width, V.device)
    batch = select_and_prune(
        pool, inverse, problem, V.shape, picks_per_round=width, preselected=preselected
    )
    return batch, sender, cluster


@pytest.mark.usefixtures("one_thread")
@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_the_picks_are_the_oracles(data: st.DataObject) -> None:
    check_any_problem(lambda *args, **options: on_shards(*args, **options)[0], 20, data)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_lost_state_changes_nothing(dtype: torch.dtype) -> None:
    V, target = problem(60, 2, 12)
    chosen = SelectionProblem(15, target)
    expected, sender, cluster = on_shards(V.to(dtype), chosen, 4)
    # Before its second request, and before a later one.
    batch, again, more = on_shards(V.to(dtype), chosen, 4, lost=[3, 8])
    assert torch.equal(batch.positions, expected.positions)
    torch.testing.assert_close(batch.gains, expected.gains, rtol=1e-9, atol=0)
    assert cluster.n_tasks == 2 * sender.round_trips
    assert again.round_trips == sender.round_trips + 2
    assert more.n_tasks == cluster.n_tasks + 2
    # The whole history travels to it.
    assert more.n_bytes > cluster.n_bytes


def kill_one(client: Any) -> None:
    pids = client.run(os.getpid)
    os.kill(pids[min(pids)], signal.SIGKILL)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
@pytest.mark.kills
@pytest.mark.parametrize("phase", ["embedding", "selection"])
def test_a_killed_worker_changes_nothing(
    processes: Any,
    net: Any,
    pool: np.ndarray,
    labeled: np.ndarray,
    phase: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = chosen_by(sampler(), net, pool, labeled)
    killed: list[str] = []

    def kill() -> None:
        if not killed:
            killed.append(phase)
            kill_one(processes)

    third = at_request(3, kill)
    on_start = third if phase == "selection" else at_start("embedding_of", kill)
    monkeypatch.setattr(processes, "on_start", on_start)
    found = chosen_by(sampler(), net, da.from_array(pool, UNEVEN), labeled)
    assert killed == [phase]
    assert tasks(processes) == []
    assert_same(found, expected)
    # As the other tests have found it.
    processes.wait_for_workers(2)
