"""One choice, wherever the embeddings lie: that of the oracle."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from skfishermask.cluster.remote import Block, RemoteCandidatePool, Request, merge_replies
from skfishermask.selection import (
    Batch,
    LocalCandidatePool,
    SelectionProblem,
    batch,
    select,
    select_and_prune,
    stored,
)
from skfishermask.selection.storage import ScratchEmbedding, TensorEmbedding
from tests import oracles
from tests.problems import labeled, problem

Chooser = Callable[..., Batch]


def in_memory(V: Tensor, problem: SelectionProblem, width: int, **options: Any) -> Batch:
    with picks_a_round(width):
        return select(stored(V), problem, **options)


def in_a_scratch_file(V: Tensor, problem: SelectionProblem, width: int, **options: Any) -> Batch:
    with ScratchEmbedding(V.shape, V.dtype, "cpu") as scratch, picks_a_round(width):
        scratch.write(0, V)
        return select(scratch, problem, **options)


def on_a_device(
    V: Tensor, problem: SelectionProblem, width: int, in_host_memory: bool = False, **options: Any
) -> Batch:
    from benchmarks.common.pretended import DEVICE, Pretended, on_host, pretending

    with pretending(), picks_a_round(width):
        there = {
            name: None if value is None else Pretended(value)
            for name in ("fisher", "fisher_labeled")
            for value in [getattr(problem, name)]
        }
        embedding = TensorEmbedding(V, DEVICE) if in_host_memory else stored(Pretended(V))
        found = select(embedding, replace(problem, **there), **options)
    return replace(found, positions=on_host(found.positions), gains=on_host(found.gains))


def in_memory_beside_a_device(
    V: Tensor, problem: SelectionProblem, width: int, **options: Any
) -> Batch:
    return on_a_device(V, problem, width, in_host_memory=True, **options)


def in_blocks(V: Tensor, problem: SelectionProblem, width: int, **options: Any) -> Batch:
    return asked(V, problem, width, **options)[0]


def asked(
    V: Tensor,
    problem: SelectionProblem,
    width: int,
    *,
    preselected: Any = (),
    n_blocks: int = 3,
) -> tuple[Batch, list[Request]]:
    """Choose from blocks that are asked, as on a cluster but without one."""
    inverse, target = problem.start()
    blocks = []
    for part in cut(len(V), n_blocks):
        pool = LocalCandidatePool(stored(V[part]), width, part.start)
        pool.candidates.initialize(inverse, target)
        blocks.append(Block(pool))
    requests: list[Request] = []

    def ask(request: Request) -> Any:
        assert request.number == len(requests)
        requests.append(request)
        return merge_replies([block.reply(request) for block in blocks])

    pool = RemoteCandidatePool(ask, len(blocks), width, V.device)
    options = {"picks_per_round": width, "preselected": preselected}
    return select_and_prune(pool, inverse, problem, V.shape, **options), requests


def on_workers(client: Any) -> Chooser:
    """Choose from blocks on the workers of a cluster, two on each."""
    from skfishermask.cluster import worker

    def choose(V: Tensor, problem: SelectionProblem, width: int, *, preselected: Any = ()) -> Batch:
        inverse, target = problem.start()
        start = worker.InitialState(inverse, target, width)
        parts = [worker.ChunkEmbedding(part.start, V[part].clone()) for part in cut(len(V), 4)]
        addresses = client.scheduler_info()["workers"]
        shards = {
            address: client.submit(worker.Shard, parts[i::2], workers=address, pure=False)
            for i, address in enumerate(addresses)
            if parts[i::2]
        }

        def ask(request: Request) -> Any:
            more = [] if request.number else [start]
            told = [
                client.submit(worker.ask, shard, request, *more, workers=address, pure=False)
                for address, shard in shards.items()
            ]
            return merge_replies(client.gather(told))

        pool = RemoteCandidatePool(ask, len(parts), width, V.device)
        options = {"picks_per_round": width, "preselected": preselected}
        return select_and_prune(pool, inverse, problem, V.shape, **options)

    return choose


def cut(n: int, n_parts: int) -> list[slice]:
    cuts = {n * i // n_parts for i in range(n_parts + 1)}
    return [slice(*ends) for ends in itertools.pairwise(sorted(cuts))]


@pytest.fixture(scope="module")
def workers() -> Iterator[Any]:
    distributed = pytest.importorskip("distributed")
    with (
        # In this process, but what they are sent is packed as for others.
        distributed.LocalCluster(
            n_workers=2,
            threads_per_worker=1,
            processes=False,
            protocol="tcp://",
            dashboard_address=":0",
        ) as both,
        distributed.Client(both) as client,
    ):
        yield client


@contextmanager
def picks_a_round(width: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch, "choose_picks_per_round", lambda embedding: width)
        yield


QUICK = [in_memory, in_a_scratch_file, in_blocks]
# A pick takes as long as a hundred elsewhere.
SLOW = [
    pytest.param(on_a_device, marks=pytest.mark.pretended),
    pytest.param(in_memory_beside_a_device, marks=pytest.mark.pretended),
    on_workers,
]


@pytest.fixture(scope="module", params=QUICK + SLOW)
def choose(request: pytest.FixtureRequest) -> Chooser:
    if request.param is on_workers:
        return on_workers(request.getfixturevalue("workers"))
    return request.param


def problem_of(target: Tensor, n_instances: int, **options: Any) -> SelectionProblem:
    return SelectionProblem(n_instances, target, **options)


@pytest.mark.parametrize("choose", QUICK, indirect=True)
@settings(max_examples=30)
@given(data=st.data())
def test_the_choice_is_the_oracles(choose: Chooser, data: st.DataObject) -> None:
    check_choice(choose, 60, data)


@pytest.mark.parametrize("choose", SLOW, indirect=True)
@settings(max_examples=8)
@given(data=st.data())
def test_few_picks_are_the_oracles(choose: Chooser, data: st.DataObject) -> None:
    check_choice(choose, 6, data)


def check_choice(choose: Chooser, most_picks: int, data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 60), "n")
    r = data.draw(st.integers(1, 4), "r")
    k = data.draw(st.integers(1, 12), "k")
    K = data.draw(st.integers(1, min(n, most_picks)), "K")
    width = data.draw(st.sampled_from([1, 4, 16]), "picks a round")
    decay = data.draw(st.sampled_from([0.0, 1.0, 2.0]), "decay")
    V, target = problem(n, r, k, decay=decay, seed=data.draw(st.integers(0, 99), "seed"))
    for row, other in data.draw(st.lists(st.tuples(*[st.integers(0, n - 1)] * 2), max_size=4)):
        V[row] = V[other]
    if data.draw(st.booleans(), "identity"):
        target = torch.eye(k, dtype=torch.float64)
    options: dict[str, Any] = labeled(k) if data.draw(st.booleans(), "labelled") else {}
    options["oversample"] = data.draw(st.sampled_from([1.0, 1.5]), "oversample")
    first = data.draw(st.lists(st.integers(0, n - 1), max_size=min(3, K), unique=True), "first")
    expected = oracles.select_batch_oracle(V, K, target, preselected=first, **options)
    found = choose(V, problem_of(target, K, **options), width, preselected=first)
    assert found.positions.tolist() == expected[0]
    torch.testing.assert_close(
        found.gains.tolist(), expected[1], rtol=1e-8, atol=1e-11 * max(expected[1])
    )
    del options["oversample"]
    for positions, value in zip(([], expected[0]), found.objective, strict=True):
        information = oracles.batch_information(V, positions, K, **options)
        assert value == pytest.approx(oracles.objective(information, target), rel=1e-8)

    single = choose(V.float(), problem_of(target, K, **options), width, preselected=first)
    best, _ = oracles.select_batch_oracle(V.float(), K, target, preselected=first, **options)
    reached, wanted = (
        oracles.objective(oracles.batch_information(V.float(), chosen, K, **options), target)
        for chosen in (single.positions, best)
    )
    assert reached <= wanted * (1 + 1e-4)


@pytest.mark.parametrize("width", [1, 4, 16])
def test_larger_pools_in_float32(choose: Chooser, width: int) -> None:
    # More candidates than are on a shortlist, some of them equal, and gains that fall a lot.
    V, target = problem(500, 3, 60, decay=0.5, scale=3.0)
    V[400:420] = V[10:30]
    V = V.float()
    expected, gains = oracles.select_batch_oracle(V, 30, target)
    found = choose(V, problem_of(target, 30), width)
    assert found.positions.tolist() == expected
    torch.testing.assert_close(found.gains.tolist(), gains, rtol=1e-8, atol=0)


# --- What it costs --------------------------------------------------------------------


@pytest.mark.parametrize("width", [8, 16])
def test_few_questions_and_few_rows(width: int) -> None:
    V, target = problem(2000, 3, 60)
    found, requests = asked(V, problem_of(target, 100), width)
    assert torch.equal(found.positions, in_memory(V, problem_of(target, 100), 2).positions)
    assert len(requests) < 2 + 200 / width
    assert sum(request.n_bytes for request in requests) < V.nbytes / 2


@pytest.mark.parametrize("kinds", [0, 1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equal_candidates_cost_no_more_than_others(kinds: int, dtype: torch.dtype) -> None:
    V, _ = problem(400, 3, 40)
    V = V[torch.arange(400) % kinds] if kinds else 0 * V
    target = torch.eye(40, dtype=torch.float64)
    fresh = []
    with pytest.MonkeyPatch.context() as patch:
        from skfishermask.selection.greedy import InverseFisher

        compute = InverseFisher.exact_gains
        patch.setattr(
            InverseFisher, "exact_gains", lambda self, v: fresh.append(len(v)) or compute(self, v)
        )
        found = in_memory(V.to(dtype), problem_of(target, 20), 2)
    assert found.positions.tolist() == oracles.select_batch_oracle(V.to(dtype), 20, target)[0]
    # Computed afresh in float64: a few for each pick.
    assert sum(fresh) <= 6 * 20
