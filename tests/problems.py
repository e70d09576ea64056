"""Problems of selection with known sizes and shapes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def problem(
    n: int, r: int, k: int, *, decay: float = 1.0, scale: float = 1.0, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Embeddings of samples of various sizes, columns of falling ones, and their mean Fisher."""
    generator = torch.Generator().manual_seed(seed)
    size = 2 * torch.rand(n, 1, 1, generator=generator, dtype=torch.float64)
    columns = torch.arange(1, k + 1, dtype=torch.float64) ** -decay
    embedding = torch.randn(n, r, k, generator=generator, dtype=torch.float64)
    embedding = scale * size * columns * embedding
    return embedding, fisher(embedding)


def fisher(embedding: Tensor) -> Tensor:
    flat = embedding.double().flatten(0, 1)
    return flat.T @ flat / len(embedding)


def labeled(k: int) -> dict[str, Any]:
    return {"fisher_labeled": problem(15, 2, k, seed=99)[1], "n_labeled": 15}
