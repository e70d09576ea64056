"""Picks and what they change for the other candidates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise

import torch
from torch import Tensor

# So many steps run in float64, and so does the start. As a rule gains fall by orders of magnitude
# in the first steps, whose float32 errors would be large beside the gains that follow.
N_FLOAT64_PICKS = 6
# Steps that many candidates catch up with at a time.
_TOGETHER = 32


@dataclass(frozen=True)
class Pick:
    """A pick, and what it changes for the others; the list of them is the whole history.

    Attributes
    ----------
    position : Tensor of shape (), int64
        Position in the pool.
    gain : Tensor of shape (), float64
        Decrease of tr(M^-1 F).
    sure : Tensor of shape (), bool
        Whether it is known to be the best on its shortlist.
    factors : Tensor of shape (k, 2 r)
        U and T side by side; float64, or float32 for what computes in that.
    """

    position: Tensor
    gain: Tensor
    sure: Tensor
    factors: Tensor

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Pick:
        """Give the step on another device, its factors in another precision."""
        moved = {f.name: getattr(self, f.name).to(device) for f in fields(self)}
        return replace(self, **moved | {"factors": self.factors.to(device, dtype)})


@dataclass(frozen=True)
class ExactGains:
    """A few candidates computed afresh in float64, and what taking one of them needs too.

    Attributes
    ----------
    both : Tensor of shape (n, r, 2 k)
        V M^-1 and V M^-1 F side by side.
    a, b : Tensor of shape (n, r, r)
        A and B.
    off : Tensor of shape (n, 2)
        How far A and B may be off, in the Frobenius norm.
    gains, bars : Tensor of shape (n,)
        Gains, and how far they may be off.
    """

    both: Tensor
    a: Tensor
    b: Tensor
    off: Tensor
    gains: Tensor
    bars: Tensor

    @staticmethod
    def joined(several: Sequence[ExactGains]) -> ExactGains:
        """Put several together."""
        if len(several) == 1:
            return several[0]
        return ExactGains(
            *(torch.cat([getattr(x, f.name) for x in several]) for f in fields(ExactGains))
        )


def steps_together(steps: Sequence[Pick], n_before: int) -> Iterator[tuple[int, Sequence[Pick]]]:
    """Divide steps into runs that are applied at a time, each with the number of its first step.

    Parameters
    ----------
    steps : sequence of Pick
        In their order.
    n_before : int
        Steps before these.
    """
    stop = n_before + len(steps)
    inner = (N_FLOAT64_PICKS, *range(0, stop, _TOGETHER))
    edges = sorted({n_before, stop, *(edge for edge in inner if n_before < edge < stop)})
    for first, last in pairwise(edges):
        yield first, steps[first - n_before : last - n_before]


def side_by_side(steps: Sequence[Pick], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Join steps' factors, (k, steps 2 r), in a precision; give the norms of both halves, too."""
    factors = steps[0].factors
    k, width = factors.shape
    if len(steps) > 1:
        factors = torch.cat([step.factors for step in steps], 1)
    norms = torch.linalg.vector_norm(factors.view(k, -1, 2, width // 2), dim=(0, 3))
    return factors.to(dtype), norms.double()
