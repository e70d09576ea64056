"""Candidates and what is known of their gains: A and B, and how far each may be off.

:mod:`skfishermask.selection.greedy` has the formulas.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from skfishermask.selection import rounding
from skfishermask.selection.linalg import QuadraticForm, fingerprints, repeated, trace_gains
from skfishermask.selection.storage import StoredEmbedding, stored
from skfishermask.selection.updates import (
    N_FLOAT64_PICKS,
    ExactGains,
    Pick,
    side_by_side,
    steps_together,
)

# Products of embeddings and updates are kept for so many candidates at once.
_PRODUCT_BYTES = 2**23


def check_finite(norms: Tensor, positions: Tensor) -> None:
    """Raise ValueError if the embedding at one of the positions has no finite norm."""
    bad = ~torch.isfinite(norms)
    if bad.any():
        row = int(positions[bad][0])
        raise ValueError(f"embedding must be finite, row {row} holds NaN or infinity.")


def _either(pairs: Tensor) -> Tensor:
    """Say who is in a marked pair of neighbours, of one more than there are pairs."""
    no = pairs.new_zeros(1)
    return torch.cat([pairs, no]) | torch.cat([no, pairs])


class GainState:
    """Candidates, their embeddings and what is known of their gains, in several states.

    Products with the embedding run in float32, but in float64 for the first steps and where the
    embedding is float64. A and B are float64.

    Parameters
    ----------
    embedding : StoredEmbedding
        Fisher embeddings, never changed.
    positions : Tensor of shape (n,), int64
        Positions in the pool, ascending.
    n_states : int
        States that there is room for: one more than the steps that are attempted at a time.

    Attributes
    ----------
    index : Tensor of shape (n,), int64
        Where they are among those that they were taken from.
    taken : Tensor of shape (n,), bool
        Which are not candidates any more.
    prints : Tensor of shape (n,), int64
        What equal candidates share.
    has_equals : bool
        Whether any two are.
    at : int
        The present state.
    n_steps : int
        Steps that were applied for good.
    """

    def __init__(self, embedding: StoredEmbedding, positions: Tensor, n_states: int) -> None:
        n, r, _ = embedding.shape
        self.embedding, self.positions, self.index = embedding, positions, positions
        self.taken = torch.zeros(n, dtype=torch.bool, device=embedding.device)
        self.prints, self.has_equals = torch.zeros_like(positions), False
        self.norms = torch.zeros(n, dtype=torch.float64, device=embedding.device)
        # Rows of A and of half of B in turn; of B only the symmetric part counts and is right.
        self._blocks = self.norms.new_zeros((n_states, n, 2 * r, r))
        # How far A and B may be off, the gain, and how far that may be.
        self._known = self.norms.new_zeros((n_states, n, 4))
        self._off, self._gains, self._bars = (
            self._known[..., :2],
            self._known[..., 2],
            self._known[..., 3],
        )
        self.at = 0
        self.n_steps = 0

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def gains(self) -> Tensor:
        """Gains as far as they are known, (n,); those taken have one too."""
        return self._gains[self.at]

    @property
    def bars(self) -> Tensor:
        """How far each gain may be off, (n,)."""
        return self._bars[self.at]

    def bounds(self, out: Tensor, n_states: int | None = None) -> Tensor:
        """Give the largest gains there may be, (n,); minus infinity for those that are `out`.

        With `n_states`, in so many states from the first on: (n_states, n).
        """
        which = self.at if n_states is None else slice(n_states)
        return (self._gains[which] + self._bars[which]).masked_fill_(out, -math.inf)

    def out(self, n_picks: int) -> Tensor:
        """Say who cannot be among the next picks: those taken, and equals of lower ones left."""
        if not self.has_equals:
            return self.taken
        ordered, order = torch.sort(self.prints, stable=True)
        left = (~self.taken)[order].cumsum(0)
        # Left before the first one of each kind: the largest such sum so far, as sums only grow.
        first = torch.ones_like(self.taken)
        first[1:] = ordered[1:] != ordered[:-1]
        before = (left - (~self.taken)[order].long()).masked_fill(~first, 0).cummax(0).values
        rank = torch.empty_like(left)
        rank[order] = left - before
        return self.taken | (rank > n_picks)

    def start(
        self,
        inverse: Tensor | float,
        target: Tensor,
        on_part: Callable[[int], object] = lambda count: None,
    ) -> None:
        """Compute the first A and B.

        Parameters
        ----------
        inverse : Tensor of shape (k, k), float64, or float
            M_0^-1; a float stands for that multiple of the identity.
        target : Tensor of shape (k, k), float64
            M_0^-1 F M_0^-1.
        on_part : callable, optional
            Called with numbers of candidates that are done.

        Raises
        ------
        ValueError
            If the embedding holds NaN or infinity.
        """
        k = len(target)
        first, second = QuadraticForm(inverse), QuadraticForm(target)
        dtype = torch.float64
        for part, v in self.embedding.chunks(dtype):
            self.norms[part] = norms = torch.linalg.vector_norm(v.flatten(1), dim=1)
            a, size_a = first(v)
            b, size_b = second(v)
            self._blocks[0, part, ::2], self._blocks[0, part, 1::2] = a, b / 2
            for i, (size, form) in enumerate(((size_a, first), (size_b, second))):
                off = rounding.of_product(form.size * norms, size, k, dtype)
                self._off[0, part, i] = norms * off
            self._evaluate(slice(0, 1), part, dtype)
            on_part(part.stop - part.start)
        check_finite(self.norms, self.positions)
        self._find_equals()

    def _find_equals(self) -> None:
        """Look for equal candidates, among those whose norms differ by rounding at most."""
        self.prints = -1 - self.positions
        ordered, order = torch.sort(self.norms)
        near = ordered[1:] - ordered[:-1] <= 1e-12 * ordered[1:]
        suspects = order[torch.nonzero(_either(near)).squeeze(1)]
        for some in suspects.split(self.embedding.chunk_rows) if len(suspects) else ():
            self.prints[some] = fingerprints(self.embedding.take(some))
        self.has_equals = bool(repeated(self.prints).any())

    def fill(self, rows: Tensor, fresh: ExactGains) -> None:
        """Start from what was computed afresh for all of them, from their rows (n, r, k)."""
        torch.linalg.vector_norm(rows.flatten(1), dim=1, out=self.norms)
        self.correct(torch.arange(len(self), device=rows.device), fresh)

    def correct(self, index: Tensor, fresh: ExactGains) -> None:
        """Put in what was computed afresh for some, (m,)."""
        half = torch.stack([fresh.a, fresh.b / 2], 2).flatten(1, 2)
        known = torch.cat([fresh.off, fresh.gains[:, None], fresh.bars[:, None]], 1)
        self._blocks[self.at].index_copy_(0, index, half)
        self._known[self.at].index_copy_(0, index, known)

    def rows(self, index: Tensor) -> Tensor:
        """Give the embeddings of some, (m, r, k), in float64."""
        return self.embedding.take(index).double()

    def subset(self, index: Tensor, n_states: int, dtype: torch.dtype | None = None) -> GainState:
        """Give some of them as they stand, in memory.

        Parameters
        ----------
        index : Tensor of shape (m,), int64
            Which; ascending.
        n_states : int
            As for the class.
        dtype : torch.dtype, optional
            In which they go on. None: as these do.
        """
        rows = self.embedding.take(index).to(dtype or self.embedding.work_dtype)
        part = self._made_of([self], rows, lambda x: x.index_select(0, index), n_states)
        part.index = index
        return part

    @staticmethod
    def joined(several: Sequence[GainState], n_states: int) -> GainState:
        """Put candidates in memory together, as they stand, ordered by position."""
        order = torch.cat([one.positions for one in several]).argsort()
        rows = torch.cat([one.embedding.take(range(len(one))) for one in several])[order]
        return GainState._made_of(several, rows, lambda x: x[order], n_states)

    def to(self, device: torch.device | str) -> GainState:
        """Give candidates in memory, as they stand, on another device."""
        rows = self.embedding.take(range(len(self))).to(device)
        return self._made_of([self], rows, lambda x: x.to(device), 1)

    @staticmethod
    def _made_of(
        several: Sequence[GainState],
        rows: Tensor,
        change: Callable[[Tensor], Tensor],
        n_states: int,
    ) -> GainState:
        """Make candidates with these rows of others as they stand; change each tensor of theirs."""

        def changed(parts: list[Tensor]) -> Tensor:
            return change(parts[0] if len(parts) == 1 else torch.cat(parts))

        made = GainState(stored(rows), changed([one.positions for one in several]), n_states)
        made.n_steps = several[0].n_steps
        made.has_equals = any(one.has_equals for one in several)
        for name in ("taken", "norms", "prints"):
            setattr(made, name, changed([getattr(one, name) for one in several]))
        for number, state in enumerate(made._states()):
            state[0] = changed([one._states()[number][one.at] for one in several])
        return made

    def put(self, part: GainState, number: int) -> None:
        """Take over what is known of some of them in that one's state of this number."""
        for mine, theirs in zip(self._states(), part._states(), strict=True):
            mine[self.at].index_copy_(0, part.index, theirs[number])

    def attempt(self, steps: Sequence[Pick], out: Tensor | None = None) -> Tensor:
        """Find the states after the present one, as the steps make them.

        Parameters
        ----------
        steps : sequence of Pick
            In their order.
        out : Tensor of shape (n,), bool, optional
            Who does not count for the result. None: nobody does.
        """
        largest = (
            self.norms.new_empty(len(steps))
            if out is None
            else self.norms.new_full((len(steps),), -math.inf)
        )
        if not steps:
            return largest
        careful = self.n_steps + self.at < N_FLOAT64_PICKS
        dtype = torch.float64 if careful else self.embedding.work_dtype
        factors, norms = side_by_side(steps, dtype)
        states = slice(self.at + 1, self.at + 1 + len(steps))
        for group, products in self._products(factors):
            pair = products.permute(2, 0, 1, 3, 4).reshape(len(steps), len(products), -1, self.r)
            change = pair @ pair[:, :, ::2].mT
            grown = self._grown(group, products, norms)
            for number, step in enumerate(range(states.start, states.stop)):
                before = self._blocks[step - 1, group]
                torch.sub(before, change[number], out=self._blocks[step, group])
                torch.add(self._off[step - 1, group], grown[:, number], out=self._off[step, group])
            self._evaluate(states, group, dtype)
            if out is not None:
                bounds = self._gains[states, group] + self._bars[states, group]
                bounds.masked_fill_(out[group], -math.inf)
                torch.maximum(largest, bounds.amax(1), out=largest)
        return largest

    def catch_up(self, steps: Sequence[Pick]) -> None:
        """Apply the next steps for good, many at a time.

        Parameters
        ----------
        steps : sequence of Pick
            In their order.
        """
        for start, some in steps_together(steps, self.n_steps):
            dtype = torch.float64 if start < N_FLOAT64_PICKS else self.embedding.work_dtype
            factors, norms = side_by_side(some, dtype)
            for group, products in self._products(factors):
                # Rows of q and of t in turn, those of all steps side by side.
                pair = products.permute(0, 1, 3, 2, 4).flatten(3).flatten(1, 2)
                self._blocks[self.at, group] -= pair @ pair[:, ::2].mT
                self._off[self.at, group] += self._grown(group, products, norms).sum(1)
                self._evaluate(slice(self.at, self.at + 1), group, dtype)
        self.n_steps += len(steps)

    def keep(self, count: int) -> None:
        """Make the state after the first `count` attempted steps the present one, for good."""
        if count:
            for state in self._states():
                state[0].copy_(state[count])
        self.at = 0
        self.n_steps += count

    @property
    def r(self) -> int:
        """Rows of a candidate's embedding."""
        return self.embedding.shape[1]

    @property
    def n_bytes(self) -> int:
        """Size of the embedding and of one state, in bytes."""
        return self.embedding.n_bytes + sum(state[0].nbytes for state in self._states())

    def _states(self) -> tuple[Tensor, Tensor]:
        return self._blocks, self._known

    def _products(self, factors: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Multiply all embeddings with steps' factors, and give the results for parts of them.

        Candidate by candidate the steps are small, so many chunks go through them at once: group,
        and products of shape (m, r, steps, 2, r).
        """
        (n, r, k), width, dtype = self.embedding.shape, factors.shape[1], factors.dtype
        size = self.embedding.chunk_rows
        rows = min(n, size * max(1, _PRODUCT_BYTES // (size * r * width * dtype.itemsize)))
        products, start = factors.new_empty((rows, r, width)), 0
        for part, v in self.embedding.chunks(dtype):
            into = products[part.start - start : part.stop - start]
            torch.mm(v.reshape(-1, k), factors, out=into.view(-1, width))
            if part.stop - start == rows or part.stop == n:
                yield (
                    slice(start, part.stop),
                    products[: part.stop - start].view(-1, r, width // (2 * r), 2, r),
                )
                start = part.stop

    def _grown(self, group: slice, products: Tensor, norms: Tensor) -> Tensor:
        """Bound what each step adds to the errors of A and B, (m, steps, 2)."""
        sizes = torch.linalg.vector_norm(products, dim=(1, 4)).double()
        factors = self.norms[group, None, None] * norms
        k = self.embedding.shape[2]
        return rounding.of_step(factors, sizes, k, self.r, products.dtype)

    def _evaluate(self, states: slice, part: slice, dtype: torch.dtype) -> None:
        """Bring gains and their bars up to date with A and B, computing in `dtype`."""
        blocks = self._blocks[states, part].flatten(0, 1)
        a = blocks[:, ::2]
        half, inverse_size = trace_gains(a, blocks[:, 1::2], dtype)
        gains = half.mul_(2)
        trace = a.diagonal(dim1=1, dim2=2).sum(1)
        off = self._off[states, part].flatten(0, 1)
        bars = rounding.of_gain(gains, off, inverse_size, trace, dtype)
        shape = self._gains[states, part].shape
        self._gains[states, part] = gains.view(shape)
        self._bars[states, part] = bars.view(shape)
