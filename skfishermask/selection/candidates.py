"""Candidates and the state of their gains: A, B and bounds of the errors of both.

:mod:`skfishermask.selection.greedy` has the formulas.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from skfishermask.selection import rounding
from skfishermask.selection.linalg import QuadraticForm, fingerprints, is_duplicate, trace_gains
from skfishermask.selection.storage import StoredEmbedding, stored
from skfishermask.selection.updates import (
    N_FLOAT64_PICKS,
    ExactGains,
    Pick,
    concatenate_factors,
    split_picks,
)


def check_finite(norms: Tensor, positions: Tensor) -> None:
    """Raise ValueError if the embedding at one of the positions has no finite norm."""
    bad = ~torch.isfinite(norms)
    if bad.any():
        row = int(positions[bad][0])
        raise ValueError(f"embedding must be finite, row {row} holds NaN or infinity.")


def _outer(pair: Tensor) -> Tensor:
    """Return q q^T and t q^T in turn, for rows of q and t in turn, (..., 2 r, r)."""
    q = pair[..., ::2, :].mT
    # A batch of products of single numbers is slow.
    return pair * q if pair.shape[-1] == 1 else pair @ q


def _in_marked_pair(pairs: Tensor) -> Tensor:
    """Return which elements of a sequence are in a marked pair of neighbours, (n,)."""
    no = pairs.new_zeros(1)
    return torch.cat([pairs, no]) | torch.cat([no, pairs])


class GainState:
    """Candidates, their embeddings, and A, B and gains of each, before and after attempted picks.

    Products with the embedding run in float32, but in float64 for the first picks and where the
    embedding is float64. A and B are float64. The `positions` in the pool, (n,), are ascending;
    `n_states` is one more than the picks that are attempted together.
    """

    def __init__(self, embedding: StoredEmbedding, positions: Tensor, n_states: int) -> None:
        n, r, _ = embedding.shape
        self.embedding, self.positions = embedding, positions
        self.index = positions  # among the candidates that these are a subset of
        self.taken = torch.zeros(n, dtype=torch.bool, device=embedding.device)
        # Equal for candidates with equal embeddings, and whether there are any.
        self.fingerprints, self.has_equals = torch.zeros_like(positions), False
        self.norms = torch.zeros(n, dtype=torch.float64, device=embedding.device)
        # Rows of A and of half of B in turn; of B only the symmetric part counts and is right.
        self._blocks = self.norms.new_zeros((n_states, n, 2 * r, r))
        self._scalars = self.norms.new_zeros((n_states, n, 4))
        self._update_error = self._scalars[..., :2]
        self._gains = self._scalars[..., 2]
        self._gain_error = self._scalars[..., 3]
        self.current = 0  # number of the current state
        self.n_applied = 0  # picks applied and committed

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def gains(self) -> Tensor:
        """Gains in the current state, (n,); those picked have one too."""
        return self._gains[self.current]

    @property
    def gain_error(self) -> Tensor:
        """Bounds of the errors of `gains`, (n,)."""
        return self._gain_error[self.current]

    def bounds(self, excluded: Tensor, n_states: int | None = None) -> Tensor:
        """Return upper bounds of the gains, (n,); minus infinity for those `excluded`.

        With `n_states`, in each of the first n_states states: (n_states, n).
        """
        which = self.current if n_states is None else slice(n_states)
        return (self._gains[which] + self._gain_error[which]).masked_fill_(excluded, -math.inf)

    def excluded(self, n_picks: int) -> Tensor:
        """Return which candidates cannot be among the next picks, (n,).

        Those picked cannot, nor those with n_picks equal ones left at lower positions.
        """
        if not self.has_equals:
            return self.taken
        ordered, order = torch.sort(self.fingerprints, stable=True)
        left = (~self.taken)[order].cumsum(0)
        # Left before the first one of each kind: the largest such sum so far, as sums only grow.
        first = torch.ones_like(self.taken)
        first[1:] = ordered[1:] != ordered[:-1]
        before = (left - (~self.taken)[order].long()).masked_fill(~first, 0).cummax(0).values
        rank = torch.empty_like(left)
        rank[order] = left - before
        return self.taken | (rank > n_picks)

    def initialize(
        self,
        inverse: Tensor | float,
        target: Tensor,
        on_chunk: Callable[[int], object] = lambda count: None,
    ) -> None:
        """Compute the first A and B from M_0^-1 and M_0^-1 F M_0^-1, as `SelectionProblem.start`.

        `on_chunk` is called with the number of candidates in each chunk that is done. Raises
        ValueError if the embedding holds NaN or infinity.
        """
        forms = [QuadraticForm(inverse), QuadraticForm(target)]
        for chunk, norms, ((a, error_a), (b, error_b)) in self.embedding.quadratic_forms(forms):
            self.norms[chunk] = norms
            self._blocks[0, chunk, ::2], self._blocks[0, chunk, 1::2] = a, b / 2
            self._update_error[0, chunk] = torch.stack([error_a, error_b], 1)
            self._update_gains(slice(0, 1), chunk, torch.float64)
            on_chunk(chunk.stop - chunk.start)
        check_finite(self.norms, self.positions)
        self._find_equals()

    def _find_equals(self) -> None:
        """Compute fingerprints where norms agree up to rounding; others get distinct numbers."""
        self.fingerprints = -1 - self.positions
        ordered, order = torch.sort(self.norms)
        near = ordered[1:] - ordered[:-1] <= 1e-12 * ordered[1:]
        similar = order[torch.nonzero(_in_marked_pair(near)).squeeze(1)]
        for some in similar.split(self.embedding.chunk_rows) if len(similar) else ():
            self.fingerprints[some] = fingerprints(self.embedding.take(some))
        self.has_equals = bool(is_duplicate(self.fingerprints).any())

    def set_exact(self, index: Tensor, exact: ExactGains) -> None:
        """Replace the current state of the candidates at `index`, (m,), by exact gains."""
        blocks = torch.stack([exact.a, exact.b / 2], 2).flatten(1, 2)
        scalars = [exact.update_error, exact.gains[:, None], exact.gain_error[:, None]]
        self._blocks[self.current].index_copy_(0, index, blocks)
        self._scalars[self.current].index_copy_(0, index, torch.cat(scalars, 1))

    def rows(self, index: Tensor) -> Tensor:
        """Return the embeddings of the candidates at `index`, (m, r, k), in float64."""
        return self.embedding.take(index).double()

    def subset(self, index: Tensor, n_states: int, dtype: torch.dtype | None = None) -> GainState:
        """Return the candidates at `index`, ascending, in their current state, in memory.

        Their embeddings are in `dtype`; None: in the `work_dtype` of the embedding.
        """
        rows = self.embedding.take(index).to(dtype or self.embedding.work_dtype)
        subset = self._derive([self], rows, lambda x: x.index_select(0, index), n_states)
        subset.index = index
        return subset

    @staticmethod
    def concatenate(several: Sequence[GainState], n_states: int) -> GainState:
        """Return candidates in memory together, in their current states, ordered by position."""
        order = torch.cat([one.positions for one in several]).argsort()
        rows = torch.cat([one.embedding.take(range(len(one))) for one in several])[order]
        return GainState._derive(several, rows, lambda x: x[order], n_states)

    def to(self, device: torch.device | str) -> GainState:
        """Return candidates in memory, in their current state, on another device."""
        rows = self.embedding.take(range(len(self))).to(device)
        return self._derive([self], rows, lambda x: x.to(device), 1)

    @staticmethod
    def _derive(
        several: Sequence[GainState],
        rows: Tensor,
        change: Callable[[Tensor], Tensor],
        n_states: int,
    ) -> GainState:
        """Return candidates with these rows and the changed tensors of others."""

        def changed(tensors: list[Tensor]) -> Tensor:
            return change(tensors[0] if len(tensors) == 1 else torch.cat(tensors))

        new = GainState(stored(rows), changed([one.positions for one in several]), n_states)
        new.n_applied = several[0].n_applied
        new.has_equals = any(one.has_equals for one in several)
        for name in ("taken", "norms", "fingerprints"):
            setattr(new, name, changed([getattr(one, name) for one in several]))
        for number, states in enumerate(new._states()):
            states[0] = changed([one._states()[number][one.current] for one in several])
        return new

    def copy_state(self, subset: GainState, number: int) -> None:
        """Set the current state of a subset's candidates to its state of this number."""
        for own, other in zip(self._states(), subset._states(), strict=True):
            own[self.current].index_copy_(0, subset.index, other[number])

    def attempt(self, picks: Sequence[Pick], excluded: Tensor | None = None) -> Tensor:
        """Compute the states after the current one, as each of some picks in order makes it.

        Returns the largest upper bound of a gain after each pick, (len(picks),), float64, but for
        those `excluded`, (n,), bool. None: the result is not needed.
        """
        largest = (
            self.norms.new_empty(len(picks))
            if excluded is None
            else self.norms.new_full((len(picks),), -math.inf)
        )
        if not picks:
            return largest
        in_float64 = self.n_applied + self.current < N_FLOAT64_PICKS
        dtype = torch.float64 if in_float64 else self.embedding.work_dtype
        factors, norms = concatenate_factors(picks, dtype)
        states = slice(self.current + 1, self.current + 1 + len(picks))
        for group, products, added in self._products(factors, norms):
            pair = products.permute(2, 0, 1, 3, 4).reshape(len(picks), len(products), -1, self.r)
            change = _outer(pair)
            for number, state in enumerate(range(states.start, states.stop)):
                before = self._blocks[state - 1, group]
                torch.sub(before, change[number], out=self._blocks[state, group])
                torch.add(
                    self._update_error[state - 1, group],
                    added[:, number],
                    out=self._update_error[state, group],
                )
            self._update_gains(states, group, dtype)
            if excluded is not None:
                bounds = self._gains[states, group] + self._gain_error[states, group]
                bounds.masked_fill_(excluded[group], -math.inf)
                torch.maximum(largest, bounds.amax(1), out=largest)
        return largest

    def apply(self, picks: Sequence[Pick]) -> None:
        """Update the current state by some picks in their order, many at a time."""
        for start, some in split_picks(picks, self.n_applied):
            dtype = torch.float64 if start < N_FLOAT64_PICKS else self.embedding.work_dtype
            factors, norms = concatenate_factors(some, dtype)
            for group, products, added in self._products(factors, norms):
                # Rows of q and of t in turn, those of all picks side by side.
                pair = products.permute(0, 1, 3, 2, 4).flatten(3).flatten(1, 2)
                self._blocks[self.current, group] -= pair @ pair[:, ::2].mT
                self._update_error[self.current, group] += added.sum(1)
                self._update_gains(slice(self.current, self.current + 1), group, dtype)
        self.n_applied += len(picks)

    def commit(self, count: int) -> None:
        """Make the state after the first `count` attempted picks the current one."""
        if count:
            for states in self._states():
                states[0].copy_(states[count])
        self.current = 0
        self.n_applied += count

    @property
    def r(self) -> int:
        """Rows of a candidate's embedding."""
        return self.embedding.shape[1]

    @property
    def n_bytes(self) -> int:
        """Size of the embedding and of one state, in bytes."""
        return self.embedding.n_bytes + sum(states[0].nbytes for states in self._states())

    def _states(self) -> tuple[Tensor, Tensor]:
        return self._blocks, self._scalars

    def _products(self, factors: Tensor, norms: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Multiply all embeddings with the factors of picks, a group of candidates at a time.

        Yields the group, its products, (m, r, picks, 2, r), and bounds of what each pick adds to
        the errors of A and B, (m, picks, 2).
        """
        split, k = (-1, 2, self.r), self.embedding.shape[2]
        for group, products, lacking in self.embedding.products(factors):
            products = products.unflatten(2, split)
            sizes = torch.linalg.vector_norm(products, dim=(1, 4)).double()
            bounds = self.norms[group, None, None] * norms
            if lacking is not None:
                bounds += lacking.double().unflatten(1, split).sum(3).sqrt_()
            added = rounding.update_error(bounds, sizes, k, self.r, factors.dtype)
            yield group, products, added

    def _update_gains(self, states: slice, group: slice, dtype: torch.dtype) -> None:
        """Compute gains and bounds of their errors from A and B, in `dtype`."""
        blocks = self._blocks[states, group].flatten(0, 1)
        a = blocks[:, ::2]
        half, inverse_size = trace_gains(a, blocks[:, 1::2], dtype)
        gains = half.mul_(2)
        update_error = self._update_error[states, group].flatten(0, 1)
        gain_error = rounding.gain_error(gains, update_error, inverse_size, a, dtype)
        shape = self._gains[states, group].shape
        self._gains[states, group] = gains.view(shape)
        self._gain_error[states, group] = gain_error.view(shape)
