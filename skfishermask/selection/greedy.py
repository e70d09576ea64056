"""The greedy loop, round after round; method and formulas in :doc:`/user_guide/selection`.

M is the Fisher information of the labelled samples and the batch, F the one that the pool calls
for. For a candidate with Fisher embedding V (r, k), two small matrices say all that a step needs:
A = V M^-1 V^T and B = V M^-1 F M^-1 V^T, both (r, r), and

    gain = tr(M^-1 F) - tr((M + V^T V)^-1 F) = tr((I + A)^-1 B)         (Woodbury).

When a sample V* is taken, I + A* = L L^T, U = M^-1 V*^T L^-T, G = U^T F U, then

    M^-1 <- M^-1 - U U^T,
    A    <- A - q q^T                with q = V U,
    B    <- B - q t^T - t q^T        with t = V T,  T = M^-1 F U - U G / 2,

exactly, so that a step costs one product of the stacked embeddings with a (k, 2 r) matrix
instead of one with M^-1. Dropping a sample is the same with M^-1 negative: for N = -M^-1 the
matrices A and B, I + A and the update keep their form, and the gain is minus the cost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from skfishermask.selection import rounding
from skfishermask.selection.candidates import GainState
from skfishermask.selection.linalg import mean_size, trace_gains
from skfishermask.selection.updates import ExactGains, Pick

# Candidates on the shortlist for each pick hoped for.
SHORTLIST_PER_PICK = 24
# Near-ties that are computed afresh in float64 together, and picks that are given.
_GROUP = 8
# Float64 gains that differ by less than this, relatively, are taken for equal.
_TIE = 1e-12


class CandidatePool(Protocol):
    """The candidates, wherever their embeddings lie: all that the loop asks for.

    Picks change it by `keep` and `advance` alone.

    Attributes
    ----------
    n_read : int
        Candidates whose embeddings were read since the start.
    """

    n_read: int

    def shortlist(self, count: int, n_picks: int) -> tuple[GainState, Tensor]:
        """Give the likely candidates, up to date, and the largest gain that another may have.

        Parameters
        ----------
        count : int
            How many, about; never none if there is a candidate left.
        n_picks : int
            Picks to come before the next time.

        Returns
        -------
        short : GainState
            In memory.
        rest : Tensor of shape ()
            What the others' gains do not exceed; minus infinity where there are none.
        """

    def attempt(self, steps: Sequence[Pick], short: GainState, rest: Tensor) -> Tensor:
        """Bring the others up to date, until `keep` says how many of the steps were right.

        Parameters
        ----------
        steps : sequence of Pick
            In their order.
        short, rest
            What `shortlist` gave.

        Returns
        -------
        Tensor of shape (len(steps) + 1,), float64
            The largest gain that one of the others may have before the first step, and after each.
        """

    def keep(self, taken: Sequence[Pick], short: GainState) -> None:
        """Take the samples of the steps that were right; what was attempted beyond is undone.

        Parameters
        ----------
        taken : sequence of Pick
            The steps; the last one need not have been attempted if it is the last of all.
        short : GainState
            What `shortlist` gave, with all steps applied.
        """

    def advance(self, steps: Sequence[Pick]) -> None:
        """Apply steps for good; their samples are out from then on.

        Parameters
        ----------
        steps : sequence of Pick
            In their order.
        """

    def rows(self, positions: Sequence[int]) -> Tensor:
        """Give the embeddings of some samples, those taken among them.

        Parameters
        ----------
        positions : sequence of int
            Positions in the pool.

        Returns
        -------
        Tensor of shape (n, r, k), float64
        """


@dataclass(frozen=True)
class BestCandidate:
    """The best candidate on a shortlist.

    Attributes
    ----------
    index, position : Tensor of shape (1,), int64
        Where it is on the shortlist, and in the pool.
    fresh : ExactGains
        Those computed afresh.
    slot : Tensor of shape (1,), int64
        Where it is among these.
    sure : Tensor of shape ()
        Whether no other on the shortlist could beat it.
    """

    index: Tensor
    position: Tensor
    fresh: ExactGains
    slot: Tensor
    sure: Tensor


class InverseFisher:
    """M^-1 as it stands, and F: the first M^-1, less the products U U^T of the steps since.

    Parameters
    ----------
    first : Tensor of shape (k, k), float64, or float
        M_0^-1; a float stands for that multiple of the identity.
    fisher : Tensor of shape (k, k), float64
        F, symmetric.
    sign : {1, -1}, default=1
        -1 where samples are dropped: `first` is then -M^-1, and a gain minus a cost.
    """

    def __init__(self, first: Tensor | float, fisher: Tensor, sign: int = 1) -> None:
        self.fisher = fisher
        self._first = first
        self._sign = sign
        self._used = 0
        self._factors = fisher.new_empty(0, len(fisher))
        roundoff = rounding.unit_roundoff(torch.float64)
        self._error, self._error_fisher = (roundoff * mean_size(x) for x in (first, fisher))

    def times(self, x: Tensor) -> Tensor:
        """Multiply rows, (..., k), by M^-1."""
        # Along the rows, as they lie in memory: twice as fast as columns, and M is symmetric.
        y = x @ self._first if isinstance(self._first, Tensor) else self._first * x
        if self._used:
            factors = self._factors[: self._used]
            rest = x.reshape(-1, x.shape[-1]) @ factors.T
            y.view(-1, y.shape[-1]).addmm_(rest, factors, alpha=-1)
        return y

    def reserve(self, n_steps: int, r: int) -> int:
        """Make sure that so many steps can be undone; give how many can."""
        k = len(self.fisher)
        n_steps = max(1, min(n_steps, k // r))
        columns = n_steps * r
        if self._used + columns > k:
            # More columns than k: the dense matrix is now smaller and quicker to apply.
            self._first, self._used = self.dense(), 0
        if self._used + columns > len(self._factors):
            larger = self._factors.new_empty(max(self._used + columns, min(2 * self._used, k)), k)
            larger[: self._used] = self._factors[: self._used]
            self._factors = larger
        return n_steps

    def undo(self, n_steps: int, r: int) -> None:
        """Take the latest steps back."""
        self._used -= n_steps * r

    def dense(self) -> Tensor:
        """Give M^-1 as a matrix."""
        first = self._first
        if not isinstance(first, Tensor):
            first = torch.diag(self.fisher.new_full((len(self.fisher),), first))
        factors = self._factors[: self._used]
        return torch.addmm(first, factors.T, factors, alpha=-1)

    def fresh(self, v: Tensor) -> ExactGains:
        """Compute candidates' A, B and gains from their embeddings, (n, r, k), in float64."""
        x = self.times(v)
        fx = x @ self.fisher
        # Symmetric but for rounding, which counts nowhere.
        a, b = v @ x.mT, x @ (fx if self._sign > 0 else -fx).mT
        gains, inverse_size = trace_gains(a, b)
        both = torch.cat([x, fx], 2)
        size_v = torch.linalg.vector_norm(v, dim=(1, 2))
        size_x, size_fx = torch.linalg.vector_norm(both.unflatten(2, (2, -1)), dim=(1, 3)).T
        off = torch.stack([size_v, 2 * size_fx], 1) * (self._error * size_v)[:, None]
        off[:, 1].addcmul_(size_x, size_x, value=self._error_fisher)
        trace = a.diagonal(dim1=1, dim2=2).sum(1)
        bars = rounding.of_gain(gains, off, inverse_size, trace, torch.float64)
        return ExactGains(both, a, b, off, gains, bars)

    def take(self, best: BestCandidate) -> Pick:
        """Move a sample into M (or out of it); give what that changes for the others."""
        fresh = best.fresh
        both, a, gain = (y.index_select(0, best.slot) for y in (fresh.both, fresh.a, fresh.gains))
        a[0].diagonal().add_(1)
        # Never singular, so there is nothing to look at, which would wait for the device.
        factor, _ = torch.linalg.cholesky_ex(a[0])
        # U^T, U^T F and T^T.
        u, fu = torch.linalg.solve_triangular(factor, both[0], upper=False).chunk(2, 1)
        t = torch.addmm(self.times(fu), fu @ u.T, u, alpha=-0.5)
        self._factors[self._used : self._used + len(u)] = u
        self._used += len(u)
        factors = torch.cat([u, t if self._sign > 0 else -t]).T
        return Pick(best.position[0], gain[0], best.sure, factors)


def greedy_select(
    pool: CandidatePool,
    information: InverseFisher,
    n_picks: int,
    r: int,
    *,
    picks_a_round: int = 1,
    forced: Sequence[int] = (),
    on_pick: Callable[[int], object] = lambda count: None,
) -> tuple[list[int], Tensor]:
    """Take samples one by one, each the one with the largest gain given those before it.

    Gives their positions, in order, and the decrease of tr(M^-1 F) by each, float64 on the host.

    Parameters
    ----------
    pool : CandidatePool
        The candidates, in the state that `information` describes; at least `n_picks`.
    information : InverseFisher
        M^-1 and F; brought up to date with every pick.
    n_picks : int
        How many samples to take.
    r : int
        Rows of a sample's embedding.
    picks_a_round : int, default=1
        Picks that share one read of the pool. They are the same for every number.
    forced : sequence of int, default=()
        Positions to take before any choice is made, in this order.
    on_pick : callable, optional
        Called with the number of picks that are new since the last call.
    """
    positions: list[Tensor] = []
    gains: list[Tensor] = []
    widened, hoped = 1, picks_a_round
    on_host = information.fisher.device.type == "cpu"

    def note(taken: Sequence[Pick]) -> None:
        positions.extend(step.position for step in taken)
        gains.extend(step.gain for step in taken)
        on_pick(len(taken))

    for start in range(0, len(forced), _GROUP):
        given = force_picks(pool, information, forced[start : start + _GROUP])
        note(given)
        if len(gains) < n_picks:
            pool.advance(given)
    while (left := n_picks - len(gains)) > 0:
        count = information.reserve(min(hoped, left), r)
        # 1. The shortlist: candidates with the largest possible gains, their rows at hand.
        short, rest = pool.shortlist(SHORTLIST_PER_PICK * picks_a_round * widened, count)
        # 2. Picks from the shortlist alone. A device is not waited for, unless that has failed.
        wait = on_host or widened > 1
        steps = _picked(short, information, count, rest if wait else None)
        # 3. The others catch up with all of these; after the last pick of all nobody has to.
        rivals = pool.attempt(steps[: len(steps) - (len(steps) == left)], short, rest)
        # 4. One number is read: the picks before the first step at which another may have won.
        n_right = _n_right(steps, rivals)
        information.undo(len(steps) - n_right, r)
        pool.keep(steps[:n_right], short)
        note(steps[:n_right])
        # Where none was right, those that may have won join the shortlist. Products for picks that
        # are undone are lost, so do not hope for many more the next time.
        widened = 1 if n_right else 2 * widened
        hoped = min(picks_a_round, max(2, 3 * n_right // 2))
    return torch.stack(positions).tolist(), torch.stack(gains).cpu()


def force_picks(
    pool: CandidatePool, information: InverseFisher, positions: Sequence[int]
) -> list[Pick]:
    """Take some samples whatever their gains."""
    steps, rows = [], pool.rows(positions)
    first = torch.zeros(1, dtype=torch.int64, device=rows.device)
    for position, v in zip(positions, rows, strict=True):
        information.reserve(1, len(v))
        fresh = information.fresh(v[None])
        where = torch.full_like(first, position)
        steps.append(information.take(BestCandidate(first, where, fresh, first, first[0] == 0)))
    return steps


def _picked(
    short: GainState, information: InverseFisher, count: int, rest: Tensor | None
) -> list[Pick]:
    """Pick from a shortlist; with `rest`, only if no other is known to gain as much at first."""
    steps: list[Pick] = []
    while len(steps) < count:
        best = best_of(short, information, wait=rest is not None)
        if rest is not None and not steps:
            gain = best.fresh.gains[best.slot]
            if not bool(rest < _tie(gain)):
                break
        steps.append(information.take(best))
        short.taken.index_fill_(0, best.index, True)
        short.attempt(steps[-1:])
        short.at += 1
    return steps


def _n_right(steps: Sequence[Pick], rivals: Tensor) -> int:
    if not steps:
        return 0
    gains, sure = (torch.stack([getattr(s, name) for s in steps]) for name in ("gain", "sure"))
    right = sure & (rivals[: len(steps)] < _tie(gains))
    return int(right.cumprod(0).sum())


def best_of(short: GainState, information: InverseFisher, wait: bool) -> BestCandidate:
    """Find the best candidate on a shortlist, the lowest position among equals.

    Those that may have the largest gain are computed afresh in float64, until none is left that
    could beat the best so far: mostly that is the first one. What was computed goes back to the
    shortlist, so a near-tie is paid for once. Without `wait` that happens to a fixed few instead.
    """
    out = short.out(1)
    if not wait:
        ranked = torch.topk(short.bounds(out), min(_GROUP + 1, len(short)))
        few, others = ranked.indices[:_GROUP], ranked.values[_GROUP:]
        fresh = information.fresh(short.rows(few))
        short.correct(few, fresh)
        gains = fresh.gains.masked_fill(ranked.values[:_GROUP] == -math.inf, -math.inf)
        limit = _tie(gains.amax())
        sure = others[0] < limit if len(others) else limit == limit
        return _lowest(short, few, fresh, gains, limit, sure)
    # Gains are off by much less than their bounds say: that finds most rivals in one go.
    limit = short.gains.masked_fill(out, -math.inf).amax()
    found: list[ExactGains] = []
    where: list[Tensor] = []
    group = _GROUP
    while True:
        bounds = short.bounds(out)
        rivals = torch.nonzero(bounds >= limit).squeeze(1)
        if not len(rivals):
            break
        if len(rivals) > group:
            rivals = rivals[torch.topk(bounds[rivals], group).indices]
            group *= 2
        found.append(information.fresh(short.rows(rivals)))
        where.append(rivals)
        short.correct(rivals, found[-1])
        out = out.index_fill(0, rivals, True)
        limit = _tie(torch.stack([fresh.gains.amax() for fresh in found]).amax())
    fresh, index = ExactGains.joined(found), torch.cat(where)
    return _lowest(short, index, fresh, fresh.gains, limit, limit == limit)


def _lowest(
    short: GainState, index: Tensor, fresh: ExactGains, gains: Tensor, limit: Tensor, sure: Tensor
) -> BestCandidate:
    """Give the lowest position of those whose gain reaches a limit."""
    positions = short.positions.index_select(0, index)
    last = torch.iinfo(torch.int64).max
    slot = positions.masked_fill(gains < limit, last).argmin().view(1)
    return BestCandidate(
        index.index_select(0, slot), positions.index_select(0, slot), fresh, slot, sure
    )


def _tie(gain: Tensor) -> Tensor:
    """Give the least gain that counts as equal to this one."""
    return torch.sub(gain, gain.abs(), alpha=_TIE)
