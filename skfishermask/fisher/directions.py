"""Rows of a factor: how many are needed, and random combinations of them."""

from __future__ import annotations

from numbers import Integral, Real

import torch
from torch import Tensor

# Of SplitMix64, as signed 64-bit integers: the increment, and shifts and factors of the finaliser.
_INCREMENT = 0x9E3779B97F4A7C15 - (1 << 64)
_MIXING = ((30, 0xBF58476D1CE4E5B9 - (1 << 64)), (27, 0x94D049BB133111EB - (1 << 64)), (31, 1))
# Any number: signs depend on it.
_SEED = 0


def random_signs(
    first_row: int, direction: int, device: torch.device, shape: tuple[int, ...]
) -> Tensor:
    """Return a random sign for each entry of a tensor (n, ...), in float64.

    A sign follows from its coordinates alone, the numbers of the combination and of the sample
    among them (a hash of them, by the finaliser of SplitMix64): not from batches, padding or the
    device, and no random state is touched.
    """
    key = torch.full((1,) * len(shape), _SEED + direction, dtype=torch.int64, device=device)
    for axis, size in enumerate(shape):
        coordinate = torch.arange(size, device=device) + (first_row if axis == 0 else 0)
        key = key + coordinate.view(-1, *[1] * (len(shape) - axis - 1)) * _INCREMENT
        for shift, factor in _MIXING:
            # A logical shift: the sign bit is not copied.
            key = (key ^ ((key >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return torch.where(key < 0, -1.0, 1.0).double()


def squared_norms(factor: Tensor) -> Tensor:
    """Sum the squared norms of each row of R(x), (n, r, ...), over the samples: (r,)."""
    return factor.flatten(2).square().sum(dim=(0, 2))


def kept_trace(norms: Tensor) -> Tensor:
    """Compute the share of the trace of R^T R that the first r rows keep, for each r.

    Parameters
    ----------
    norms : Tensor of shape (rank,)
        Squared norms of the rows, summed over samples: :func:`squared_norms`.

    Returns
    -------
    Tensor of shape (rank,)
        Ends in one.
    """
    total = norms.sum()
    if total == 0:  # Every label is certain: one direction loses nothing.
        return torch.ones_like(norms)
    return norms.cumsum(0) / total


def directions_that_keep(norms: Tensor, share: float) -> int:
    """Return how many rows, with norms as in `kept_trace`, keep a share (0 to 1) of the trace."""
    return 1 + int((kept_trace(norms) < share).sum())


def check_n_directions(n_directions: int | float | None, *, shares: bool = True) -> None:
    """Raise ValueError unless `n_directions` is None, an int >= 1 or, as a share, in (0, 1)."""
    if n_directions is None:
        return
    if isinstance(n_directions, Integral) and not isinstance(n_directions, bool):
        if n_directions >= 1:
            return
    elif shares and isinstance(n_directions, Real) and 0 < n_directions < 1:
        return
    share = ", or a float between 0 and 1 (share of the trace to keep)" if shares else ""
    raise ValueError(
        f"n_directions must be None or an int of at least 1{share}, got {n_directions!r}."
    )
