"""Greedy choice of a batch that makes tr(M^-1 F) small, forward and backward.

The objective is BAIT's (J. T. Ash, S. Goel, A. Krishnamurthy, S. Kakade, "Gone Fishing: Neural
Active Learning with Fisher Embeddings", NeurIPS 2021) as FisherMask states it (S. Gul,
M. Elmahallawy, S. Madria, A. Tripathy, arXiv 2411.05752). M is the Fisher information of the
labelled samples and the batch, F the one that the pool calls for.

For a candidate with Fisher embedding V (r, k), two small blocks say all that a step needs:
A = V M^-1 V^T and B = V M^-1 F M^-1 V^T, both (r, r), and

    gain = tr(M^-1 F) - tr((M + V^T V)^-1 F) = tr((I + A)^-1 B)         (Woodbury).

When a sample V* is taken, I + A* = L L^T, U = M^-1 V*^T L^-T, G = U^T F U, then

    M^-1 <- M^-1 - U U^T,
    A    <- A - q q^T                with q = V U,
    B    <- B - q t^T - t q^T        with t = V T,  T = M^-1 F U - U G / 2,

exactly, so that a step costs one product of the stacked embeddings with a (k, 2 r) matrix
instead of one with M^-1. Dropping a sample is the same with M^-1 negative: for N = -M^-1 the
blocks A and B, I + A and the update keep their form, and the gain is minus the cost.
"""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Protocol

import torch
from torch import Tensor

# Of one chunk's embedding; with its float64 copy, products and theirs it comes to 64 MiB.
_CHUNK_BYTES = 2**23
# Near-ties that are computed afresh in float64 together.
_GROUP = 8
# Float64 gains that differ by less than this, relatively, are taken for equal.
_TIE = 1e-12
# Terms that a matrix product adds up before it starts another partial sum, about.
_SUMMED_TERMS = 512
# Candidates on the shortlist for each speculative pick.
_SHORTLIST = 12
# A Fisher matrix may be off symmetry by this, relatively: it may be a float32 product.
_SYMMETRY = 1e-4
# Rounding by torch.get_float32_matmul_precision(): float32, TensorFloat32, bfloat16.
_FLOAT32_ROUNDING = {"highest": 2.0**-23, "high": 2.0**-10, "medium": 2.0**-7}


@dataclass(frozen=True)
class Update:
    """What one step changes, for every candidate; the list of them is the whole history.

    Attributes
    ----------
    position : int
        Position in the pool of the sample that is taken out of the candidates.
    u : Tensor of shape (k, r), float64
        U in the module's formulas.
    t : Tensor of shape (k, r), float64
        T in the module's formulas.
    """

    position: int
    u: Tensor
    t: Tensor


@dataclass(frozen=True)
class Candidates:
    """Candidates in the order of falling ``gains + errors``, equal ones by position.

    Attributes
    ----------
    positions : Tensor of shape (m,), int64
        Positions in the pool.
    gains : Tensor of shape (m,), float64
        Their gains, as far as the block knows them.
    errors : Tensor of shape (m,), float64
        How far each gain may be off.
    """

    positions: Tensor
    gains: Tensor
    errors: Tensor


@dataclass(frozen=True)
class Start:
    """The two matrices that give every candidate its first A and B.

    Attributes
    ----------
    inverse : Tensor of shape (k, k), float64, or float
        M_0^-1; a float stands for that multiple of the identity.
    target : Tensor of shape (k, k), float64
        M_0^-1 F M_0^-1.
    """

    inverse: Tensor | float
    target: Tensor


class CandidateBlock(Protocol):
    """A share of the pool, wherever its embedding lies: all that the greedy loop asks for.

    An update is small and the updates are the whole history, so a lost block is made again
    from its embedding, the same start and the updates so far.
    """

    def __contains__(self, position: int) -> bool:
        """Say whether the sample at this position of the pool is one of the block's."""

    def best(self, count: int, aside: Sequence[int] = ()) -> Candidates:
        """Give the candidates that may have the largest gains.

        Parameters
        ----------
        count : int
            At most so many.
        aside : sequence of int, default=()
            Positions to leave out; those of other blocks are ignored.

        Returns
        -------
        Candidates
            Those with the largest ``gains + errors``, samples already taken left out.
        """

    def subset(self, positions: Sequence[int]) -> CandidateBlock:
        """Give a few candidates, as they stand, as a block of their own.

        Parameters
        ----------
        positions : sequence of int
            Positions in the pool, ascending.

        Returns
        -------
        CandidateBlock
            In memory, and independent of this one.
        """

    def rows(self, position: int) -> Tensor:
        """Give the embedding of one sample.

        Parameters
        ----------
        position : int
            Position in the pool.

        Returns
        -------
        Tensor of shape (r, k), float64
        """

    def correct(self, pick: Pick) -> None:
        """Replace a candidate's A and B by those computed afresh in float64.

        Parameters
        ----------
        pick : Pick
            The candidate's exact state.
        """

    def stage(self, updates: Sequence[Update]) -> None:
        """Multiply the embedding with some updates, reading it once, but apply none yet.

        Parameters
        ----------
        updates : sequence of Update
            In their order. Staged before and not applied: forgotten.
        """

    def advance(self) -> None:
        """Apply the first of the staged updates, and leave out the sample that it takes."""


@dataclass(frozen=True)
class _Staged:
    """Products V U and V T of an update, (n, r, 2, r), and the norms of U and T, (2,)."""

    position: int
    products: Tensor
    norms: Tensor


class InMemoryBlock:
    """Candidates whose embedding is a tensor.

    Products with the embedding run in float32, or float64 where the embedding is float64. A and
    B are float64. They change by differences, so rounding errors keep their size while the
    gains fall; each candidate therefore carries a running bound for the error of its A and B.

    Parameters
    ----------
    embedding : Tensor of shape (n, r, k), floating point
        Fisher embedding, read in chunks and never changed.
    first : Start
        The matrices of the state that the block starts in.
    start : int, default=0
        Position in the pool of the first sample.
    """

    def __init__(self, embedding: Tensor, first: Start, start: int = 0) -> None:
        self._positions: Sequence[int] = range(start, start + len(embedding))
        self._staged: list[_Staged] = []
        self._embedding = embedding
        self._dtype = torch.float64 if embedding.dtype == torch.float64 else torch.float32
        n, r, _ = embedding.shape
        state = {"dtype": torch.float64, "device": embedding.device}
        self._a = torch.empty((n, r, r), **state)  # type: ignore[call-overload]
        self._b = torch.empty_like(self._a)
        self._norm = torch.empty(n, **state)  # type: ignore[call-overload]
        self._error_a = torch.empty_like(self._norm)
        self._error_b = torch.empty_like(self._norm)
        self._gains = torch.empty_like(self._norm)
        self._errors = torch.empty_like(self._norm)
        self._taken = torch.zeros(n, dtype=torch.bool, device=embedding.device)

        inverse = first.inverse
        inverse = inverse.to(self._dtype) if isinstance(inverse, Tensor) else inverse
        target = first.target.to(self._dtype)
        for part in self._parts():
            v = self._embedding[part].to(self._dtype)
            norm = torch.linalg.vector_norm(v, dim=(1, 2), dtype=torch.float64)
            self._norm[part] = norm
            self._a[part], size = _quadratic(v, inverse)
            self._error_a[part] = norm * self._product_error(_mean_size(inverse) * norm, size)
            self._b[part], size = _quadratic(v, target)
            self._error_b[part] = norm * self._product_error(_mean_size(target) * norm, size)
            self._evaluate(part)

    def __contains__(self, position: int) -> bool:
        return position in self._positions

    def best(  # noqa: D102, see CandidateBlock
        self, count: int, aside: Sequence[int] = ()
    ) -> Candidates:
        out = self._taken.clone()
        out[self._index(aside)] = True
        bound = (self._gains + self._errors).masked_fill(out, -math.inf)
        count = min(count, len(bound) - int(out.sum()))
        if count == 0:
            index = torch.empty(0, dtype=torch.int64, device=bound.device)
        else:
            # topk leaves open which of equal entries it gives, so it only sets the threshold.
            index = torch.nonzero(bound >= torch.topk(bound, count).values[-1]).squeeze(1)
            index = index[torch.sort(bound[index], descending=True, stable=True).indices[:count]]
        positions = torch.tensor([self._positions[i] for i in index.tolist()], dtype=torch.int64)
        return Candidates(positions.to(index.device), self._gains[index], self._errors[index])

    def subset(self, positions: Sequence[int]) -> InMemoryBlock:  # noqa: D102, see CandidateBlock
        index = self._index(positions)
        part = copy.copy(self)
        part._positions = list(positions)
        part._staged = []
        for name in (
            "embedding",
            "a",
            "b",
            "norm",
            "error_a",
            "error_b",
            "gains",
            "errors",
            "taken",
        ):
            setattr(part, f"_{name}", getattr(self, f"_{name}")[index])
        return part

    def rows(self, position: int) -> Tensor:  # noqa: D102, see CandidateBlock
        return self._embedding[self._positions.index(position)].double()

    def correct(self, pick: Pick) -> None:  # noqa: D102, see CandidateBlock
        index = self._positions.index(pick.position)
        self._a[index] = pick.a
        self._b[index] = pick.b
        self._error_a[index] = pick.error_a
        self._error_b[index] = pick.error_b
        self._gains[index] = pick.gain
        self._errors[index] = pick.error

    def stage(self, updates: Sequence[Update]) -> None:  # noqa: D102, see CandidateBlock
        n, r, k = self._embedding.shape
        factors = torch.cat([torch.cat([update.u, update.t], 1) for update in updates], 1)
        norms = torch.linalg.vector_norm(factors.view(k, len(updates), 2, r), dim=(0, 3))
        factors = factors.to(self._dtype)
        products = factors.new_empty((n, r, len(updates), 2, r))
        for part in self._parts():
            v = self._embedding[part].to(self._dtype).reshape(-1, k)
            torch.mm(v, factors, out=products[part].view(v.shape[0], -1))
        self._staged = [
            _Staged(update.position, products[:, :, step], norms[step])
            for step, update in enumerate(updates)
        ]

    def advance(self) -> None:  # noqa: D102, see CandidateBlock
        staged = self._staged.pop(0)
        for part in _chunks(self._a):
            q, t = staged.products[part].double().movedim(2, 0).contiguous()
            self._a[part] -= _symmetric(q @ q.mT)
            self._b[part] -= 2 * _symmetric(q @ t.mT)
            size_q = torch.linalg.vector_norm(q, dim=(1, 2))
            size_t = torch.linalg.vector_norm(t, dim=(1, 2))
            error_q = self._product_error(self._norm[part] * staged.norms[0], size_q)
            error_t = self._product_error(self._norm[part] * staged.norms[1], size_t)
            self._error_a[part] += 2 * size_q * error_q
            self._error_b[part] += 2 * (size_q * error_t + size_t * error_q)
            self._evaluate(part)
        self._taken[self._index([staged.position])] = True

    def _index(self, positions: Sequence[int]) -> Tensor:
        """Turn positions in the pool, where they are the block's, into its own."""
        found = [self._positions.index(p) for p in positions if p in self._positions]
        return torch.tensor(found, dtype=torch.int64, device=self._taken.device)

    def _parts(self) -> Iterator[slice]:
        return _chunks(self._embedding, self._dtype)

    def _product_error(self, factors: Tensor, product: Tensor) -> Tensor:
        """Bound the error of a product, given its size and that of its factors multiplied.

        Where terms of either sign cancel it is relative to the factors; where they add up,
        to the product, and grows as the root of the number of terms summed in one go.
        """
        terms = min(self._embedding.shape[2], _SUMMED_TERMS)
        return _rounding(self._dtype) * (factors + math.sqrt(terms) / 2 * product)

    def _evaluate(self, part: slice) -> None:
        """Bring gains and their error bars up to date with A and B."""
        gains, inverse_size = _gains(self._a[part], self._b[part])
        self._gains[part] = gains
        # First order. The trace adds up r errors of either sign, so it is not off by r times one.
        error = self._error_b[part] + self._error_a[part] * gains.abs()
        self._errors[part] = inverse_size * error


@dataclass(frozen=True)
class Pick:
    """A sample's exact state at some step, computed afresh in float64.

    Attributes
    ----------
    position : int
        Position in the pool.
    gain : float
        Decrease of tr(M^-1 F) if it is taken.
    error : float
        How far the gain may be off.
    error_a, error_b : float
        How far A and B may be off, in the Frobenius norm.
    rows : Tensor of shape (r, k)
        Its embedding V.
    x : Tensor of shape (r, k)
        V M^-1.
    fx : Tensor of shape (r, k)
        V M^-1 F.
    a, b : Tensor of shape (r, r)
        A and B.
    """

    position: int
    gain: float
    error: float
    error_a: float
    error_b: float
    rows: Tensor
    x: Tensor
    fx: Tensor
    a: Tensor
    b: Tensor


class InformationInverse:
    """M^-1 as it stands: the first one, less the products U U^T of the steps since.

    Parameters
    ----------
    first : Tensor of shape (k, k), float64, or float
        M_0^-1; a float stands for that multiple of the identity.
    """

    def __init__(self, first: Tensor | float) -> None:
        self._first = first
        self.size = _mean_size(first)
        self._factors: Tensor | None = None
        self._used = 0

    def apply(self, x: Tensor) -> Tensor:
        """Multiply by M^-1.

        Parameters
        ----------
        x : Tensor of shape (k, m), float64
            Columns to multiply.

        Returns
        -------
        Tensor of shape (k, m), float64
        """
        y = self._first @ x if isinstance(self._first, Tensor) else self._first * x
        if self._factors is not None and self._used:
            factors = self._factors[: self._used]
            y -= factors.T @ (factors @ x)
        return y

    def append(self, u: Tensor) -> None:
        """Subtract U U^T.

        Parameters
        ----------
        u : Tensor of shape (k, r), float64
            U.
        """
        k, r = u.shape
        self.reserve(r, k, u.device)
        if self._factors is None or self._used + r > len(self._factors):
            larger = u.new_empty((max(r, min(2 * self._used, k)), k))
            if self._factors is not None:
                larger[: self._used] = self._factors[: self._used]
            self._factors = larger
        self._factors[self._used : self._used + r] = u.T
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


class _Greedy:
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
        self._error_fisher = _rounding(torch.float64) * _mean_size(fisher)

    def pick(self) -> tuple[Pick, list[Pick]]:
        """Give the best candidate, lower positions first, with near-ties settled in float64.

        Candidates are computed afresh in the order of their largest possible gain until none
        is left that could beat the best so far: mostly that is the first one. What was
        computed goes back to the blocks, so a near-tie is paid for once, not at every step,
        and is given as the second result.
        """
        fresh: list[Pick] = []
        limit = -math.inf
        while True:
            tried = {pick.position for pick in fresh}
            ranked = self._ranked(len(tried) + _GROUP)
            rivals = [p for p, bound in ranked if bound >= limit and p not in tried]
            if not rivals:
                best = [pick for pick in fresh if pick.gain >= limit]
                return min(best, key=operator.attrgetter("position")), fresh
            fresh += self.fresh(rivals[: _GROUP if fresh else 1])
            limit = _tie(max(pick.gain for pick in fresh))
            self.correct(fresh[len(tried) :])

    def speculate(self, count: int, last: bool) -> list[Pick]:
        """Take some picks from a shortlist; give those that the whole pool confirms.

        Reads the pool's embedding once. Before each pick is confirmed, every candidate outside
        the shortlist is brought up to the same step; where one might beat the pick, that pick
        and the later ones are taken back. The `last` pick's update is of no use any more.
        """
        shortlist = sorted(position for position, _ in self._ranked(_SHORTLIST * count))
        blocks = [block.subset([p for p in shortlist if p in block]) for block in self._blocks]
        short = _Greedy(blocks, self._inverse, self._fisher, self._sign)
        rounds = []
        for step in range(count):
            pick, fresh = short.pick()
            rounds.append((pick, fresh, short.absorb(pick)))
            if step < count - 1:
                short.update([rounds[-1][2]])
        staged = [update for *_, update in rounds[: count - last]]
        for block in self._blocks if staged else ():
            block.stage(staged)
        confirmed: list[Pick] = []
        for pick, fresh, _ in rounds:
            outside = self._ranked(1, shortlist)
            if outside and outside[0][1] >= _tie(pick.gain):
                self._inverse.cut((count - len(confirmed)) * len(pick.a))
                break
            self.correct(fresh)
            confirmed.append(pick)
            for block in self._blocks if len(confirmed) <= len(staged) else ():
                block.advance()
        return confirmed

    def update(self, updates: Sequence[Update]) -> None:
        """Bring all candidates up to date."""
        for block in self._blocks:
            block.stage(updates)
            for _ in updates:
                block.advance()

    def correct(self, picks: Sequence[Pick]) -> None:
        """Hand exact states to the blocks they belong to."""
        for pick in picks:
            self._block(pick.position).correct(pick)

    def _ranked(self, count: int, aside: Sequence[int] = ()) -> list[tuple[int, float]]:
        """Give the positions with the largest possible gains, and these."""
        found = [block.best(count, aside) for block in self._blocks]
        positions = torch.cat([candidates.positions for candidates in found])
        bounds = torch.cat([candidates.gains + candidates.errors for candidates in found])
        order = torch.sort(bounds, descending=True, stable=True).indices[:count]
        return list(zip(positions[order].tolist(), bounds[order].tolist(), strict=True))

    def fresh(self, positions: Sequence[int]) -> list[Pick]:
        """Compute the exact state of some candidates from their embedding, M^-1 and F."""
        v = torch.stack([self._block(position).rows(position) for position in positions])
        x = self._inverse.apply(v.flatten(0, 1).T.contiguous())
        fx = (self._fisher @ x).T.reshape(v.shape)
        x = x.T.reshape(v.shape)
        a = _symmetric(v @ x.mT)
        b = self._sign * _symmetric(x @ fx.mT)
        gains, inverse_size = _gains(a, b)
        size_v, size_x, size_fx = (torch.linalg.vector_norm(y, dim=(1, 2)) for y in (v, x, fx))
        error_x = _rounding(torch.float64) * self._inverse.size * size_v
        error_a = error_x * size_v
        error_b = 2 * error_x * size_fx + self._error_fisher * size_x**2
        errors = inverse_size * (error_b + error_a * gains.abs())
        numbers = torch.stack([gains, errors, error_a, error_b], 1).tolist()
        return [
            Pick(position, gain, error, off_a, off_b, v[i], x[i], fx[i], a[i], b[i])
            for i, (position, (gain, error, off_a, off_b)) in enumerate(
                zip(positions, numbers, strict=True)
            )
        ]

    def absorb(self, pick: Pick) -> Update:
        """Move a sample into M (or out of it); give what that changes for the candidates."""
        identity = torch.eye(len(pick.a), dtype=pick.a.dtype, device=pick.a.device)
        factor = torch.linalg.cholesky(identity + pick.a)
        u = torch.linalg.solve_triangular(factor, pick.x, upper=False).T
        fu = torch.linalg.solve_triangular(factor, pick.fx, upper=False).T
        t = self._sign * (self._inverse.apply(fu) - u @ (u.T @ fu) / 2)
        self._inverse.append(u)
        return Update(pick.position, u, t)

    def _block(self, position: int) -> CandidateBlock:
        return next(block for block in self._blocks if position in block)


def greedy(
    blocks: Sequence[CandidateBlock],
    inverse: InformationInverse,
    fisher: Tensor,
    n_picks: int,
    *,
    forced: Sequence[int] = (),
    sign: int = 1,
    speculative: int = 1,
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
        the same for every number.

    Returns
    -------
    list of Pick
        In the order taken.
    """
    state = _Greedy(blocks, inverse, fisher, sign)
    picks: list[Pick] = []
    for start in range(0, len(forced), _GROUP):
        updates = []
        for position in forced[start : start + _GROUP]:
            picks += state.fresh([position])
            updates.append(state.absorb(picks[-1]))
        if len(picks) < n_picks:
            state.update(updates)
    width = speculative
    while len(picks) < n_picks:
        left = n_picks - len(picks)
        count = min(width, left, len(fisher) // len(picks[0].a) if picks else 1)
        if count > 1:
            inverse.reserve(count * len(picks[0].a), len(fisher), fisher.device)
            confirmed = state.speculate(count, last=count == left)
            picks += confirmed
            # Products for picks that are taken back are lost, so do not hope for many more.
            width = min(speculative, max(2, 2 * len(confirmed)))
            if len(confirmed) == count:
                continue
            left -= len(confirmed)
        pick, _ = state.pick()
        picks.append(pick)
        update = state.absorb(pick)
        if left > 1:
            state.update([update])
    return picks


@torch.no_grad()
def select_batch(
    embedding: Tensor,
    n_instances: int,
    fisher: Tensor,
    *,
    fisher_labeled: Tensor | None = None,
    n_labeled: int = 0,
    regularization: float = 1.0,
    oversample: float = 1.0,
    preselected: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Choose a batch that makes :math:`\mathrm{tr}(M^{-1} F)` small.

    Greedy, starting from
    :math:`M_0 = \lambda I + \frac{n_L}{n_L + K} F_L`: the sample with the largest

    .. math::

        \mathrm{gain} = \mathrm{tr}\big(
            V M^{-1} F M^{-1} V^\top (I + V M^{-1} V^\top)^{-1} \big)

    is taken, :math:`M \leftarrow M + V^\top V`, and again, where V is the sample's embedding
    times :math:`\sqrt{K / (n_L + K)}`. With `oversample` above 1 more samples than needed
    are taken, and those whose removal costs least are dropped again one by one. Exact to
    rounding: candidates whose gains float32 cannot tell apart are compared in float64.

    Parameters
    ----------
    embedding : Tensor of shape (n, r, k), floating point
        Fisher embeddings of the n candidates: V^T V is a candidate's Fisher information.
    n_instances : int
        Number of samples to choose, K, from 1 to n.
    fisher : Tensor of shape (k, k), floating point
        F, the Fisher information to cover, symmetric and positive semi-definite.
    fisher_labeled : Tensor of shape (k, k), floating point, optional
        F_L, the mean Fisher information of the labelled samples; None leaves it out.
    n_labeled : int, default=0
        Number of labelled samples, n_L.
    regularization : float, default=1.0
        :math:`\lambda`, above 0.
    oversample : float, default=1.0
        Samples taken before the pruning, as a multiple of K; rounded up, at most n.
    preselected : sequence of int, optional
        Positions that are in the batch whatever their gain: taken first, in this order, and
        never dropped.

    Returns
    -------
    positions : Tensor of shape (n_instances,), int64
        The chosen samples in the order they were taken; among equals the lower position.
    gains : Tensor of shape (n_instances,), float64
        The decrease of the objective by each of them at the time it was taken.

    Raises
    ------
    TypeError
        If a tensor is not one, or not of a floating point dtype.
    ValueError
        If a shape, a number or a position is out of range, the embedding holds NaN or
        infinity, or a Fisher matrix is not finite, symmetric and positive semi-definite.

    Notes
    -----
    A step costs one product of the embeddings with a (k, 2 r) matrix, see the module's
    formulas. Beside the embedding there are two (r, r) float64 blocks per candidate and a few
    (k, k) float64 matrices.

    References
    ----------
    .. [1] S. Gul, M. Elmahallawy, S. Madria, A. Tripathy, "FisherMask: Enhancing Neural
       Network Labeling Efficiency in Image Classification Using Fisher Information", 2024,
       arXiv 2411.05752.
    .. [2] J. T. Ash, S. Goel, A. Krishnamurthy, S. Kakade, "Gone Fishing: Neural Active
       Learning with Fisher Embeddings", NeurIPS 2021.

    Examples
    --------
    >>> import torch
    >>> from skfishermask.selection import select_batch
    >>> embedding = torch.tensor([[[1.0, 0.0]], [[2.0, 0.0]], [[0.0, 1.0]]])
    >>> positions, gains = select_batch(embedding, 2, torch.eye(2))
    >>> positions
    tensor([1, 2])
    >>> gains
    tensor([0.8000, 0.5000], dtype=torch.float64)
    """
    _check_embedding(embedding)
    n, _, k = embedding.shape
    n_instances = _check_count("n_instances", n_instances, 1, n)
    n_labeled = _check_count("n_labeled", n_labeled, 0, None)
    if not 0 < regularization < math.inf:
        raise ValueError(f"regularization must be above 0 and finite, got {regularization!r}.")
    if not 1 <= oversample < math.inf:
        raise ValueError(f"oversample must be at least 1 and finite, got {oversample!r}.")
    forced = _check_preselected(preselected, n_instances, n)
    fisher = _check_fisher("fisher", fisher, k, embedding.device)
    if fisher_labeled is not None:
        fisher_labeled = _check_fisher("fisher_labeled", fisher_labeled, k, embedding.device)
    for part in _chunks(embedding):
        finite = torch.isfinite(embedding[part]).flatten(1).all(1)
        if not finite.all():
            row = part.start + int(torch.nonzero(~finite)[0])
            raise ValueError(f"embedding must be finite, row {row} holds NaN or infinity.")

    # Dividing M and V^T V by K / (n_L + K) leaves V as it is and multiplies every gain.
    scale = n_instances / (n_labeled + n_instances)
    start = Start(scale / regularization, fisher * (scale / regularization) ** 2)
    if fisher_labeled is not None and n_labeled:
        first = _inverse(fisher_labeled * (n_labeled / n_instances), regularization / scale)
        start = Start(first, _symmetric(first @ fisher @ first))
    inverse = InformationInverse(start.inverse)
    # Less a trifle, because 1.1 * 10 is a little more than 11.
    n_forward = min(n, math.ceil(oversample * n_instances - 1e-9))
    picks = greedy([InMemoryBlock(embedding, start)], inverse, fisher, n_forward, forced=forced)
    if n_forward > n_instances:
        picks = _prune(picks, n_instances, len(forced), inverse, fisher)
    positions = torch.tensor([pick.position for pick in picks], device=embedding.device)
    gains = torch.tensor([pick.gain for pick in picks], dtype=torch.float64)
    return positions, gains.to(embedding.device) / scale


def _prune(
    picks: list[Pick], n_keep: int, n_forced: int, inverse: InformationInverse, fisher: Tensor
) -> list[Pick]:
    """Drop the picks that cost least, one by one, until `n_keep` are left.

    The first `n_forced` stay. In float64: I - A may come close to singular.
    """
    # From the highest position down, so that of two equal samples the lower one stays.
    free = sorted(picks[n_forced:], key=operator.attrgetter("position"), reverse=True)
    negative = -inverse.dense(len(fisher), fisher.device)
    rows = torch.stack([pick.rows for pick in free])
    block = InMemoryBlock(rows, Start(negative, -_symmetric(negative @ fisher @ negative)))
    drops = greedy([block], InformationInverse(negative), fisher, len(picks) - n_keep, sign=-1)
    dropped = {free[drop.position].position for drop in drops}
    return [pick for pick in picks if pick.position not in dropped]


def _gains(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Give tr((I + A)^-1 B) and the size of (I + A)^-1 for blocks of shape (n, r, r).

    Where rounding has left I + A indefinite the gain is 0 and the size infinite, so that the
    candidate is computed afresh before anything is decided on it.
    """
    # Symmetric Gauss-Jordan for all candidates at once: batched solvers take one at a time,
    # which for matrices this small costs twice as much. It ends in minus the inverse.
    s = a.permute(1, 2, 0).clone(memory_format=torch.contiguous_format)
    s.diagonal().add_(1)
    valid = torch.ones(len(a), dtype=torch.bool, device=a.device)
    for j in range(len(s)):
        row = s[j].clone()
        pivot = row[j].clone()
        valid &= pivot > 0
        scaled = row / pivot
        s.addcmul_(row[:, None], scaled, value=-1)
        s[j] = scaled
        s[:, j] = scaled
        s[j, j] = -1 / pivot
    gains = -(s * b.permute(1, 2, 0)).sum((0, 1))
    valid &= torch.isfinite(gains)
    size = -s.diagonal().amin(1)
    return gains.masked_fill(~valid, 0), size.masked_fill(~valid, math.inf)


def _quadratic(v: Tensor, matrix: Tensor | float) -> tuple[Tensor, Tensor]:
    """Give V Q V^T in float64, and the norm of V Q, for every V of shape (n, r, k)."""
    # The sums over k that end in an (r, r) block are worth float64: they are few.
    vq = (v @ matrix).double() if isinstance(matrix, Tensor) else v.double() * matrix
    return _symmetric(vq @ v.double().mT), torch.linalg.vector_norm(vq, dim=(1, 2))


def _mean_size(matrix: Tensor | float) -> float:
    """Give the root mean square of a symmetric matrix's eigenvalues."""
    if not isinstance(matrix, Tensor):
        return matrix
    return float(torch.linalg.matrix_norm(matrix)) / math.sqrt(len(matrix))


def _tie(gain: float) -> float:
    """Give the least gain that counts as equal to this one."""
    return gain - _TIE * abs(gain)


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.mT) / 2


def _rounding(dtype: torch.dtype) -> float:
    """Give the relative error of a product in `dtype`, reduced-precision modes included."""
    if dtype == torch.float64:
        return 2.0**-50
    return _FLOAT32_ROUNDING[torch.get_float32_matmul_precision()]


def _chunks(embedding: Tensor, dtype: torch.dtype | None = None) -> Iterator[slice]:
    """Cut the candidates so that a copy of a chunk's embedding in `dtype` stays small."""
    n, r, k = embedding.shape
    size = max(1, _CHUNK_BYTES // (r * k * (dtype or embedding.dtype).itemsize))
    for start in range(0, n, size):
        yield slice(start, min(n, start + size))


def _inverse(matrix: Tensor, shift: float) -> Tensor:
    """Invert `matrix` + `shift` I by its Cholesky factor."""
    shifted = matrix.clone()
    shifted.diagonal().add_(shift)
    factor, failed = torch.linalg.cholesky_ex(shifted)
    if failed:
        raise ValueError(
            "fisher_labeled must be positive semi-definite, but adding the regularization "
            "does not make it positive definite."
        )
    return torch.cholesky_inverse(factor)


def _check_embedding(embedding: Tensor) -> None:
    _check_floating("embedding", embedding)
    if embedding.ndim != 3 or 0 in embedding.shape:
        raise ValueError(
            "embedding must have shape (n, r, k) with n, r and k at least 1, "
            f"got {tuple(embedding.shape)}."
        )


def _check_floating(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}.")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must have a floating point dtype, got {tensor.dtype}.")


def _check_count(name: str, value: int, low: int, high: int | None) -> int:
    expected = f"an int from {low} to {high}" if high is not None else f"an int from {low} up"
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(f"{name} must be {expected}, got {value!r}.")
    if value < low or (high is not None and value > high):
        raise ValueError(f"{name} must be {expected}, got {value!r}.")
    return int(value)


def _check_preselected(preselected: Sequence[int] | None, n_instances: int, n: int) -> list[int]:
    positions = [] if preselected is None else list(preselected)
    if len(positions) > n_instances:
        raise ValueError(
            f"preselected must hold at most n_instances={n_instances} positions, "
            f"got {len(positions)}."
        )
    positions = [_check_count("each position in preselected", p, 0, n - 1) for p in positions]
    if len(set(positions)) < len(positions):
        raise ValueError(f"preselected must hold distinct positions, got {positions}.")
    return positions


def _check_fisher(name: str, fisher: Tensor, k: int, device: torch.device) -> Tensor:
    """Check a Fisher matrix; give it in float64, exactly symmetric, on the right device."""
    _check_floating(name, fisher)
    if fisher.shape != (k, k):
        raise ValueError(
            f"{name} must have shape ({k}, {k}), k by k for an embedding of shape (n, r, k), "
            f"got {tuple(fisher.shape)}."
        )
    fisher = fisher.to(device, torch.float64)
    largest = float(fisher.abs().max())
    if not math.isfinite(largest):
        raise ValueError(f"{name} must be finite, it holds NaN or infinity.")
    asymmetry = float((fisher - fisher.T).abs().max())
    if asymmetry > _SYMMETRY * largest:
        raise ValueError(
            f"{name} must be symmetric, but differs from its transpose by up to "
            f"{asymmetry:.3g} with entries up to {largest:.3g}."
        )
    return _symmetric(fisher)
