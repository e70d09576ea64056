"""Blocks of a pool and the requests to them, without a cluster."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from skfishermask.cluster.remote import (
    Block,
    RemoteCandidatePool,
    Reply,
    Request,
    merge_replies,
)
from skfishermask.selection import (
    Batch,
    LocalCandidatePool,
    Pick,
    SelectionProblem,
    select_and_prune,
    stored,
)
from skfishermask.selection.greedy import InverseFisher, force_picks
from tests.problems import problem
from tests.selection.selectors import check_any_problem, check_larger_pool, cut, in_memory

V, TARGET = problem(30, 2, 9)
EVERYTHING = torch.tensor([-math.inf], dtype=torch.float64)


def pool(part: slice = slice(30)) -> LocalCandidatePool:
    made = LocalCandidatePool(stored(V[part]), 4, part.start or 0)
    made.candidates.initialize(1.0, TARGET)
    return made


def picks(*positions: int) -> list[Pick]:
    return force_picks(pool(), InverseFisher(1.0, TARGET), positions)


def request(number: int = 0, **more: Any) -> Request:
    given = {
        "n_committed": 0,
        "updates": [],
        "picks": [],
        "cached": [],
        "requested": [],
        "limits": EVERYTHING,
        "count": 5,
        "n_picks": 1,
    }
    return Request(number=number, **(given | more))


def bounds_after(*positions: int) -> Tensor:
    """Return all bounds after some picks, minus infinity for the picked."""
    made = pool()
    made.apply(picks(*positions))
    return made.candidates.bounds(made.candidates.taken)


def test_a_block_sends_those_with_the_largest_bounds() -> None:
    reply = Block(pool()).reply(request(cached=[3, 4]))
    bounds = bounds_after()
    bounds[[3, 4]] = -math.inf
    ranked = bounds.argsort(descending=True)
    assert reply.sent is not None
    assert reply.sent.positions.tolist() == sorted(ranked[:5].tolist())
    torch.testing.assert_close(reply.sent.gains, bounds[reply.sent.positions])
    assert reply.largest.tolist() == pytest.approx([float(bounds[ranked[0]])])
    assert reply.others.tolist() == pytest.approx([float(bounds[ranked[5]])])
    # Nothing was updated.
    assert reply.n_read == 0


def test_a_block_sends_no_more_than_reach_a_limit() -> None:
    bounds = bounds_after()
    limit = bounds.sort(descending=True).values[2]
    block = Block(pool())
    reply = block.reply(request(limits=limit[None]))
    assert reply.sent is not None
    assert len(reply.sent) == 3
    none = block.reply(request(limits=torch.tensor([math.inf]).double()))
    assert none.sent is None
    assert torch.equal(none.largest, none.others)


def test_attempted_picks_are_kept_or_undone() -> None:
    block, some = Block(pool()), picks(4, 5, 6)
    attempted = block.reply(request(picks=some, limits=EVERYTHING.expand(4), n_picks=4))
    assert attempted.n_read == 30
    # The picks are the pool's own, so none of the others is wrong after them.
    for i, largest in enumerate(attempted.largest.tolist()):
        expected = bounds_after(*(4, 5, 6)[:i])
        # Those picked later are still there.
        others = [p for p in range(30) if p not in (4, 5, 6)]
        assert largest >= float(expected[others].max()) * (1 - 1e-9)
    kept = block.reply(request(n_committed=2, requested=[5, 7]))
    assert kept.sent is not None
    assert kept.sent.positions.tolist() == [5, 7]
    assert kept.sent.taken.tolist() == [True, False]
    assert float(kept.sent.gains[1]) == pytest.approx(float(bounds_after(4, 5)[7]), rel=1e-9)


def test_updates_come_before_attempted_picks() -> None:
    block = Block(pool())
    block.reply(request(updates=picks(4, 5), count=0))
    expected = bounds_after(4, 5)
    reply = block.reply(request())
    assert reply.largest.tolist() == pytest.approx([float(expected.max())])


def test_replies_are_merged() -> None:
    parts = [slice(0, 10), slice(10, 30)]
    replies = [Block(pool(part)).reply(request()) for part in parts]
    merged = merge_replies(replies)
    assert merged.sent is not None
    assert merged.sent.positions.tolist() == [
        position
        for reply in replies
        if reply.sent is not None
        for position in reply.sent.positions.tolist()
    ]
    assert merged.largest.tolist() == [max(float(reply.largest) for reply in replies)]
    assert merged.others.tolist() == [max(float(reply.others) for reply in replies)]
    nothing = Reply(EVERYTHING, EVERYTHING, None, 3)
    assert merge_replies([nothing, nothing]).sent is None
    assert merge_replies([nothing, nothing]).n_read == 6


def test_a_request_has_the_size_of_its_tensors() -> None:
    some = request(updates=picks(1), picks=picks(2, 3), cached=[1, 2, 3], requested=[9])
    assert some.n_bytes == 3 * 9 * 4 * 8 + 8 * 4
    moved = some.to("cpu", torch.float32)
    assert moved.n_bytes == 3 * 9 * 4 * 4 + 8 * 4
    assert {pick.gain.dtype for pick in (*moved.picks, *moved.updates)} == {torch.float64}


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
    """Select from blocks by requests, as on a cluster but without one."""
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


@settings(max_examples=12)
@given(data=st.data())
def test_the_picks_are_the_oracles(data: st.DataObject) -> None:
    check_any_problem(in_blocks, 60, data)


@pytest.mark.parametrize("width", [1, 4, 16])
def test_larger_pools_in_float32(width: int) -> None:
    check_larger_pool(in_blocks, width)


@pytest.mark.parametrize("width", [8, pytest.param(16, marks=pytest.mark.slow)])
def test_few_requests_and_few_rows(width: int) -> None:
    V, target = problem(2000, 3, 60)
    found, requests = asked(V, SelectionProblem(100, target), width)
    assert torch.equal(found.positions, in_memory(V, SelectionProblem(100, target), 2).positions)
    assert len(requests) < 2 + 200 / width
    assert sum(request.n_bytes for request in requests) < V.nbytes / 2
