"""Which rows of an operation's output belong to which sample of the batch.

It is read off the gradients of the batch itself. One backward pass has the same weights for all
samples, in others those of sample s are multiplied by a power of two that is its digit: what
belongs to one sample alone is multiplied by just that, to the last bit, and tells whose it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

_DEAD, _UNKNOWN, SHARED = -1, -2, -3


@dataclass(frozen=True)
class Arrangement:
    """How the rows of a tensor, along one axis, belong to n samples.

    Attributes
    ----------
    n : int
        Number of samples.
    axis : int
        The axis of the rows.
    order : {"samples", "positions", "index"}
        ``"samples"``: all rows of the first sample, then those of the second; ``"positions"``: the
        first row of each sample, then the second ones; ``"index"``: any other way.
    index : Tensor of shape (n, m), optional
        The rows of each sample; where it has fewer than m, the number of all rows.
    lasting : bool
        Whether the order follows from this batch beyond doubt, so that it holds for others whose
        rows depend on shapes alone.
    """

    n: int
    axis: int = 0
    order: Literal["samples", "positions", "index"] = "samples"
    index: Tensor | None = None
    lasting: bool = True

    def __call__(self, t: Tensor) -> Tensor:
        """Give each sample its rows: (n, m, ...), with zeros where it has fewer."""
        t = t.movedim(self.axis, 0)
        if self.index is not None:
            return torch.cat([t, t.new_zeros(1, *t.shape[1:])])[self.index]
        sizes = (self.n, -1) if self.order == "samples" else (-1, self.n)
        arranged: Tensor = t.unflatten(0, sizes)
        return arranged if self.order == "samples" else arranged.transpose(0, 1)


def radix(dtypes: set[torch.dtype]) -> int:
    """Say how many powers of two the gradients of these types bear without loss."""
    if torch.float16 in dtypes:
        return 8
    return 512 if dtypes <= {torch.float64} else 128


def coded_weights(base: Tensor, radix: int) -> list[Tensor]:
    """Multiply each sample's row by the power of two that is its digit, a tensor for each digit.

    Parameters
    ----------
    base : Tensor of shape (n, ...)
        Weights.
    radix : int
        How many digits there are.
    """
    n, codes = len(base), []
    numbers = torch.arange(n, device=base.device)
    for _ in range(max(1, math.ceil(math.log(n, radix) - 1e-9))):
        digits = _powers(radix, base)[numbers % radix]
        codes.append(base * digits.view(-1, *[1] * (base.dim() - 1)))
        numbers = numbers // radix
    return codes


def _powers(radix: int, like: Tensor) -> Tensor:
    """Give the powers of two by digit, exactly: PyTorch's `exp2` and `ldexp` may round."""
    powers = np.ldexp(1.0, np.arange(radix) - _shift(radix))
    return torch.as_tensor(powers, dtype=like.dtype, device=like.device)


def _shift(radix: int) -> int:
    # Half of the powers below one and half above; 16 bits have no room above.
    return radix - 1 if radix == 8 else radix // 2


def owners(passes: Sequence[Tensor], n: int, radix: int) -> Tensor:
    """Tell whose each row is: a sample's number, or why it is nobody's (`SHARED`: several have it).

    Parameters
    ----------
    passes : sequence of Tensor of shape (rows, features)
        Gradients with the same weights for all, then with those of `coded_weights`.
    n : int
        Number of samples.
    radix : int
        How many digits there are.

    Returns
    -------
    Tensor of shape (rows,), int64
    """
    base, *coded = passes
    if base.shape[1] == 0:
        return torch.full((len(base),), _DEAD, device=base.device)
    # Powers of two are exact; but atomic sums on a GPU may round in another order.
    tolerance = torch.finfo(base.dtype).eps ** 0.5
    # Below it, the smallest power of two would leave fewer digits than the tolerance asks for.
    least = torch.finfo(base.dtype).tiny * tolerance * 2.0 ** _shift(radix)
    work = torch.float64 if base.dtype == torch.float64 else torch.float32
    base = base.to(work)
    size, largest = base.abs().max(1, keepdim=True)
    powers = _powers(radix, base)
    owner = torch.zeros(len(base), dtype=torch.int64, device=base.device)
    alone = torch.ones(len(base), dtype=torch.bool, device=base.device)
    for position, other in enumerate(coded):
        other = other.to(work)
        ratio = other.gather(1, largest) / base.gather(1, largest)
        digit = ratio.abs().log2().round().nan_to_num(0, 0, 0).long() + _shift(radix)
        power = powers[digit.clamp(0, radix - 1)]
        gap = torch.linalg.vector_norm(other.addcmul(base, power, value=-1), math.inf, 1)
        alone &= gap <= tolerance * (size * power).squeeze(1)
        owner += digit.squeeze(1) * radix**position
    owner = torch.where(alone & (owner < n), owner, SHARED)
    owner = torch.where(size.squeeze(1) < least, _UNKNOWN, owner)
    return torch.where(size.squeeze(1) == 0, _DEAD, owner)


def arrangement(
    rows: Callable[[Tensor, int], Tensor],
    axes: Sequence[int],
    passes: Sequence[Tensor],
    n: int,
    radix: int,
) -> Arrangement | None:
    """Find how the rows of an operation's output belong to samples.

    Parameters
    ----------
    rows : callable
        Views gradients at the output, and an axis, as (rows, ...).
    axes : sequence of int
        The axes that the rows may run along.
    passes : sequence of Tensor
        Gradients at the output, with the same weights for all, then with those of `coded_weights`.
    n : int
        Number of samples.
    radix : int
        As for `coded_weights`.

    Returns
    -------
    Arrangement or None
        None: there are rows that belong to several samples, or it cannot be told.
    """
    found = []
    for axis in axes:
        owner = owners([rows(t, axis).flatten(1) for t in passes], n, radix)
        if not bool((owner == SHARED).any()):
            found.append(_order(owner, n, axis))
    # Where several axes would do, dead entries hide which it is.
    if len([one for one in found if one is not None]) == 0:
        return None
    best = next(one for one in found if one is not None)
    if len(found) > 1 and best.lasting:
        return Arrangement(best.n, best.axis, best.order, best.index, lasting=False)
    return best


def _order(owner: Tensor, n: int, axis: int) -> Arrangement | None:
    n_rows = len(owner)
    known = owner >= 0
    if n_rows % n == 0:
        row = torch.arange(n_rows, device=owner.device)
        by_samples = bool((~known | (owner == row // (n_rows // n))).all())
        by_positions = bool((~known | (owner == row % n)).all())
        several = bool(known.any()) and bool(owner.max() > owner[known].min())
        certain = several and (n_rows == n or by_samples != by_positions)
        if by_samples:
            return Arrangement(n, axis, "samples", lasting=certain)
        if by_positions:
            return Arrangement(n, axis, "positions", lasting=certain)
    if bool((owner == _UNKNOWN).any()):
        return None
    counts = torch.bincount(owner[known], minlength=n)
    index = torch.full((n, max(1, int(counts.max()))), n_rows, device=owner.device)
    order = owner.argsort(stable=True)[n_rows - int(known.sum()) :]
    sample = owner[order]
    place = torch.arange(len(order), device=owner.device) - (counts.cumsum(0) - counts)[sample]
    index[sample, place] = order
    return Arrangement(n, axis, "index", index, lasting=False)
