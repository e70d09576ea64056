"""How far floating point may be off: all that the choice needs to be the exact one.

A candidate's gain is tr((I + A)^-1 B). A and B are brought up to date by differences, so errors
keep their size while gains fall; each candidate therefore carries bounds for the errors of its A
and B in the Frobenius norm, which become one for its gain. They are of first order, and sums are
taken to be off by the root of the number of their terms.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Of a product of two numbers and a few sums, as every step has them.
_FLOAT64 = 2.0**-50
# Rounding by the name of the mode in which matrices of float32 are multiplied.
_FLOAT32 = {"ieee": 2.0**-23, "highest": 2.0**-23, "tf32": 2.0**-10, "high": 2.0**-10}
_COARSEST = 2.0**-7
# Terms that a matrix product adds up before it starts another partial sum, about.
_SUMMED_TERMS = 512
# tr((I + A)^-1 B) is off by less than this times the rounding, 1 + tr A, the size of the inverse
# and itself: 2.1 at most in 384,000 random A of sizes 1 to 40, from round to flat.
INVERSE_ERROR_FACTOR = 3


def unit_roundoff(dtype: torch.dtype) -> float:
    """Give the relative error of a product in `dtype`, reduced-precision modes included."""
    if dtype == torch.float64:
        return _FLOAT64
    try:
        return _FLOAT32.get(torch.get_float32_matmul_precision(), _COARSEST)
    except RuntimeError:
        # It was set for single backends, and PyTorch refuses to sum that up.
        backends = (torch.backends.cuda, getattr(torch.backends, "mkldnn", None))
        modes = [getattr(backend, "matmul", None) for backend in backends]
        found = [getattr(mode, "fp32_precision", "none") for mode in modes]
        return max(_FLOAT32.get(mode, _COARSEST) for mode in found if mode != "none")


def of_product(factors: Tensor, product: Tensor, k: int, dtype: torch.dtype, r: int = 0) -> Tensor:
    """Bound the error of V U, over k terms, given its size and that of its factors multiplied.

    Where terms of either sign cancel it is relative to the factors; where they add up, to the
    product, and grows as the root of the number of terms summed in one go. With `r` above 0 there
    is room for the rounding of a product of the result with itself, over r terms.
    """
    terms = math.sqrt(min(k, _SUMMED_TERMS)) + (1 + math.sqrt(r) if r else 0)
    return torch.add(factors, product, alpha=terms / 2).mul_(unit_roundoff(dtype))


def of_step(factors: Tensor, sizes: Tensor, k: int, r: int, dtype: torch.dtype) -> Tensor:
    """Bound what a step adds to the errors of A and of B.

    Parameters
    ----------
    factors : Tensor of shape (..., 2), float64
        |V| |U| and |V| |T|. Their products q = V U and t = V T change A by q q^T and B by
        q t^T + t q^T.
    sizes : Tensor of the same shape
        |q| and |t|.
    k, r : int
        Columns and rows of V.
    dtype : torch.dtype
        In which all of it is computed.

    Returns
    -------
    Tensor of the same shape, float64
    """
    off = of_product(factors, sizes, k, dtype, r).mul_(2)
    crossed = sizes[..., :1] * off
    crossed[..., 1].addcmul_(sizes[..., 1], off[..., 0])
    return crossed


def of_gain(
    gains: Tensor, off: Tensor, inverse_size: Tensor, trace_a: Tensor, dtype: torch.dtype
) -> Tensor:
    """Bound the error of gains, given those of A and B, (..., 2), and (I + A)^-1 in `dtype`."""
    once = INVERSE_ERROR_FACTOR * unit_roundoff(dtype)
    off_a = torch.add(off[..., 0] + once, trace_a, alpha=once)
    return torch.addcmul(off[..., 1], off_a, gains.abs()).mul_(inverse_size)
