"""The greedy loop over picks; derivations are in :doc:`/user_guide/selection`.

In: the candidates' Fisher embeddings V (r, k), M^-1 (M is the Fisher information of the labelled
samples and of the batch so far) and F, the Fisher information to cover. Of each candidate A and B
(r, r) are kept, with bounds of their errors: A = V M^-1 V^T, B = V M^-1 F M^-1 V^T, and

    gain = tr(M^-1 F) - tr((M + V^T V)^-1 F) = tr((I + A)^-1 B)         (Woodbury).

A pick V*, with I + A* = L L^T, U = M^-1 V*^T L^-T and T = M^-1 F U - U (U^T F U) / 2, changes

    M^-1 by -U U^T,  A by -q q^T,  B by -(q t^T + t q^T)    with q = V U, t = V T, exactly.

A round reads all embeddings once. Shortlist: candidates with the largest upper bounds of gains.
Picks: from the shortlist, near-ties in float64. Update: of all others by these picks.
Verification: picks before the first at which another's bound is as large are kept, others undone.
Out: positions and gains, those of one exact pick at a time; to drop samples, of -M^-1.
The objective tr(M^-1 F), its update and its error bounds are one fabric: change all or none.
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
from skfishermask.selection.linalg import rms_eigenvalue, trace_gains
from skfishermask.selection.updates import ExactGains, Pick

# Candidates on the shortlist for each pick of a round.
SHORTLIST_PER_PICK = 24
# Candidates with exact gains computed together, at first, and picks that are forced together.
_N_EXACT = 8
# Exact gains that differ by less than this, relatively, are equal.
_TIE_TOLERANCE = 1e-12


class CandidatePool(Protocol):
    """The candidates of a selection, in memory, in a file or on the workers of a cluster.

    Picks change it by `commit` and `apply` alone.
    """

    n_read: int

    def shortlist(self, count: int, n_picks: int) -> tuple[GainState, Tensor]:
        """Return the candidates with the largest bounds, and a bound of the others' gains.

        There are about `count` of them, and at least one if any is left; they are in memory, for
        `n_picks` picks. Without others the bound is minus infinity.
        """

    def attempt(self, picks: Sequence[Pick], shortlist: GainState, others_bound: Tensor) -> Tensor:
        """Update the others by some picks, until `commit` tells how many are kept.

        Returns the largest upper bound of another's gain before the first pick and after each,
        (len(picks) + 1,), float64.
        """

    def commit(self, picks: Sequence[Pick], shortlist: GainState) -> None:
        """Keep these picks, the first of those attempted, and undo the others.

        All of them have been applied to the shortlist. The last pick of a batch need not be
        attempted.
        """

    def apply(self, picks: Sequence[Pick]) -> None:
        """Update all candidates by some picks, in their order."""

    def rows(self, positions: Sequence[int]) -> Tensor:
        """Return the embeddings of some samples, picked ones too, (n, r, k), in float64."""


@dataclass(frozen=True)
class BestCandidate:
    """The candidate with the largest gain on a shortlist."""

    index: Tensor  # (1,), on the shortlist
    position: Tensor  # (1,), in the pool
    exact: ExactGains  # exact gains of some candidates
    row: Tensor  # (1,), its index among these
    is_verified: Tensor  # (), whether no other on the shortlist may have a larger gain


class InverseFisher:
    """M^-1, as an initial matrix less the products U U^T of picks, together with F.

    A float as `initial` stands for that multiple of the identity. A `sign` of -1 is for dropping
    samples: `initial` is then -M^-1, and a gain minus a cost.
    """

    def __init__(self, initial: Tensor | float, fisher: Tensor, sign: int = 1) -> None:
        self.fisher = fisher
        self._initial = initial
        self._sign = sign
        self._n_factors = 0
        self._factors = fisher.new_empty(0, len(fisher))
        roundoff = rounding.unit_roundoff(torch.float64)
        self._error = roundoff * rms_eigenvalue(initial)
        self._error_fisher = roundoff * rms_eigenvalue(fisher)

    def multiply(self, x: Tensor) -> Tensor:
        """Return x M^-1 for rows x, (..., k)."""
        # Along the rows, as they lie in memory: twice as fast as columns, and M is symmetric.
        y = x @ self._initial if isinstance(self._initial, Tensor) else self._initial * x
        if self._n_factors:
            factors = self._factors[: self._n_factors]
            projected = x.reshape(-1, x.shape[-1]) @ factors.T
            y.view(-1, y.shape[-1]).addmm_(projected, factors, alpha=-1)
        return y

    def reserve(self, n_picks: int, r: int) -> int:
        """Make room for picks that can be undone; return their number, at most n_picks."""
        k = len(self.fisher)
        n_picks = max(1, min(n_picks, k // r))
        needed = n_picks * r
        if self._n_factors + needed > k:
            # More factors than k: the dense matrix is now smaller and quicker to apply.
            self._initial, self._n_factors = self.to_dense(), 0
        if self._n_factors + needed > len(self._factors):
            size = max(self._n_factors + needed, min(2 * self._n_factors, k))
            larger = self._factors.new_empty(size, k)
            larger[: self._n_factors] = self._factors[: self._n_factors]
            self._factors = larger
        return n_picks

    def undo(self, n_picks: int, r: int) -> None:
        """Undo the latest picks."""
        self._n_factors -= n_picks * r

    def to_dense(self) -> Tensor:
        """Return M^-1 as a matrix."""
        initial = self._initial
        if not isinstance(initial, Tensor):
            initial = torch.diag(self.fisher.new_full((len(self.fisher),), initial))
        factors = self._factors[: self._n_factors]
        return torch.addmm(initial, factors.T, factors, alpha=-1)

    def exact_gains(self, v: Tensor) -> ExactGains:
        """Compute A, B and gains of candidates from their embeddings, (n, r, k), float64."""
        x = self.multiply(v)
        fx = x @ self.fisher
        # Symmetric but for rounding, which counts nowhere.
        a, b = v @ x.mT, x @ (fx if self._sign > 0 else -fx).mT
        gains, inverse_size = trace_gains(a, b)
        products = torch.cat([x, fx], 2)
        size_v = torch.linalg.vector_norm(v, dim=(1, 2))
        size_x, size_fx = torch.linalg.vector_norm(products.unflatten(2, (2, -1)), dim=(1, 3)).T
        error = torch.stack([size_v, 2 * size_fx], 1) * (self._error * size_v)[:, None]
        error[:, 1].addcmul_(size_x, size_x, value=self._error_fisher)
        gain_error = rounding.gain_error(gains, error, inverse_size, a, torch.float64)
        return ExactGains(products, a, b, error, gains, gain_error)

    def update(self, best: BestCandidate) -> Pick:
        """Add a sample to M, or drop it, and return the pick."""
        exact = best.exact
        products, a, gain = (
            x.index_select(0, best.row) for x in (exact.products, exact.a, exact.gains)
        )
        a[0].diagonal().add_(1)
        # Never singular, so the second result need not be read, which would wait for the device.
        factor, _ = torch.linalg.cholesky_ex(a[0])
        # U^T, U^T F and T^T.
        u, fu = torch.linalg.solve_triangular(factor, products[0], upper=False).chunk(2, 1)
        t = torch.addmm(self.multiply(fu), fu @ u.T, u, alpha=-0.5)
        self._factors[self._n_factors : self._n_factors + len(u)] = u
        self._n_factors += len(u)
        factors = torch.cat([u, t if self._sign > 0 else -t]).T
        return Pick(best.position[0], gain[0], best.is_verified, factors)


def greedy_select(
    pool: CandidatePool,
    inverse_fisher: InverseFisher,
    n_picks: int,
    r: int,
    *,
    picks_per_round: int = 1,
    preselected: Sequence[int] = (),
    on_pick: Callable[[int], object] = lambda count: None,
) -> tuple[list[int], Tensor]:
    """Pick samples one by one, each with the largest gain given those before it.

    The pool, of embeddings with r rows, is in the state that `inverse_fisher` describes, which
    every pick updates. `picks_per_round` picks share one read of the pool; their number changes no
    pick. Those `preselected` are picked first. Returns positions in the order of the picks, and the
    decrease of tr(M^-1 F) by each, float64, on the host.
    """
    positions: list[Tensor] = []
    gains: list[Tensor] = []
    shortlist_factor, round_size = 1, picks_per_round
    on_host = inverse_fisher.fisher.device.type == "cpu"

    def record(picks: Sequence[Pick]) -> None:
        positions.extend(pick.position for pick in picks)
        gains.extend(pick.gain for pick in picks)
        on_pick(len(picks))

    for start in range(0, len(preselected), _N_EXACT):
        forced = force_picks(pool, inverse_fisher, preselected[start : start + _N_EXACT])
        record(forced)
        if len(gains) < n_picks:
            pool.apply(forced)
    while (left := n_picks - len(gains)) > 0:
        count = inverse_fisher.reserve(min(round_size, left), r)
        # 1. Candidates with the largest upper bounds, their rows in memory.
        size = SHORTLIST_PER_PICK * picks_per_round * shortlist_factor
        shortlist, others_bound = pool.shortlist(size, count)
        # 2. Picks from the shortlist alone. A device is not waited for, unless that has failed.
        may_wait = on_host or shortlist_factor > 1
        picks = _pick_from(shortlist, inverse_fisher, count, others_bound if may_wait else None)
        # 3. The others are updated by all of these, but for the last pick of all.
        attempted = picks[: len(picks) - (len(picks) == left)]
        others_bounds = pool.attempt(attempted, shortlist, others_bound)
        # 4. One number is read: of the picks before another may have had a larger gain.
        n_verified = _n_verified(picks, others_bounds)
        inverse_fisher.undo(len(picks) - n_verified, r)
        pool.commit(picks[:n_verified], shortlist)
        record(picks[:n_verified])
        # Where none was verified, the shortlist grows until it has the best candidate. Updates by
        # picks that are undone are lost, so the next round attempts few more than were verified.
        shortlist_factor = 1 if n_verified else 2 * shortlist_factor
        round_size = min(picks_per_round, max(2, 3 * n_verified // 2))
    return torch.stack(positions).tolist(), torch.stack(gains).cpu()


def force_picks(
    pool: CandidatePool, inverse_fisher: InverseFisher, positions: Sequence[int]
) -> list[Pick]:
    """Pick the samples at some positions, independent of their gains."""
    picks, rows = [], pool.rows(positions)
    first = torch.zeros(1, dtype=torch.int64, device=rows.device)
    for position, v in zip(positions, rows, strict=True):
        inverse_fisher.reserve(1, len(v))
        exact = inverse_fisher.exact_gains(v[None])
        at = torch.full_like(first, position)
        picks.append(inverse_fisher.update(BestCandidate(first, at, exact, first, first[0] == 0)))
    return picks


def _pick_from(
    shortlist: GainState, inverse_fisher: InverseFisher, count: int, others_bound: Tensor | None
) -> list[Pick]:
    """Pick from a shortlist; with `others_bound`, only if no other may gain as much at first."""
    picks: list[Pick] = []
    while len(picks) < count:
        best = best_candidate(shortlist, inverse_fisher, may_wait=others_bound is not None)
        if others_bound is not None and not picks:
            gain = best.exact.gains[best.row]
            if not bool(others_bound < _tie_limit(gain)):
                break
        picks.append(inverse_fisher.update(best))
        shortlist.taken.index_fill_(0, best.index, True)
        shortlist.attempt(picks[-1:])
        shortlist.current += 1
    return picks


def _n_verified(picks: Sequence[Pick], others_bounds: Tensor) -> int:
    """Return the number of picks before another candidate may have had as large a gain."""
    if not picks:
        return 0
    gains = torch.stack([pick.gain for pick in picks])
    verified = torch.stack([pick.is_verified for pick in picks])
    verified &= others_bounds[: len(picks)] < _tie_limit(gains)
    return int(verified.cumprod(0).sum())


def best_candidate(
    shortlist: GainState, inverse_fisher: InverseFisher, may_wait: bool
) -> BestCandidate:
    """Find the candidate with the largest gain on a shortlist, the lowest position among equals.

    Exact gains are computed of those with the largest upper bounds, until no other bound exceeds
    the largest exact gain: mostly that is one candidate. They become the shortlist's, so a near-tie
    is computed once. If the device must not be waited for, that happens to a fixed few instead.
    """
    excluded = shortlist.excluded(1)
    if not may_wait:
        ranked = torch.topk(shortlist.bounds(excluded), min(_N_EXACT + 1, len(shortlist)))
        few, others = ranked.indices[:_N_EXACT], ranked.values[_N_EXACT:]
        exact = inverse_fisher.exact_gains(shortlist.rows(few))
        shortlist.set_exact(few, exact)
        gains = exact.gains.masked_fill(ranked.values[:_N_EXACT] == -math.inf, -math.inf)
        limit = _tie_limit(gains.amax())
        is_verified = others[0] < limit if len(others) else limit == limit
        return _lowest_position(shortlist, few, exact, gains, limit, is_verified)
    # Gains are off by much less than their bounds say: that finds most rivals in one go.
    limit = shortlist.gains.masked_fill(excluded, -math.inf).amax()
    computed: list[ExactGains] = []
    indices: list[Tensor] = []
    size = _N_EXACT
    while True:
        bounds = shortlist.bounds(excluded)
        rivals = torch.nonzero(bounds >= limit).squeeze(1)
        if not len(rivals):
            break
        if len(rivals) > size:
            rivals = rivals[torch.topk(bounds[rivals], size).indices]
            size *= 2
        computed.append(inverse_fisher.exact_gains(shortlist.rows(rivals)))
        indices.append(rivals)
        shortlist.set_exact(rivals, computed[-1])
        excluded = excluded.index_fill(0, rivals, True)
        limit = _tie_limit(torch.stack([exact.gains.amax() for exact in computed]).amax())
    exact, index = ExactGains.concatenate(computed), torch.cat(indices)
    return _lowest_position(shortlist, index, exact, exact.gains, limit, limit == limit)


def _lowest_position(
    shortlist: GainState,
    index: Tensor,
    exact: ExactGains,
    gains: Tensor,
    limit: Tensor,
    is_verified: Tensor,
) -> BestCandidate:
    """Return the candidate at the lowest position of those with gains of at least a limit."""
    positions = shortlist.positions.index_select(0, index)
    last = torch.iinfo(torch.int64).max
    row = positions.masked_fill(gains < limit, last).argmin().view(1)
    return BestCandidate(
        index.index_select(0, row), positions.index_select(0, row), exact, row, is_verified
    )


def _tie_limit(gain: Tensor) -> Tensor:
    """Return the least gain that counts as equal to this one."""
    return torch.sub(gain, gain.abs(), alpha=_TIE_TOLERANCE)
