"""Candidates of this process, as the greedy loop asks for them."""

from __future__ import annotations

import math

import pytest
import torch

from skfishermask.selection import LocalCandidatePool, Pick, stored
from skfishermask.selection.greedy import InverseFisher, force_picks
from tests.problems import problem

V, TARGET = problem(30, 2, 9)


def pool(start: int | None = None, picks_per_round: int = 3) -> LocalCandidatePool:
    made = LocalCandidatePool(stored(V), picks_per_round, start)
    made.candidates.initialize(1.0, TARGET)
    return made


def picks(positions: list[int], start: int = 0) -> list[Pick]:
    of = pool(start or None)
    return force_picks(of, InverseFisher(1.0, TARGET), [p + start for p in positions])


@pytest.mark.parametrize("count", [1, 7, 29, 30, 99])
def test_the_shortlist_has_the_largest_bounds(count: int) -> None:
    short, others_bound = pool().shortlist(count, n_picks=1)
    bounds = pool().candidates.bounds(torch.zeros(30, dtype=torch.bool))
    ranked = bounds.argsort(descending=True)
    assert short.positions.tolist() == sorted(ranked[:count].tolist())
    assert float(others_bound) == (bounds[ranked[count]] if count < 30 else -math.inf)
    assert short.embedding.dtype == torch.float64


def test_attempted_picks_are_kept_or_undone() -> None:
    made, some = pool(), picks([4, 5, 6])
    shortlist, others_bound = made.shortlist(8, n_picks=3)
    shortlist.attempt(some)
    largest = made.attempt(some, shortlist, others_bound)
    assert largest[0] == others_bound
    assert len(largest) == 4
    made.commit(some[:2], shortlist)
    expected = pool()
    expected.apply(some[:2])
    torch.testing.assert_close(made.candidates.gains, expected.candidates.gains)
    assert torch.equal(made.candidates.taken, expected.candidates.taken)
    assert torch.nonzero(made.candidates.taken).flatten().tolist() == [4, 5]
    # All were read once for the attempt; the other pool once for two picks.
    assert (made.n_read, expected.n_read) == (30, 30)


def test_the_last_pick_of_all_need_not_be_attempted() -> None:
    made, some = pool(), picks([4])
    shortlist, others_bound = made.shortlist(8, n_picks=1)
    assert made.attempt([], shortlist, others_bound).tolist() == [others_bound]
    made.commit(some, shortlist)
    assert torch.nonzero(made.candidates.taken).flatten().tolist() == [4]
    assert made.n_read == 0


def test_a_part_has_its_own_positions_alone() -> None:
    part = pool(start=100)
    assert part.candidates.positions.tolist() == list(range(100, 130))
    assert part.index_of([99, 100, 129, 130, 5]).tolist() == [0, 29]
    assert torch.equal(part.rows([104, 3]), V[4:5].double())
    some = picks([4, 9], start=100)
    part.candidates.attempt(some)
    part.commit_attempted(some[:1])
    assert torch.nonzero(part.candidates.taken).flatten().tolist() == [4]
    # Picks elsewhere change the gains here.
    before = part.candidates.gains.clone()
    part.apply(picks([5]))
    assert torch.nonzero(part.candidates.taken).flatten().tolist() == [4]
    assert (part.candidates.gains != before).any()
