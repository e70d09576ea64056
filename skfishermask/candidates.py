"""Candidates of a greedy selection, in blocks: wherever a share of the pool lies.

The greedy loop asks a block for its best candidates and for the embedding of one of them, and
hands it updates; it never sees a block's embedding as a whole. `selection` has the formulas.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

# Of one chunk's embedding; with its float64 copy, products and theirs it comes to 64 MiB.
_CHUNK_BYTES = 2**23
# Terms that a matrix product adds up before it starts another partial sum, about.
_SUMMED_TERMS = 512
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


@dataclass(frozen=True)
class ExactState:
    """A candidate's state at some step, computed afresh in float64.

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
    a, b : Tensor of shape (r, r)
        A and B.
    """

    position: int
    gain: float
    error: float
    error_a: float
    error_b: float
    a: Tensor
    b: Tensor


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

    def correct(self, exact: ExactState) -> None:
        """Replace a candidate's A and B by those computed afresh in float64.

        Parameters
        ----------
        exact : ExactState
            The candidate's state, after the updates applied so far.
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
        self._norm = torch.empty(n, dtype=torch.float64, device=embedding.device)
        self._a = self._norm.new_empty((n, r, r))
        self._b = torch.empty_like(self._a)
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
            self._error_a[part] = norm * self._product_error(mean_size(inverse) * norm, size)
            self._b[part], size = _quadratic(v, target)
            self._error_b[part] = norm * self._product_error(mean_size(target) * norm, size)
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
        # Every tensor of a block has one entry for each candidate.
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(part, name, value[index])
        return part

    def rows(self, position: int) -> Tensor:  # noqa: D102, see CandidateBlock
        return self._embedding[self._positions.index(position)].double()

    def correct(self, exact: ExactState) -> None:  # noqa: D102, see CandidateBlock
        index = self._positions.index(exact.position)
        self._a[index] = exact.a
        self._b[index] = exact.b
        self._error_a[index] = exact.error_a
        self._error_b[index] = exact.error_b
        self._gains[index] = exact.gain
        self._errors[index] = exact.error

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
        for part in chunks(self._a):
            q, t = staged.products[part].double().movedim(2, 0).contiguous()
            self._a[part] -= symmetric(q @ q.mT)
            self._b[part] -= 2 * symmetric(q @ t.mT)
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
        return chunks(self._embedding, self._dtype)

    def _product_error(self, factors: Tensor, product: Tensor) -> Tensor:
        """Bound the error of a product, given its size and that of its factors multiplied.

        Where terms of either sign cancel it is relative to the factors; where they add up,
        to the product, and grows as the root of the number of terms summed in one go.
        """
        terms = min(self._embedding.shape[2], _SUMMED_TERMS)
        return rounding(self._dtype) * (factors + math.sqrt(terms) / 2 * product)

    def _evaluate(self, part: slice) -> None:
        """Bring gains and their error bars up to date with A and B."""
        gains, inverse_size = trace_gains(self._a[part], self._b[part])
        self._gains[part] = gains
        # First order. The trace adds up r errors of either sign, so it is not off by r times one.
        error = self._error_b[part] + self._error_a[part] * gains.abs()
        self._errors[part] = inverse_size * error


def trace_gains(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
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
    return symmetric(vq @ v.double().mT), torch.linalg.vector_norm(vq, dim=(1, 2))


def mean_size(matrix: Tensor | float) -> float:
    """Give the root mean square of a symmetric matrix's eigenvalues."""
    if not isinstance(matrix, Tensor):
        return matrix
    return float(torch.linalg.matrix_norm(matrix)) / math.sqrt(len(matrix))


def symmetric(matrix: Tensor) -> Tensor:
    """Give the symmetric part."""
    return (matrix + matrix.mT) / 2


def rounding(dtype: torch.dtype) -> float:
    """Give the relative error of a product in `dtype`, reduced-precision modes included."""
    if dtype == torch.float64:
        return 2.0**-50
    return _FLOAT32_ROUNDING[torch.get_float32_matmul_precision()]


def chunks(tensor: Tensor, dtype: torch.dtype | None = None) -> Iterator[slice]:
    """Cut the candidates of an (n, ., .) tensor so that a chunk, in `dtype`, stays small."""
    n, rows, columns = tensor.shape
    size = max(1, _CHUNK_BYTES // (rows * columns * (dtype or tensor.dtype).itemsize))
    for start in range(0, n, size):
        yield slice(start, min(n, start + size))
