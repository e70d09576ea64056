"""Which rows of an operation's output belong to which sample of the batch.

It follows from gradients of the batch itself. In one backward pass all samples have the same
weights; in others those of each sample are multiplied by a power of two, its digit. The gradient of
a row that belongs to one sample is multiplied by exactly that power, which identifies the sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

# In place of a sample: the gradient is zero; it is too small to tell, or not finite; several
# samples have it.
_ZERO, _UNKNOWN, SHARED = -1, -2, -3
# Powers of two that gradients of these types bear without loss.
_RADIX_FLOAT16, _RADIX_FLOAT32, _RADIX_FLOAT64 = 8, 128, 512


@dataclass(frozen=True)
class SampleLayout:
    """How the rows of a tensor, along one axis, belong to n samples.

    The order ``"samples"`` has all rows of the first sample, then those of the second;
    ``"positions"`` the first row of each sample, then the second ones; ``"index"`` any other.
    """

    n: int
    axis: int = 0
    order: Literal["samples", "positions", "index"] = "samples"
    # The rows of each sample, (n, m); where it has fewer than m, the number of all rows.
    index: Tensor | None = None
    # Whether this batch admits no other order, so that it holds for all batches in which the rows
    # depend on shapes alone.
    reusable: bool = True

    def __call__(self, t: Tensor) -> Tensor:
        """Return each sample's rows: (n, m, ...), with zeros where it has fewer."""
        t = t.movedim(self.axis, 0)
        if self.index is not None:
            return torch.cat([t, t.new_zeros(1, *t.shape[1:])])[self.index]
        sizes = (self.n, -1) if self.order == "samples" else (-1, self.n)
        rows: Tensor = t.unflatten(0, sizes)
        return rows if self.order == "samples" else rows.transpose(0, 1)


def radix(dtypes: set[torch.dtype]) -> int:
    """Return the number of powers of two that gradients of these types bear without loss."""
    if torch.float16 in dtypes:
        return _RADIX_FLOAT16
    return _RADIX_FLOAT64 if dtypes <= {torch.float64} else _RADIX_FLOAT32


def coded_weights(base: Tensor, radix: int) -> list[Tensor]:
    """Multiply weights (n, ...) by powers of two that code the numbers of the samples.

    Returns weights for each digit of the largest number, written with this radix.
    """
    n, weights = len(base), []
    numbers = torch.arange(n, device=base.device)
    for _ in range(max(1, math.ceil(math.log(n, radix) - 1e-9))):
        powers = _powers(radix, base)[numbers % radix]
        weights.append(base * powers.view(-1, *[1] * (base.dim() - 1)))
        numbers = numbers // radix
    return weights


def _powers(radix: int, like: Tensor) -> Tensor:
    """Return the powers of two by digit, exactly: PyTorch's `exp2` and `ldexp` may round."""
    powers = np.ldexp(1.0, np.arange(radix) - _shift(radix))
    return torch.as_tensor(powers, dtype=like.dtype, device=like.device)


def _shift(radix: int) -> int:
    # Half of the powers below one and half above; float16 has no range above.
    return radix - 1 if radix == _RADIX_FLOAT16 else radix // 2


def sample_of_row(passes: Sequence[Tensor], n: int, radix: int) -> Tensor:
    """Return the sample that each row belongs to, (rows,), or a negative constant like `SHARED`.

    The `passes` are gradients (rows, features) with the same weights for all of n samples, then
    with those of `coded_weights`.
    """
    base, *coded = passes
    if base.shape[1] == 0:
        return torch.full((len(base),), _ZERO, device=base.device)
    # Powers of two are exact, but sums on a GPU may be made in another order.
    tolerance = torch.finfo(base.dtype).eps ** 0.5
    # Below it, the smallest power of two leaves fewer digits than the tolerance needs.
    least = torch.finfo(base.dtype).tiny * tolerance * 2.0 ** _shift(radix)
    dtype = torch.float64 if base.dtype == torch.float64 else torch.float32
    base = base.to(dtype)
    size, largest = base.abs().max(1, keepdim=True)
    powers = _powers(radix, base)
    sample = torch.zeros(len(base), dtype=torch.int64, device=base.device)
    alone = torch.ones(len(base), dtype=torch.bool, device=base.device)
    for position, other in enumerate(coded):
        other = other.to(dtype)
        ratio = other.gather(1, largest) / base.gather(1, largest)
        digit = ratio.abs().log2().round().nan_to_num(0, 0, 0).long() + _shift(radix)
        power = powers[digit.clamp(0, radix - 1)]
        gap = torch.linalg.vector_norm(other.addcmul(base, power, value=-1), math.inf, 1)
        alone &= gap <= tolerance * (size * power).squeeze(1)
        sample += digit.squeeze(1) * radix**position
    sample = torch.where(alone & (sample < n), sample, SHARED)
    size = size.squeeze(1)
    sample = torch.where((size < least) | ~size.isfinite(), _UNKNOWN, sample)
    return torch.where(size == 0, _ZERO, sample)


def find_layout(
    rows: Callable[[Tensor, int], Tensor],
    axes: Sequence[int],
    passes: Sequence[Tensor],
    n: int,
    radix: int,
) -> SampleLayout | None:
    """Find how the rows of an operation's output belong to samples, along one of some axes.

    The function `rows` returns a gradient at the output, along an axis, as (rows, ...); `passes`
    are such gradients, as for `sample_of_row`. None: rows belong to several samples, or the
    gradients do not show to which.
    """
    possible = []
    for axis in axes:
        samples = sample_of_row([rows(t, axis).flatten(1) for t in passes], n, radix)
        if not bool((samples == SHARED).any()):
            possible.append(_layout(samples, n, axis))
    layout = next((one for one in possible if one is not None), None)
    if layout is None:
        return None
    # Where several axes are possible, rows without a gradient hide which it is.
    return replace(layout, reusable=layout.reusable and len(possible) == 1)


def _layout(samples: Tensor, n: int, axis: int) -> SampleLayout | None:
    """Return the layout of rows of known samples; None: the sample of some row is unknown."""
    n_rows = len(samples)
    known = samples >= 0
    if n_rows % n == 0:
        row = torch.arange(n_rows, device=samples.device)
        by_samples = bool((~known | (samples == row // (n_rows // n))).all())
        by_positions = bool((~known | (samples == row % n)).all())
        several = bool(known.any()) and bool(samples.max() > samples[known].min())
        certain = several and (n_rows == n or by_samples != by_positions)
        if by_samples:
            return SampleLayout(n, axis, "samples", reusable=certain)
        if by_positions:
            return SampleLayout(n, axis, "positions", reusable=certain)
    if bool((samples == _UNKNOWN).any()):
        return None
    counts = torch.bincount(samples[known], minlength=n)
    index = torch.full((n, max(1, int(counts.max()))), n_rows, device=samples.device)
    order = samples.argsort(stable=True)[n_rows - int(known.sum()) :]
    sample = samples[order]
    rank = torch.arange(len(order), device=samples.device) - (counts.cumsum(0) - counts)[sample]
    index[sample, rank] = order
    return SampleLayout(n, axis, "index", index, reusable=False)
