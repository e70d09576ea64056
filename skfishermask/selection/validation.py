"""Checks of the arguments of `select_batch`, before any work."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor

from skfishermask.selection.linalg import symmetric
from skfishermask.selection.storage import StoredEmbedding

# A Fisher matrix may be a float32 product, and off symmetry by this, relatively.
_SYMMETRY_TOLERANCE = 1e-4


def check_embedding(embedding: Tensor | StoredEmbedding) -> None:
    """Raise unless this is a tensor of embeddings, or stored ones."""
    if isinstance(embedding, StoredEmbedding):
        return
    _check_floating("embedding", embedding)
    if embedding.ndim != 3 or 0 in embedding.shape:
        raise ValueError(
            "embedding must have shape (n, r, k) with n, r and k at least 1, "
            f"got {tuple(embedding.shape)}."
        )


def _check_floating(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}.")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must have a floating point dtype, got {tensor.dtype}.")


def check_count(name: str, value: int, low: int, high: int | None) -> int:
    """Return a number as an int; raise ValueError unless it lies between two limits."""
    expected = f"an int from {low} to {high}" if high is not None else f"an int from {low} up"
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(f"{name} must be {expected}, got {value!r}.")
    if value < low or (high is not None and value > high):
        raise ValueError(f"{name} must be {expected}, got {value!r}.")
    return int(value)


def check_preselected(preselected: Sequence[int] | None, n_instances: int, n: int) -> list[int]:
    """Return the positions as ints; raise ValueError unless distinct, in range, at most K."""
    positions = [] if preselected is None else list(preselected)
    if len(positions) > n_instances:
        raise ValueError(
            f"preselected must hold at most n_instances={n_instances} positions, "
            f"got {len(positions)}."
        )
    positions = [check_count("each position in preselected", p, 0, n - 1) for p in positions]
    if len(set(positions)) < len(positions):
        raise ValueError(f"preselected must hold distinct positions, got {positions}.")
    return positions


def check_fisher(name: str, fisher: Tensor, k: int, device: torch.device) -> Tensor:
    """Check a Fisher matrix; return it in float64, exactly symmetric, on the device."""
    _check_floating(name, fisher)
    if fisher.shape != (k, k):
        raise ValueError(
            f"{name} must have shape ({k}, {k}), k by k for an embedding of shape (n, r, k), "
            f"got {tuple(fisher.shape)}."
        )
    fisher = fisher.to(device, torch.float64)
    sizes = torch.stack([fisher.abs().max(), (fisher - fisher.T).abs().max()])
    largest, asymmetry = sizes.tolist()
    if not math.isfinite(largest):
        raise ValueError(f"{name} must be finite, it holds NaN or infinity.")
    if asymmetry > _SYMMETRY_TOLERANCE * largest:
        raise ValueError(
            f"{name} must be symmetric, but differs from its transpose by up to "
            f"{asymmetry:.3g} with entries up to {largest:.3g}."
        )
    return symmetric(fisher)
