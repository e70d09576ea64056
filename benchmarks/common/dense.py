"""The selection as it is written down, in float64: the judge of tests and benchmarks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def objective(information: Tensor, fisher: Tensor) -> float:
    """Compute tr(M^-1 F), which the batch is chosen to make small."""
    return float(torch.trace(torch.linalg.inv(information) @ fisher.double()))


def batch_information(
    embedding: Tensor,
    positions: Sequence[int] | Tensor,
    n_instances: int,
    *,
    fisher_labeled: Tensor | None = None,
    n_labeled: int = 0,
    regularization: float = 1.0,
) -> Tensor:
    """Compute M = lambda I + n_L/(n_L+K) F_L + K/(n_L+K) sum of V^T V over `positions`."""
    total = n_labeled + n_instances
    information = regularization * torch.eye(embedding.shape[2], dtype=torch.float64)
    if fisher_labeled is not None:
        information = information + n_labeled / total * fisher_labeled.double()
    for position in positions:
        rows = embedding[int(position)].double()
        information = information + n_instances / total * rows.T @ rows
    return information


def select_batch_oracle(
    embedding: Tensor,
    n_instances: int,
    fisher: Tensor,
    *,
    fisher_labeled: Tensor | None = None,
    n_labeled: int = 0,
    regularization: float = 1.0,
    oversample: float = 1.0,
    preselected: Sequence[int] = (),
) -> tuple[list[int], list[float]]:
    """Choose a batch with M inverted anew at every step; ties keep the lower position."""
    fisher = fisher.double()
    rows = math.sqrt(n_instances / (n_labeled + n_instances)) * embedding.double()
    information = batch_information(
        embedding,
        [],
        n_instances,
        fisher_labeled=fisher_labeled,
        n_labeled=n_labeled,
        regularization=regularization,
    )
    identity = torch.eye(rows.shape[1], dtype=torch.float64)

    chosen: list[int] = []
    gains: list[float] = []
    for step in range(min(len(rows), math.ceil(oversample * n_instances - 1e-9))):
        inverse = torch.linalg.inv(information)
        a = rows @ inverse @ rows.mT
        b = rows @ (inverse @ fisher @ inverse) @ rows.mT
        gain = torch.einsum("nij,nji->n", b, torch.linalg.inv(identity + a))
        gain[chosen] = -math.inf
        best = preselected[step] if step < len(preselected) else first_near(gain, gain.max())
        chosen.append(best)
        gains.append(float(gain[best]))
        information = information + rows[best].T @ rows[best]

    kept = dict(zip(chosen, gains, strict=True))
    while len(kept) > n_instances:
        before = objective(information, fisher)
        # From the highest position down, so that equal costs drop the higher position.
        candidates = sorted(set(kept) - set(preselected), reverse=True)
        without = information - rows[candidates].mT @ rows[candidates]
        cost = torch.einsum("nij,ji->n", torch.linalg.inv(without), fisher) - before
        dropped = candidates[first_near(-cost, (-cost).max(), scale=abs(before))]
        information = information - rows[dropped].T @ rows[dropped]
        del kept[dropped]
    return list(kept), list(kept.values())


def first_near(values: Tensor, best: Tensor, scale: float = 0.0) -> int:
    """Return the position of the first entry that equals `best` up to rounding."""
    slack = 1e-12 * max(abs(float(best)), scale)
    return int(torch.nonzero(values >= best - slack)[0])
