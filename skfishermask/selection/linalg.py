"""Small inverses, quadratic forms, and fingerprints of what is equal."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from skfishermask.selection.rounding import product_error

# (a, b, A, B): A^T B is in columns a to b of a matrix, in the rows from a on.
Product = tuple[int, int, Tensor, Tensor]
# Matrices are inverted together on a CPU if there are at least this many
_MIN_TOGETHER = 64
# of at most this size. On other devices each call of the other way treats all of them anyway.
_MAX_TOGETHER_SIZE = 16
# Column blocks of a triangular matrix; those above the diagonal are not multiplied.
_N_BLOCKS = 4


def symmetric(matrix: Tensor) -> Tensor:
    """Return the symmetric part."""
    return (matrix + matrix.mT).div_(2)


def rms_eigenvalue(matrix: Tensor | float) -> float:
    """Return the root mean square of a symmetric matrix's eigenvalues; waits for the device."""
    if not isinstance(matrix, Tensor):
        return matrix
    return float(torch.linalg.matrix_norm(matrix)) / math.sqrt(len(matrix))


def column_blocks(k: int) -> list[tuple[int, int]]:
    """Divide the columns of a triangular (k, k) matrix, to multiply few zeros: start and stop."""
    return [*pairwise(sorted({k * block // _N_BLOCKS for block in range(_N_BLOCKS + 1)}))]


def lower_products(rows: Tensor) -> Iterator[Product]:
    """Yield products (a, b, A, B), of A^T B, that make up the lower triangle of rows^T rows."""
    return ((a, b, rows[:, a:], rows[:, a:b]) for a, b in column_blocks(rows.shape[1]))


def trace_gains(a: Tensor, b: Tensor, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Compute tr((I + A)^-1 B) and the size of (I + A)^-1, for A and B of shape (n, r, r), float64.

    Of B only the symmetric part counts; the other part may be much larger. The inverse is computed
    in `dtype`; its size is its largest diagonal entry. Where rounding has left I + A indefinite the
    trace is 0 and the size infinite, so that exact gains are computed before the candidate is
    decided on.
    """
    n, r, _ = a.shape
    if r == 1:
        size = a.flatten().to(dtype).add(1).reciprocal_()
        gains, invalid = b.flatten() * size, ~(size > 0)
    else:
        together = a.device.type == "cpu" and n >= _MIN_TOGETHER and r <= _MAX_TOGETHER_SIZE
        gains, size, invalid = (_invert_together if together else _invert_each)(a, b, dtype)
    invalid = invalid | gains.isnan()
    return gains.double().masked_fill_(invalid, 0), size.double().masked_fill_(invalid, math.inf)


def _invert_together(a: Tensor, b: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Run symmetric Gauss-Jordan for all candidates at once; it ends in minus the inverse."""
    n, r, _ = a.shape
    s = torch.empty((r, r, n), dtype=dtype, device=a.device).copy_(a.permute(1, 2, 0))
    s.diagonal().add_(1)
    # Calls are small, so their number counts, also of those for views.
    pivots, row, scaled = torch.empty_like(s[0]), torch.empty_like(s[0]), torch.empty_like(s[0])
    entries, column = row.unbind(), row[:, None]
    for pivot, entry, along, down in zip(
        pivots.unbind(), entries, s.unbind(0), s.unbind(1), strict=True
    ):
        row.copy_(along)
        pivot.copy_(entry)
        entry.fill_(-1)
        torch.div(row, pivot, out=scaled)
        s.addcmul_(column, scaled, value=-1)
        along.copy_(scaled)
        down.copy_(scaled)
    # Rounding leaves it not quite symmetric, and B may be far from symmetric.
    gains = -(b.permute(1, 2, 0) * (s + s.transpose(0, 1))).sum((0, 1)) / 2
    return gains, -s.diagonal().amin(1), ~(pivots.amin(0) > 0)


def _invert_each(a: Tensor, b: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Invert by a Cholesky factor for each candidate."""
    s = a.to(dtype, copy=True)
    s.diagonal(dim1=1, dim2=2).add_(1)
    factor, failed = torch.linalg.cholesky_ex(s)
    inverse = torch.cholesky_inverse(factor)
    return (inverse * b).sum((1, 2)), inverse.diagonal(dim1=1, dim2=2).amax(1), failed != 0


class QuadraticForm:
    """V Q V^T for many V and one symmetric Q; a float stands for that multiple of the identity.

    Q is the sum of a lower triangle and its transpose, so multiplications with one half of it
    suffice.
    """

    def __init__(self, matrix: Tensor | float) -> None:
        self.size = rms_eigenvalue(matrix)
        self.half = matrix
        if isinstance(matrix, Tensor):
            self.half = matrix.tril()
            self.half.diagonal().div_(2)

    def __call__(self, v: Tensor, norms: Tensor) -> tuple[Tensor, Tensor]:
        """Return V Q V^T, and a bound of its error, for V of shape (n, r, k), float64, and |V|."""
        half = self.half
        if not isinstance(half, Tensor):
            value, size = half * v @ v.mT, half * norms
        else:
            n, r, k = v.shape
            total = v.new_zeros(n, r, r)
            squares = v.new_zeros(n)
            for a, b in column_blocks(k):
                w = (v[..., a:].reshape(n * r, -1) @ half[a:, a:b]).view(n, r, -1)
                total.baddbmm_(w, v[..., a:b].mT)
                squares += w.square().sum((1, 2))
            value, size = total + total.mT, 2 * squares.sqrt()
        return value, norms * product_error(self.size * norms, size, v.shape[2], v.dtype)


def fingerprints(v: Tensor) -> Tensor:
    """Return a number for each sample of v (n, r, k), equal for equal samples, (n,), int64.

    It is a sum in integers of the bits times fixed random numbers, independent of the order of
    summation and free of rounding. For samples that differ it agrees with a chance of about 2^-60.
    """
    generator = torch.Generator().manual_seed(0)
    n_entries = v[0].numel()
    factors = torch.randint(-(2**62), 2**62, (n_entries,), generator=generator).to(v.device)
    # A zero has two signs. The low bits of former float32 are zeros, so the high ones are added.
    bits = (v.double().flatten(1) + 0.0).view(torch.int64)
    bits ^= bits >> 32
    return bits.mul_(factors.mul_(2).add_(1)).sum(1)


def is_duplicate(fingerprints: Tensor) -> Tensor:
    """Return which samples equal an earlier one, given their fingerprints, (n,), bool."""
    ordered, order = torch.sort(fingerprints, stable=True)
    duplicate = torch.zeros_like(fingerprints, dtype=torch.bool)
    duplicate[order[1:]] = ordered[1:] == ordered[:-1]
    return duplicate


def first_of_equals(fingerprints: Tensor) -> Tensor | None:
    """Return the index of the first sample that equals each, (n,); None where none are equal."""
    if not is_duplicate(fingerprints).any():
        return None
    _, kinds = torch.unique(fingerprints, return_inverse=True)
    index = torch.arange(len(kinds), device=kinds.device)
    return torch.full_like(kinds, len(kinds)).scatter_reduce(0, kinds, index, "amin")[kinds]
