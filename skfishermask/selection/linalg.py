"""Small inverses, quadratic forms, and the coordinates in which a small pool is chosen from."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

# At least so many matrices of at most this size are inverted faster all at once than one at a
# time, on a CPU; on other devices each call of the other way does it for all of them anyway.
_MANY, _SMALL = 64, 16
# Column blocks of a triangular matrix; above the diagonal ones nothing is multiplied.
_N_BLOCKS = 8


def symmetric(matrix: Tensor) -> Tensor:
    """Give the symmetric part."""
    return (matrix + matrix.mT) / 2


def mean_size(matrix: Tensor | float) -> float:
    """Give the root mean square of a symmetric matrix's eigenvalues; waits for the device."""
    if not isinstance(matrix, Tensor):
        return matrix
    return float(torch.linalg.matrix_norm(matrix)) / math.sqrt(len(matrix))


def shifted(matrix: Tensor, shift: float) -> Tensor:
    """Give `matrix` + `shift` I."""
    matrix = matrix.clone()
    matrix.diagonal().add_(shift)
    return matrix


def trace_gains(a: Tensor, b: Tensor, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Give tr((I + A)^-1 B) and the size of (I + A)^-1 for float64 blocks of shape (n, r, r).

    The inverse is computed in `dtype`. Of B only the symmetric part counts; the rest may be much
    larger.

    Where rounding has left I + A indefinite the gain is 0 and the size infinite, so that the
    candidate is computed afresh before anything is decided on it.
    """
    n, r, _ = a.shape
    together = a.device.type == "cpu" and n >= _MANY and r <= _SMALL
    gains, size, invalid = (_invert_together if together else _invert_each)(a, b, dtype)
    # What is not a number is not equal to itself.
    invalid = invalid | (gains != gains)
    return gains.double().masked_fill_(invalid, 0), size.double().masked_fill_(invalid, math.inf)


def _invert_together(a: Tensor, b: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Symmetric Gauss-Jordan for all candidates at once; it ends in minus the inverse."""
    n, r, _ = a.shape
    s = torch.empty((r, r, n), dtype=dtype, device=a.device).copy_(a.permute(1, 2, 0))
    s.diagonal().add_(1)
    # There are few numbers to a call, so every call counts, those for a view too.
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
    # Rounding has left it not quite symmetric, and B may be far from that.
    gains = -(b.permute(1, 2, 0) * (s + s.transpose(0, 1))).sum((0, 1)) / 2
    return gains, -s.diagonal().amin(1), ~(pivots.amin(0) > 0)


def _invert_each(a: Tensor, b: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Do the same one candidate at a time."""
    s = a.to(dtype, copy=True)
    s.diagonal(dim1=1, dim2=2).add_(1)
    factor, failed = torch.linalg.cholesky_ex(s)
    inverse = torch.cholesky_inverse(factor)
    return (inverse * b).sum((1, 2)), inverse.diagonal(dim1=1, dim2=2).amax(1), failed != 0


class QuadraticForm:
    """V Q V^T for many V and one symmetric Q, which may be a multiple of the identity.

    Q is the sum of a lower triangle and its transpose, so half of the multiplications with it
    give all there is to know.
    """

    def __init__(self, matrix: Tensor | float) -> None:
        self.size = mean_size(matrix)
        self._half = matrix
        if isinstance(matrix, Tensor):
            self._half = matrix.tril()
            self._half.diagonal().div_(2)

    def __call__(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """Give V Q V^T, and a bound for the norm of V Q, for V of shape (n, r, k), float64."""
        half = self._half
        if not isinstance(half, Tensor):
            return half * v @ v.mT, half * torch.linalg.vector_norm(v.flatten(1), dim=1)
        n, r, k = v.shape
        total = v.new_zeros(n, r, r)
        squares = v.new_zeros(n)
        edges = [k * block // _N_BLOCKS for block in range(_N_BLOCKS + 1)]
        for a, b in pairwise(sorted(set(edges))):
            w = (v[..., a:].reshape(n * r, -1) @ half[a:, a:b]).view(n, r, -1)
            total.baddbmm_(w, v[..., a:b].mT)
            squares += w.square().sum((1, 2))
        return total + total.mT, 2 * squares.sqrt()


def fingerprints(v: Tensor) -> Tensor:
    """Give every sample of v (n, r, k) a number that those with the same rows share, int64.

    The sum of their bits, in integers, times fixed random ones: no order of summation and no
    rounding can tell equal samples apart, and two others agree with a chance of about 2^-60.
    """
    generator = torch.Generator().manual_seed(0)
    n_entries = v[0].numel()
    factors = torch.randint(-(2**62), 2**62, (n_entries,), generator=generator).to(v.device)
    # A zero has two signs. The low bits of what was float32 are zeros, so the high ones go there.
    bits = (v.double().flatten(1) + 0.0).view(torch.int64)
    return ((bits ^ (bits >> 32)) * (2 * factors + 1)).sum(1)


def repeated(prints: Tensor) -> Tensor:
    """Say which samples are the same as an earlier one, given their fingerprints."""
    ordered, order = torch.sort(prints, stable=True)
    again = torch.zeros_like(prints, dtype=torch.bool)
    again[order[1:]] = ordered[1:] == ordered[:-1]
    return again


def row_coordinates(rows: Tensor) -> Tensor:
    """Give the coordinates of rows in an orthonormal basis of what they span.

    That is the transposed triangle of a QR of their transpose. Householder's way leaves an error
    relative to each row's own length, and a row that depends on others does no harm.
    """
    triangle: Tensor = torch.linalg.qr(rows.double().T, mode="r").R
    return triangle.T.contiguous()
