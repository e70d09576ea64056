"""Picks, what they change for the other candidates, and how many are applied together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise

import torch
from torch import Tensor

# First picks that are applied in float64, as is the start. As a rule gains fall by orders of
# magnitude in these, and errors of float32 would be large beside the gains that follow.
N_FLOAT64_PICKS = 6
# Picks that are applied together, at most.
_PICKS_PER_UPDATE = 32


@dataclass(frozen=True)
class Pick:
    """A chosen sample and the update of M^-1 by it; the list of picks is the whole history."""

    position: Tensor  # (), in the pool
    gain: Tensor  # (), float64: decrease of tr(M^-1 F)
    is_verified: Tensor  # (), whether it is known to have the largest gain on its shortlist
    # (k, 2 r), U and T side by side; float64, or float32 where candidates are updated in that
    factors: Tensor

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Pick:
        """Return the pick on another device, its factors in another precision."""
        moved = {f.name: getattr(self, f.name).to(device) for f in fields(self)}
        return replace(self, **moved | {"factors": self.factors.to(device, dtype)})


@dataclass(frozen=True)
class ExactGains:
    """Gains of a few candidates computed from their embeddings in float64."""

    products: Tensor  # (n, r, 2 k), V M^-1 and V M^-1 F side by side, from which a pick is made
    a: Tensor  # (n, r, r)
    b: Tensor  # (n, r, r)
    update_error: Tensor  # (n, 2), bounds of the errors of A and B in the Frobenius norm
    gains: Tensor  # (n,)
    gain_error: Tensor  # (n,), bounds of their errors

    @staticmethod
    def concatenate(several: Sequence[ExactGains]) -> ExactGains:
        """Return the candidates of several together."""
        if len(several) == 1:
            return several[0]
        return ExactGains(
            *(torch.cat([getattr(x, f.name) for x in several]) for f in fields(ExactGains))
        )


def split_picks(picks: Sequence[Pick], n_before: int) -> Iterator[tuple[int, Sequence[Pick]]]:
    """Divide picks, of which `n_before` come before, into runs that are applied together.

    Yields each run with the number of its first pick.
    """
    stop = n_before + len(picks)
    inner = (N_FLOAT64_PICKS, *range(0, stop, _PICKS_PER_UPDATE))
    edges = sorted({n_before, stop, *(edge for edge in inner if n_before < edge < stop)})
    for first, last in pairwise(edges):
        yield first, picks[first - n_before : last - n_before]


def concatenate_factors(picks: Sequence[Pick], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the factors of picks side by side, and the Frobenius norms of U and T of each.

    The factors, (k, picks 2 r) in `dtype`, are U and T of the first pick, then those of the second,
    and on; the norms, (picks, 2), are in float64.
    """
    k, width = picks[0].factors.shape
    rows = torch.cat([pick.factors.T for pick in picks])
    norms = torch.linalg.vector_norm(rows.view(-1, 2, width // 2, k), dim=(2, 3))
    # Column after column: MKL multiplies by a few of them up to seven times faster than by rows.
    return rows.to(dtype).T, norms.double()
