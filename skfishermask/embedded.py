"""Candidates whose embedding this process can read: their gains, and how far each may be off."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from skfishermask.candidates import CAREFUL, Candidates, ExactState, Start, Step, Update
from skfishermask.gains import INVERTED, QuadraticForm, rounding, trace_gains
from skfishermask.storage import StoredEmbedding, stored

# Products of embeddings and updates are kept for so many candidates at once.
_PRODUCT_BYTES = 2**23
# Terms that a matrix product adds up before it starts another partial sum, about.
_SUMMED_TERMS = 512
# Of an attempt of at most so many steps all states before them are kept, else the first: after a
# failure the embedding need then not be read again.
_KEPT = 2


class EmbeddedBlock:
    """Candidates whose embedding this process can read.

    Products with the embedding run in float32, but in float64 for the first steps and where the
    embedding is float64. A and B are float64. They change by differences, so rounding errors
    keep their size while the gains fall; each candidate therefore carries a running bound for the
    error of its A and B.

    Parameters
    ----------
    embedding : StoredEmbedding or Tensor, of shape (n, r, k), floating point
        Fisher embedding, read in chunks and never changed.
    first : Start
        The matrices of the state that the block starts in.
    start : int, default=0
        Position in the pool of the first sample.

    Raises
    ------
    ValueError
        If the embedding holds NaN or infinity.
    """

    def __init__(self, embedding: Tensor | StoredEmbedding, first: Start, start: int = 0) -> None:
        self._embedding = embedding = stored(embedding)
        self._positions: Sequence[int] = range(start, start + len(embedding))
        # Steps for good that wait for the next time the embedding is read.
        self._pending: Sequence[Step] = ()
        # The last attempt, and the state before it.
        self._steps: Sequence[Step] = ()
        self._before: Sequence[EmbeddedBlock] = ()
        self._n_updates = 0
        n, r, _ = embedding.shape
        self._norm = torch.empty(n, dtype=torch.float64, device=embedding.device)
        # Rows of A and of half of B in turn; of B only the symmetric part counts and is right.
        self._blocks = self._norm.new_empty((n, 2 * r, r))
        self._error_a = torch.empty_like(self._norm)
        self._error_b = torch.empty_like(self._norm)
        self._gains = torch.empty_like(self._norm)
        self._errors = torch.empty_like(self._norm)
        self._taken = torch.zeros(n, dtype=torch.bool, device=embedding.device)

        inverse, target = QuadraticForm(first.inverse), QuadraticForm(first.target)
        for part, v in embedding.chunks(torch.float64):
            norm = torch.linalg.vector_norm(v.flatten(1), dim=1)
            if not torch.isfinite(norm).all():
                row = start + part.start + int(torch.nonzero(~torch.isfinite(norm))[0])
                raise ValueError(f"embedding must be finite, row {row} holds NaN or infinity.")
            self._norm[part] = norm
            self._blocks[part, ::2], size = inverse(v)
            self._error_a[part] = norm * self._product_error(
                inverse.size * norm, size, torch.float64
            )
            b, size = target(v)
            self._blocks[part, 1::2] = b / 2
            self._error_b[part] = norm * self._product_error(
                target.size * norm, size, torch.float64
            )
            self._evaluate(part, torch.float64)

    def __contains__(self, position: int) -> bool:
        return position in self._positions

    def __len__(self) -> int:
        return len(self._positions)

    @property
    def positions(self) -> Sequence[int]:
        """Positions in the pool.

        Returns
        -------
        sequence of int
            Ascending.
        """
        return self._positions

    @property
    def device(self) -> torch.device:
        """Where the candidates' state is.

        Returns
        -------
        torch.device
            That of its tensors.
        """
        return self._taken.device

    @property
    def n_bytes(self) -> int:
        """Size of the embedding and of the candidates' state.

        Returns
        -------
        int
            In bytes.
        """
        return self._embedding.n_bytes + sum(value.nbytes for value in self._state().values())

    def best(  # noqa: D102, see CandidateBlock
        self, count: int, aside: Sequence[int] = ()
    ) -> Candidates:
        self._settle()
        bound = (self._gains + self._errors).masked_fill_(self._out(aside), -math.inf)
        index = torch.empty(0, dtype=torch.int64, device=bound.device)
        count = min(count, len(bound))
        if count:
            # topk leaves open which of equal entries it gives, so it only sets the threshold.
            least = torch.topk(bound, count, sorted=False).values.amin()
            index = torch.nonzero((bound >= least) & (bound > -math.inf)).squeeze(1)
            index = index[torch.sort(bound[index], descending=True, stable=True).indices[:count]]
        positions = torch.tensor([self._positions[i] for i in index.tolist()], dtype=torch.int64)
        return Candidates(positions.to(index.device), self._gains[index], self._errors[index])

    def likely(self, count: int) -> Candidates:  # noqa: D102, see CandidateBlock
        return self.best(count)

    def subset(self, positions: Sequence[int]) -> EmbeddedBlock:  # noqa: D102, see CandidateBlock
        self._settle()
        index = self._index(positions)
        part = self._with(lambda value: value[index])
        part._positions = list(positions)
        part._embedding = stored(self._embedding.take(index.tolist()))
        return part

    def snapshot(self, positions: Sequence[int]) -> EmbeddedBlock:
        """Give a few candidates as they were before the last attempt, or as they are.

        Parameters
        ----------
        positions : sequence of int
            Positions in the pool, ascending.

        Returns
        -------
        EmbeddedBlock
            In memory, and independent of this one.
        """
        return (self._before[0] if self._before else self).subset(positions)

    @staticmethod
    def joined(blocks: Sequence[EmbeddedBlock]) -> EmbeddedBlock:
        """Put blocks in memory that are in the same state together.

        Parameters
        ----------
        blocks : sequence of EmbeddedBlock
            At least one; no two have a position in common.

        Returns
        -------
        EmbeddedBlock
            With ascending positions.
        """
        for block in blocks:
            block._settle()
        whole = copy.copy(blocks[0])
        order = sorted((p, b, i) for b, x in enumerate(blocks) for i, p in enumerate(x.positions))
        starts = [0]
        for block in blocks:
            starts.append(starts[-1] + len(block))
        index = torch.tensor([starts[b] + i for _, b, i in order], device=whole._taken.device)
        for name in whole._state():
            setattr(whole, name, torch.cat([vars(block)[name] for block in blocks])[index])
        values = torch.cat([block._embedding.take(range(len(block))) for block in blocks])
        whole._positions = [position for position, _, _ in order]
        whole._embedding = stored(values[index])
        whole._n_updates = max(block._n_updates for block in blocks)
        return whole

    def to(self, device: torch.device | str) -> EmbeddedBlock:
        """Give the candidates on another device.

        Parameters
        ----------
        device : torch.device or str
            The device.

        Returns
        -------
        EmbeddedBlock
            In memory, and independent of this one.
        """
        part = self.subset(self._positions)
        vars(part).update({name: value.to(device) for name, value in part._state().items()})
        part._embedding = stored(part._embedding.take(range(len(part))).to(device))
        return part

    def fetch(self, positions: Sequence[int]) -> None:  # noqa: D102, see CandidateBlock
        pass

    def rows(self, position: int) -> Tensor:  # noqa: D102, see CandidateBlock
        return self._embedding.take([self._positions.index(position)])[0].double()

    def correct(self, exact: ExactState) -> None:  # noqa: D102, see CandidateBlock
        self._settle()
        self._correct(self._positions.index(exact.position), exact)

    def advance(self, updates: Sequence[Update]) -> None:  # noqa: D102, see CandidateBlock
        self._wait([*self._pending, *map(Step, updates)])

    def attempt(  # noqa: D102, see CandidateBlock
        self, steps: Sequence[Step], aside: Sequence[int]
    ) -> Tensor:
        largest = self._norm.new_full((len(steps) + 1,), -math.inf)

        def look(number: int, part: slice, bounds: Tensor) -> None:
            torch.maximum(largest[number], bounds.amax(), out=largest[number])

        self.watch(steps, aside, look)
        return largest

    def watch(
        self,
        steps: Sequence[Step],
        aside: Sequence[int],
        look: Callable[[int, slice, Tensor], None],
    ) -> None:
        """Attempt steps, and show the ``gains + errors`` of all candidates before and after each.

        Parameters
        ----------
        steps : sequence of Step
            In their order.
        aside : sequence of int
            Positions to show as minus infinity, like those taken already.
        look : callable
            Called with the number of the state from 0 to ``len(steps)``, a part of the block's
            candidates and a tensor of theirs, for part after part.
        """
        n_kept = len(steps) if len(steps) <= _KEPT else 1
        self._before = [self._with(torch.empty_like) for _ in range(n_kept)]
        self._steps = steps
        waiting, self._pending = self._pending, ()
        self._replay([*waiting, *steps], len(waiting), self._out(aside), look)

    def keep(self, count: int) -> None:  # noqa: D102, see CandidateBlock
        steps, before = self._steps, self._before
        self._steps, self._before = (), ()
        if count < len(steps):
            number = min(count, len(before) - 1)
            vars(self).update(before[number]._state(), _n_updates=before[number]._n_updates)
            self._wait(steps[number:count])

    def _wait(self, steps: Sequence[Step]) -> None:
        """Leave steps to the next read of the embedding, but take their samples out at once."""
        self._pending = steps
        self._taken[self._index([step.update.position for step in steps])] = True

    def _settle(self) -> None:
        if self._pending:
            steps, self._pending = self._pending, ()
            self._replay(steps, len(steps), self._taken, None)

    def _out(self, aside: Sequence[int]) -> Tensor:
        return self._taken.index_fill(0, self._index(aside), True) if aside else self._taken

    def _state(self) -> dict[str, Tensor]:
        """Give every tensor of the block: each has one entry for each candidate."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def _with(self, change: Callable[[Tensor], Tensor]) -> EmbeddedBlock:
        """Give a block with another state, made of this one's, but this one's embedding."""
        part = copy.copy(self)
        part._pending, part._steps, part._before = (), (), ()
        vars(part).update({name: change(value) for name, value in self._state().items()})
        return part

    def _replay(
        self,
        steps: Sequence[Step],
        n_sure: int,
        out: Tensor,
        look: Callable[[int, slice, Tensor], None] | None,
    ) -> None:
        """Apply steps, the first of them for good; from these on, show all that is not `out`."""
        n, r, k = self._embedding.shape
        updates = [step.update for step in steps]
        if updates:
            factors = torch.cat([torch.cat([update.u, update.t], 1) for update in updates], 1)
            norms = factors.square().sum(0).view(len(steps), 2, r).sum(2).sqrt_()
            careful = self._n_updates < CAREFUL
            dtype = torch.float64 if careful else self._embedding.work_dtype
            factors = factors.to(dtype)
            # Candidate by candidate the steps are small, so many chunks go through them at once.
            size = self._embedding.chunk_rows
            rows = size * max(1, _PRODUCT_BYTES // (size * r * factors[0].nbytes))
            products = factors.new_empty((min(n, rows), r, len(steps), 2, r))
            start = 0
            for part, v in self._embedding.chunks(dtype):
                into = products[part.start - start : part.stop - start]
                torch.mm(v.reshape(-1, k), factors, out=into.view(v.shape[0] * r, -1))
                if part.stop - start == len(products) or part.stop == n:
                    group = slice(start, start := part.stop)
                    self._replay_group(group, steps, products, norms, n_sure, out, look)
        elif look is not None:
            look(0, slice(0, n), (self._gains + self._errors).masked_fill(out, -math.inf))
        index = self._index([update.position for update in updates])
        for number, before in enumerate(self._before, n_sure):
            before._n_updates += number
            before._taken[self._index([update.position for update in updates[:number]])] = True
        self._n_updates += len(steps)
        self._taken[index] = True

    def _replay_group(
        self,
        group: slice,
        steps: Sequence[Step],
        products: Tensor,
        norms: Tensor,
        n_sure: int,
        out: Tensor,
        look: Callable[[int, slice, Tensor], None] | None,
    ) -> None:
        """Apply steps to some candidates, given the (m, r, steps, 2, r) products with them."""

        def show(number: int) -> None:
            if 0 <= number - n_sure < len(self._before):
                now = self._state()
                for name, value in self._before[number - n_sure]._state().items():
                    value[group] = now[name][group]
            if look is not None and number >= n_sure:
                bounds = self._gains[group] + self._errors[group]
                look(number - n_sure, group, bounds.masked_fill(out[group], -math.inf))

        for number, step in enumerate(steps):
            for exact in step.exact:
                if exact.position in self and (
                    group.start <= (row := self._positions.index(exact.position)) < group.stop
                ):
                    self._correct(row, exact)
            show(number)
            # Rows of Q and of T in turn; so the product has those of Q Q^T and of T Q^T.
            pair = products[: group.stop - group.start, :, number].contiguous().flatten(1, 2)
            self._blocks[group].sub_(pair @ pair[:, ::2].mT)
            squares = pair.square().unflatten(1, (-1, 2)).sum(1).sum(2)
            size_q, size_t = squares.double().sqrt_().T
            factors_q, factors_t = self._norm[group] * norms[number, :, None]
            # Of the small product too: it adds up r terms.
            small = rounding(products.dtype) * (1 + math.sqrt(pair.shape[2]) / 2)
            error_q = self._product_error(factors_q, size_q, products.dtype) + small / 2 * size_q
            error_t = self._product_error(factors_t, size_t, products.dtype) + small / 2 * size_t
            self._error_a[group].add_(2 * size_q * error_q)
            self._error_b[group].add_(2 * (size_q * error_t + size_t * error_q))
            self._evaluate(group, products.dtype)
        show(len(steps))

    def _correct(self, row: int, exact: ExactState) -> None:
        self._blocks[row, ::2] = exact.a
        self._blocks[row, 1::2] = exact.b / 2
        self._error_a[row] = exact.error_a
        self._error_b[row] = exact.error_b
        self._gains[row] = exact.gain
        self._errors[row] = exact.error

    def _index(self, positions: Sequence[int]) -> Tensor:
        """Turn positions in the pool, where they are the block's, into its own."""
        found = [self._positions.index(p) for p in positions if p in self._positions]
        return torch.tensor(found, dtype=torch.int64, device=self._taken.device)

    def _product_error(self, factors: Tensor, product: Tensor, dtype: torch.dtype) -> Tensor:
        """Bound the error of a product, given its size and that of its factors multiplied.

        Where terms of either sign cancel it is relative to the factors; where they add up,
        to the product, and grows as the root of the number of terms summed in one go.
        """
        terms = min(self._embedding.shape[2], _SUMMED_TERMS)
        return rounding(dtype) * (factors + math.sqrt(terms) / 2 * product)

    def _evaluate(self, part: slice, dtype: torch.dtype) -> None:
        """Bring gains and their error bars up to date with A and B, computing in `dtype`."""
        a = self._blocks[part, ::2]
        half, inverse_size = trace_gains(a, self._blocks[part, 1::2], dtype)
        self._gains[part] = gains = 2 * half
        # First order. The trace adds up r errors of either sign, so it is not off by r times one.
        # A gain computed in `dtype` is off as if A were by a few times its rounding.
        inverted = INVERTED * rounding(dtype) * (1 + a.diagonal(dim1=1, dim2=2).sum(1))
        error = self._error_b[part] + (self._error_a[part] + inverted) * gains.abs()
        self._errors[part] = inverse_size * error
