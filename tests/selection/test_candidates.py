"""The state of candidates' gains, beside the same in float64 from M inverted anew."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from skfishermask.selection import Pick, stored
from skfishermask.selection.candidates import GainState, check_finite
from skfishermask.selection.greedy import InverseFisher, force_picks
from skfishermask.selection.local_pool import LocalCandidatePool
from skfishermask.selection.storage import ScratchEmbedding, StoredEmbedding
from tests.problems import problem

N, R, K = 40, 3, 11


def gains_after(V: Tensor, target: Tensor, positions: list[int]) -> Tensor:
    """Return all gains after some picks, from M = I."""
    v, information = V.double(), torch.eye(K, dtype=torch.float64)
    for position in positions:
        information = information + v[position].T @ v[position]
    inverse = torch.linalg.inv(information)
    a, b = v @ inverse @ v.mT, v @ inverse @ target @ inverse @ v.mT
    solved = torch.linalg.solve(torch.eye(R).double() + a, b)
    return solved.diagonal(dim1=1, dim2=2).sum(1)


def picks_of(V: Tensor, target: Tensor, positions: list[int]) -> list[Pick]:
    pool = LocalCandidatePool(stored(V), 1)
    return force_picks(pool, InverseFisher(1.0, target), positions)


def state(
    embedding: StoredEmbedding, target: Tensor, n_states: int = 1, positions: Tensor | None = None
) -> GainState:
    positions = torch.arange(len(embedding)) if positions is None else positions
    made = GainState(embedding, positions, n_states)
    made.initialize(1.0, target)
    return made


def assert_gains(found: GainState, expected: Tensor, rtol: float = 1e-9) -> None:
    torch.testing.assert_close(found.gains, expected, rtol=rtol, atol=0)
    assert ((found.gains - expected).abs() <= found.gain_error + 1e-14 * expected).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("in_a_file", [False, True])
def test_picks_change_gains_as_m_says(
    in_a_file: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In chunks of several candidates, and more than one group of them.
    monkeypatch.setattr("skfishermask.selection.storage._CHUNK_BYTES", 7 * R * K * 4)
    monkeypatch.setattr("skfishermask.selection.storage._MIN_CHUNK_VECTORS", 1)
    monkeypatch.setattr("skfishermask.selection.storage._PRODUCT_BYTES", 1)
    V, target = problem(N, R, K)
    V = V.to(dtype)
    positions = [7, 3, 20, 21, 0, 39, 8, 30]
    picks = picks_of(V, target, positions)
    with ScratchEmbedding(V.shape, dtype, "cpu") as scratch:
        scratch.write(0, V)
        applied = state(scratch if in_a_file else stored(V), target)
        assert_gains(applied, gains_after(V, target, []))
        applied.apply(picks)
        rtol = 1e-9 if dtype == torch.float64 else 1e-4
        assert_gains(applied, gains_after(V, target, positions), rtol)
        assert applied.n_applied == len(picks)

        attempted = state(scratch if in_a_file else stored(V), target, n_states=4)
        excluded = torch.zeros(N, dtype=torch.bool).index_fill(0, torch.tensor(positions[:3]), True)
        largest = attempted.attempt(picks[:3], excluded)
        for i in range(3):
            bounds = gains_after(V, target, positions[: i + 1]).masked_fill(excluded, -math.inf)
            assert float(largest[i]) == pytest.approx(float(bounds.max()), rel=1e-6)
        # Only two of the three are kept.
        attempted.commit(2)
        assert (attempted.current, attempted.n_applied) == (0, 2)
        assert_gains(attempted, gains_after(V, target, positions[:2]))


def test_a_subset_goes_on_where_the_whole_is() -> None:
    V, target = problem(N, R, K)
    picks = picks_of(V, target, [5, 6, 7])
    whole = state(stored(V), target, n_states=2)
    whole.apply(picks[:2])
    whole.taken[5] = True
    index = torch.tensor([1, 5, 17, 30])
    part = whole.subset(index, n_states=2)
    assert torch.equal(part.positions, index)
    assert part.taken.tolist() == [False, True, False, False]
    part.attempt(picks[2:])
    assert_gains(whole.subset(index, 1), gains_after(V, target, [5, 6])[index])
    # What is known of them goes back.
    whole.copy_state(part, 1)
    expected = gains_after(V, target, [5, 6])
    expected[index] = gains_after(V, target, [5, 6, 7])[index]
    assert_gains(whole, expected)


def test_concatenated_states_are_ordered_by_position() -> None:
    V, target = problem(N, R, K)
    picks = picks_of(V, target, [5, 6])
    halves = []
    for rows in (torch.arange(1, N, 2), torch.arange(0, N, 2)):
        half = state(stored(V[rows]), target, positions=rows)
        half.apply(picks)
        halves.append(half)
    both = GainState.concatenate(halves, n_states=3)
    assert both.positions.tolist() == list(range(N))
    assert both.n_applied == 2
    assert_gains(both, gains_after(V, target, [5, 6]))
    moved = both.to("cpu")
    assert torch.equal(moved.gains, both.gains)
    assert moved.n_bytes == V.nbytes + 8 * N * (2 * R * R + 4)


def test_exact_gains_replace_the_state() -> None:
    V, target = problem(N, R, K)
    candidates = state(stored(V), target)
    index = torch.tensor([4, 9])
    exact = InverseFisher(0.5, target).exact_gains(V[index])
    before = candidates.gains.clone()
    candidates.set_exact(index, exact)
    before[index] = exact.gains
    assert torch.equal(candidates.gains, before)
    assert torch.equal(candidates.gain_error[index], exact.gain_error)


def test_no_more_equal_candidates_than_picks_count() -> None:
    V, target = problem(8, R, K)
    # Three kinds: 0, 2, 5, 7 and 1, 6 and the others.
    V[2], V[5], V[7], V[6] = V[0], V[0], V[0], V[1]
    candidates = state(stored(V), target)
    assert candidates.has_equals
    assert torch.nonzero(candidates.excluded(1)).flatten().tolist() == [2, 5, 6, 7]
    assert torch.nonzero(candidates.excluded(2)).flatten().tolist() == [5, 7]
    candidates.taken[[0, 1]] = True
    assert torch.nonzero(candidates.excluded(1)).flatten().tolist() == [0, 1, 5, 7]
    bounds = candidates.bounds(candidates.excluded(1))
    assert torch.nonzero(bounds.isinf()).flatten().tolist() == [0, 1, 5, 7]


def test_candidates_of_equal_norm_are_not_equal() -> None:
    V, target = problem(6, R, K)
    V[3] = V[2].flip(0)
    candidates = state(stored(V), target)
    assert not candidates.has_equals
    assert candidates.excluded(1) is candidates.taken


def test_the_first_row_that_is_not_finite_is_named() -> None:
    norms = torch.tensor([1.0, math.inf, math.nan])
    with pytest.raises(ValueError, match="embedding must be finite, row 12 holds"):
        check_finite(norms, torch.tensor([11, 12, 13]))
    check_finite(norms[:1], torch.tensor([11]))
