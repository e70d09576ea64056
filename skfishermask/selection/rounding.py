"""Bounds of rounding errors, which decide when a candidate's gain is computed from its embedding.

A candidate's gain is tr((I + A)^-1 B). A and B are updated by differences, so errors keep their
size while gains fall; each candidate therefore carries bounds of the errors of its A and B in the
Frobenius norm, which become one of the error of its gain. The bounds are of first order, and a sum
is taken to be off by the root of the number of its terms.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Of a product of two numbers and a few sums, as in every update.
_FLOAT64_ROUNDOFF = 2.0**-50
# By the name of the mode in which float32 matrices are multiplied.
_FLOAT32_ROUNDOFF = {"ieee": 2.0**-23, "highest": 2.0**-23, "tf32": 2.0**-10, "high": 2.0**-10}
# In a mode of another name.
_COARSEST_ROUNDOFF = 2.0**-7
# Terms that a matrix product adds up before it starts another partial sum, about.
_SUMMED_TERMS = 512
# tr((I + A)^-1 B) is off by less than this times the roundoff, 1 + tr A, the size of the inverse
# and itself: 2.1 at most in 384,000 random A of sizes 1 to 40, from round to flat.
INVERSE_ERROR_FACTOR = 3


def unit_roundoff(dtype: torch.dtype) -> float:
    """Return the relative error of a product in `dtype`, reduced-precision modes included."""
    if dtype == torch.float64:
        return _FLOAT64_ROUNDOFF
    try:
        return _FLOAT32_ROUNDOFF.get(torch.get_float32_matmul_precision(), _COARSEST_ROUNDOFF)
    except RuntimeError:
        # It was set for single backends, and PyTorch refuses to summarize these.
        backends = (torch.backends.cuda, getattr(torch.backends, "mkldnn", None))
        modes = [getattr(backend, "matmul", None) for backend in backends]
        names = [getattr(mode, "fp32_precision", "none") for mode in modes]
        return max(
            _FLOAT32_ROUNDOFF.get(name, _COARSEST_ROUNDOFF) for name in names if name != "none"
        )


def product_error(
    factors: Tensor, product: Tensor, k: int, dtype: torch.dtype, r: int = 0
) -> Tensor:
    """Bound the error of V U, from `factors` |V| |U| and `product` |V U|, with k terms in each sum.

    Where terms of either sign cancel it is relative to the factors; where they add up, to the
    product, and grows as the root of the number of terms in a partial sum. With r, the rounding of
    a product of V U with itself, of r terms, is included.
    """
    terms = math.sqrt(min(k, _SUMMED_TERMS)) + (1 + math.sqrt(r) if r else 0)
    return torch.add(factors, product, alpha=terms / 2).mul_(unit_roundoff(dtype))


def update_error(factors: Tensor, sizes: Tensor, k: int, r: int, dtype: torch.dtype) -> Tensor:
    """Bound what a pick adds to the errors of A and of B, (..., 2), float64, for V of shape (r, k).

    The `factors` are |V| |U| and |V| |T|, the `sizes` those of the products q = V U and t = V T,
    both (..., 2). These change A by q q^T and B by q t^T + t q^T, computed in `dtype`.
    """
    error = product_error(factors, sizes, k, dtype, r).mul_(2)
    crossed = sizes[..., :1] * error
    crossed[..., 1].addcmul_(sizes[..., 1], error[..., 0])
    return crossed


def gain_error(
    gains: Tensor,
    update_error: Tensor,
    inverse_size: Tensor,
    a: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Bound the errors of gains tr((I + A)^-1 B), (...), with the inverse computed in `dtype`.

    `update_error`, (..., 2), bounds the errors of A and B; `inverse_size` is that of (I + A)^-1.
    """
    once = INVERSE_ERROR_FACTOR * unit_roundoff(dtype)
    # Of samples that are dropped A is negative.
    size_a = torch.linalg.vector_norm(a.diagonal(dim1=-2, dim2=-1), ord=1, dim=-1)
    error_a = torch.add(update_error[..., 0] + once, size_a, alpha=once)
    return torch.addcmul(update_error[..., 1], error_a, gains.abs()).mul_(inverse_size)
