"""Gains from small matrices, quadratic forms, and how far floating point may be off."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

# At least so many blocks of at most this size are inverted faster all at once than one at a time.
_MANY, _SMALL = 64, 16
# Column blocks of a triangular matrix; above the diagonal ones nothing is multiplied.
_N_BLOCKS = 8
# Rounding by torch.get_float32_matmul_precision(): float32, TensorFloat32, bfloat16.
_FLOAT32_ROUNDING = {"highest": 2.0**-23, "high": 2.0**-10, "medium": 2.0**-7}

# tr((I + A)^-1 B) is off by less than this times the rounding, 1 + tr A, the size of the inverse
# and itself: 2.1 at most in 384,000 random A of sizes 1 to 40, from round to flat.
INVERTED = 3


def trace_gains(a: Tensor, b: Tensor, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Give tr((I + A)^-1 B) and the size of (I + A)^-1 for float64 blocks of shape (n, r, r).

    The inverse is computed in `dtype`. Of B only the symmetric part counts; the rest may be much
    larger.

    Where rounding has left I + A indefinite the gain is 0 and the size infinite, so that the
    candidate is computed afresh before anything is decided on it.
    """
    n, r, _ = a.shape
    invert = _invert_together if n >= _MANY and r <= _SMALL else _invert_each
    gains, size, valid = invert(a, b, dtype)
    invalid = ~(valid & torch.isfinite(gains))
    return gains.masked_fill(invalid, 0), size.double().masked_fill_(invalid, math.inf)


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
    return gains, -s.diagonal().amin(1), pivots.amin(0) > 0


def _invert_each(a: Tensor, b: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Do the same one candidate at a time."""
    s = a.to(dtype, copy=True)
    s.diagonal(dim1=1, dim2=2).add_(1)
    factor, failed = torch.linalg.cholesky_ex(s)
    inverse = symmetric(torch.cholesky_inverse(factor))
    return (inverse * b).sum((1, 2)), inverse.diagonal(dim1=1, dim2=2).amax(1), failed == 0


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
