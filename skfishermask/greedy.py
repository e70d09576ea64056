"""The greedy loop: pick after pick from blocks of candidates, near-ties settled in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from skfishermask.candidates import (
    CandidateBlock,
    Candidates,
    ExactState,
    Start,
    Step,
    Update,
)
from skfishermask.embedded import EmbeddedBlock
from skfishermask.gains import mean_size, rounding, symmetric, trace_gains

# Near-ties that are computed afresh in float64 together.
_GROUP = 8
# Float64 gains that differ by less than this, relatively, are taken for equal.
_TIE = 1e-12
# Candidates on the shortlist for each speculative pick.
SHORTLIST = 24


@dataclass(frozen=True)
class _Solved:
    """A candidate's state, and V M^-1 and V M^-1 F, (r, k), which taking it needs too."""

    state: ExactState
    x: Tensor
    fx: Tensor


@dataclass(frozen=True)
class Pick:
    """A sample that was taken.

    Attributes
    ----------
    position : int
        Position in the pool.
    gain : float
        Decrease of tr(M^-1 F) at the time.
    """

    position: int
    gain: float


class InformationInverse:
    """M^-1 as it stands: the first one, less the products U U^T of the steps since.

    Parameters
    ----------
    first : Tensor of shape (k, k), float64, or float
        M_0^-1; a float stands for that multiple of the identity.
    """

    def __init__(self, first: Tensor | float) -> None:
        self._first = first
        self.size = mean_size(first)
        self._factors: Tensor | None = None
        self._used = 0

    def apply(self, x: Tensor) -> Tensor:
        """Multiply by M^-1.

        Parameters
        ----------
        x : Tensor of shape (..., k), float64
            Rows to multiply.

        Returns
        -------
        Tensor of the same shape, float64
        """
        # Along the rows, as they lie in memory: twice as fast as columns, and M is symmetric.
        y = x @ self._first if isinstance(self._first, Tensor) else self._first * x
        if self._factors is not None and self._used:
            factors = self._factors[: self._used]
            y -= (x @ factors.T) @ factors
        return y

    def append(self, u: Tensor) -> None:
        """Subtract U U^T.

        Parameters
        ----------
        u : Tensor of shape (r, k), float64
            U^T.
        """
        r, k = u.shape
        self.reserve(r, k, u.device)
        if self._factors is None or self._used + r > len(self._factors):
            larger = u.new_empty((max(r, min(2 * self._used, k)), k))
            if self._factors is not None:
                larger[: self._used] = self._factors[: self._used]
            self._factors = larger
        self._factors[self._used : self._used + r] = u
        self._used += r

    def reserve(self, columns: int, k: int, device: torch.device) -> None:
        """Make sure that `cut` can undo the next steps.

        Parameters
        ----------
        columns : int
            How many columns they will append, at most k or else those of a single step.
        k : int
            Size of M.
        device : torch.device
            Where M lies.
        """
        if self._used + columns > k:
            # More columns than k: the dense matrix is now smaller and quicker to apply.
            self._first = self.dense(k, device)
            self._used = 0

    def cut(self, columns: int) -> None:
        """Undo the latest steps.

        Parameters
        ----------
        columns : int
            How many columns to take back.
        """
        self._used -= columns

    def dense(self, k: int, device: torch.device) -> Tensor:
        """Give M^-1 as a matrix.

        Parameters
        ----------
        k : int
            Its size, for the multiple of the identity does not know it.
        device : torch.device
            Where to make it.

        Returns
        -------
        Tensor of shape (k, k), float64
        """
        first = self._first
        if not isinstance(first, Tensor):
            first = first * torch.eye(k, dtype=torch.float64, device=device)
        if self._factors is None or not self._used:
            return first
        factors = self._factors[: self._used]
        return torch.addmm(first, factors.T, factors, alpha=-1)


class GreedyState:
    """The state of one greedy selection: candidate blocks, M^-1 and F.

    Of the candidates it knows what `CandidateBlock` tells. `sign` is -1 where samples are
    dropped: `inverse` is then -M^-1 and a gain is minus a cost.
    """

    def __init__(
        self,
        blocks: Sequence[CandidateBlock],
        inverse: InformationInverse,
        fisher: Tensor,
        sign: int,
    ) -> None:
        self._blocks = blocks
        self._inverse = inverse
        self._fisher = fisher
        self._sign = sign
        self._error_fisher = rounding(torch.float64) * mean_size(fisher)

    def pick(self) -> tuple[_Solved, list[ExactState]]:
        """Give the best candidate, lower positions first, with near-ties settled in float64.

        Candidates are computed afresh in the order of their largest possible gain until none
        is left that could beat the best so far: mostly that is the first one. What was
        computed goes back to the blocks, so a near-tie is paid for once, not at every step,
        and is given as the second result.
        """
        best: list[_Solved] = []
        tried: dict[int, ExactState] = {}
        ranked = self._ranked(1 + _GROUP)
        # Gains are off by much less than their bounds say: that finds most rivals in one go.
        limit = max(gain for _, gain, _ in ranked)
        while True:
            rivals = [p for p, _, bound in ranked if bound >= limit and p not in tried]
            if not rivals and ranked[-1][2] >= limit:
                # Others may come after those.
                ranked = self._ranked(len(tried) + _GROUP)
                rivals = [p for p, _, bound in ranked if bound >= limit and p not in tried]
            if not rivals:
                return min(best, key=lambda one: one.state.position), list(tried.values())
            best += self.solve(rivals[:_GROUP])
            found = {one.state.position: one.state for one in best}
            self.correct([state for p, state in found.items() if p not in tried])
            tried |= found
            limit = _tie(max(state.gain for state in found.values()))
            best = [one for one in best if one.state.gain >= limit]

    def speculate(self, count: int, last: bool) -> list[Pick]:
        """Take some picks from a shortlist; give those that the whole pool confirms.

        Reads the pool's embedding once. Every candidate outside the shortlist is brought up to
        each step; where one might beat the pick there, that pick and the later ones are taken
        back. The `last` pick's update is of no use any more.
        """
        likely = [block.likely(SHORTLIST * count) for block in self._blocks]
        shortlist = sorted(position for position, _, _ in _best_of(likely, SHORTLIST * count))
        if len(shortlist) < count:
            count, last = len(shortlist), False
        blocks = [block.subset([p for p in shortlist if p in block]) for block in self._blocks]
        short = copy.copy(self)
        short._blocks = blocks
        picks: list[Pick] = []
        steps: list[Step] = []
        while len(picks) < count:
            if steps:
                short.update([steps[-1].update])
            solved, fresh = short.pick()
            picks.append(_pick(solved))
            steps.append(Step(short.absorb(solved), fresh, _tie(solved.state.gain)))
        staged = steps[: count - last]
        rivals = torch.stack([block.attempt(staged, shortlist) for block in self._blocks])
        n_right = 0
        for pick, rival in zip(picks, rivals.amax(0).tolist(), strict=False):
            if rival >= _tie(pick.gain):
                break
            n_right += 1
        for block in self._blocks:
            block.keep(min(n_right, len(staged)))
        self._inverse.cut((count - n_right) * steps[0].update.u.shape[1])
        return picks[:n_right]

    def update(self, updates: Sequence[Update]) -> None:
        """Bring all candidates up to date."""
        for block in self._blocks:
            block.advance(updates)

    def correct(self, states: Sequence[ExactState]) -> None:
        """Hand exact states to the blocks they belong to."""
        for exact in states:
            _owner(self._blocks, exact.position).correct(exact)

    def _ranked(self, count: int) -> list[tuple[int, float, float]]:
        """Give the positions with the largest possible gains, their gains, and these."""
        return _best_of([block.best(count) for block in self._blocks], count)

    def solve(self, positions: Sequence[int]) -> list[_Solved]:
        """Compute the exact state of some candidates from their embedding, M^-1 and F."""
        v = torch.stack([_owner(self._blocks, position).rows(position) for position in positions])
        x = self._inverse.apply(v)
        fx = x @ self._fisher
        a = symmetric(v @ x.mT)
        b = self._sign * symmetric(x @ fx.mT)
        gains, inverse_size = trace_gains(a, b)
        size_v, size_x, size_fx = (torch.linalg.vector_norm(y, dim=(1, 2)) for y in (v, x, fx))
        error_x = rounding(torch.float64) * self._inverse.size * size_v
        error_a = error_x * size_v
        error_b = 2 * error_x * size_fx + self._error_fisher * size_x**2
        errors = inverse_size * (error_b + error_a * gains.abs())
        numbers = zip(*(y.tolist() for y in (gains, errors, error_a, error_b)), strict=True)
        return [
            _Solved(ExactState(p, gain, error, off_a, off_b, a[i], b[i]), x[i], fx[i])
            for i, (p, (gain, error, off_a, off_b)) in enumerate(
                zip(positions, numbers, strict=True)
            )
        ]

    def absorb(self, solved: _Solved) -> Update:
        """Move a sample into M (or out of it); give what that changes for the candidates."""
        a = solved.state.a
        factor = torch.linalg.cholesky(torch.eye(len(a), dtype=a.dtype, device=a.device) + a)
        # U^T, U^T F and T^T.
        u = torch.linalg.solve_triangular(factor, solved.x, upper=False)
        fu = torch.linalg.solve_triangular(factor, solved.fx, upper=False)
        t = self._sign * (self._inverse.apply(fu) - (fu @ u.T) @ u / 2)
        self._inverse.append(u)
        return Update(solved.state.position, u.T, t.T)


def greedy(
    blocks: Sequence[CandidateBlock],
    inverse: InformationInverse,
    fisher: Tensor,
    n_picks: int,
    *,
    forced: Sequence[int] = (),
    sign: int = 1,
    speculative: int = 1,
    on_pick: Callable[[int], object] | None = None,
) -> list[Pick]:
    """Take samples one by one, each the one with the largest gain given those before it.

    Parameters
    ----------
    blocks : sequence of CandidateBlock
        The pool, in the order of their positions, in the state that `inverse` describes.
    inverse : InformationInverse
        M^-1; it is brought up to date with every pick.
    fisher : Tensor of shape (k, k), float64
        F, symmetric.
    n_picks : int
        How many samples to take.
    forced : sequence of int
        Positions to take before any choice is made, in this order.
    sign : {1, -1}
        -1 drops samples instead: `inverse` and the blocks' start then hold -M^-1.
    speculative : int, default=1
        How many picks to take from a shortlist for one read of the embeddings. The picks are
        the same for every number; above 1 pays the more, the longer reading takes.
    on_pick : callable, optional
        Called with the number of picks that are new since the last call.

    Returns
    -------
    list of Pick
        In the order taken.
    """
    on_pick = on_pick or (lambda count: None)
    state = GreedyState(blocks, inverse, fisher, sign)
    picks: list[Pick] = []
    for start in range(0, len(forced), _GROUP):
        updates = []
        for block in blocks:
            block.fetch(forced[start : start + _GROUP])
        for position in forced[start : start + _GROUP]:
            (solved,) = state.solve([position])
            picks.append(_pick(solved))
            updates.append(state.absorb(solved))
        on_pick(len(updates))
        if len(picks) < n_picks:
            state.update(updates)
    width, r, rest, pause = speculative, 0, 0, 0
    while len(picks) < n_picks:
        left = n_picks - len(picks)
        count = min(width, left, len(fisher) // r if r else 1)
        if count > 1 and not rest:
            inverse.reserve(count * r, len(fisher), fisher.device)
            confirmed = state.speculate(count, last=count == left)
            picks += confirmed
            on_pick(len(confirmed))
            if speculative == 2:
                # There is little to win: where it is lost, not again for a while.
                rest = pause = 2 * pause + 1 if len(confirmed) < 2 else 0
            # Products for picks that are taken back are lost, so do not hope for many more.
            width = min(speculative, max(2, 3 * len(confirmed) // 2))
            if confirmed:
                continue
        rest = max(0, rest - 1)
        solved, _ = state.pick()
        picks.append(_pick(solved))
        on_pick(1)
        update = state.absorb(solved)
        r = update.u.shape[1]
        if left > 1:
            state.update([update])
    return picks


def _best_of(found: Sequence[Candidates], count: int) -> list[tuple[int, float, float]]:
    """Give positions, gains, and largest possible gains, of those with the largest ones."""
    positions, gains, errors = (
        torch.cat([getattr(candidates, name) for candidates in found])
        for name in ("positions", "gains", "errors")
    )
    bounds = gains + errors
    if len(found) > 1:
        order = torch.sort(bounds, descending=True, stable=True).indices[:count]
        positions, gains, bounds = positions[order], gains[order], bounds[order]
    return list(zip(positions.tolist(), gains.tolist(), bounds.tolist(), strict=True))


def _pick(solved: _Solved) -> Pick:
    return Pick(solved.state.position, solved.state.gain)


def _owner(blocks: Sequence[CandidateBlock], position: int) -> CandidateBlock:
    return next(block for block in blocks if position in block)


def _tie(gain: float) -> float:
    """Give the least gain that counts as equal to this one."""
    return gain - _TIE * abs(gain)


def choose(
    blocks: Sequence[CandidateBlock],
    start: Start,
    fisher: Tensor,
    n_instances: int,
    n_forward: int,
    *,
    forced: Sequence[int] = (),
    speculative: int = 1,
    on_pick: Callable[[int], object] | None = None,
) -> list[Pick]:
    """Take samples greedily, then drop those that cost least.

    Parameters
    ----------
    blocks : sequence of CandidateBlock
        The pool, in the order of their positions, in the state that `start` describes.
    start : Start
        The matrices that the blocks started from.
    fisher : Tensor of shape (k, k), float64
        F, symmetric.
    n_instances : int
        How many samples to keep.
    n_forward : int
        How many to take first.
    forced : sequence of int
        Positions to take first and never to drop.
    speculative, on_pick
        As for `greedy`, the latter without the drops.

    Returns
    -------
    list of Pick
        Those kept, in the order taken.
    """
    inverse = InformationInverse(start.inverse)
    picks = greedy(
        blocks,
        inverse,
        fisher,
        n_forward,
        forced=forced,
        speculative=speculative,
        on_pick=on_pick,
    )
    if n_forward == n_instances:
        return picks
    # From the highest position down, so that of two equal samples the lower one stays.
    free = sorted((pick.position for pick in picks[len(forced) :]), reverse=True)
    for block in blocks:
        block.fetch(free)
    rows = torch.stack([_owner(blocks, position).rows(position) for position in free])
    negative = -inverse.dense(len(fisher), fisher.device)
    # In float64 throughout, because I - A may come close to singular.
    block = EmbeddedBlock(rows, Start(negative, -symmetric(negative @ fisher @ negative)))
    n_drops = n_forward - n_instances
    drops = greedy([block], InformationInverse(negative), fisher, n_drops, sign=-1)
    dropped = {free[drop.position] for drop in drops}
    return [pick for pick in picks if pick.position not in dropped]
