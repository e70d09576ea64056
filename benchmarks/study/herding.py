"""Herding: greedy coverage of a pool by the nearest labelled sample or pick."""

from __future__ import annotations

import torch
from torch import Tensor

from skfishermask.coverage import kernel


@torch.no_grad()
def herd(
    pool: Tensor, labeled: Tensor, weights: Tensor, n_instances: int, radius: float = 1.0
) -> list[int]:
    """Pick greedily what raises sum_j w_j max_i k(x_i, x_j) the most; of equal ones the first.

    The x_j are the pool, the x_i the labelled samples and the picks. With the uncertainty of the
    predictions as weights this is UHerding (Bae et al. 2025), with equal ones MaxHerding.

    Parameters
    ----------
    pool, labeled : Tensor of shape (n, d), (n_labeled, d)
        Samples of unit length.
    weights : Tensor of shape (n,)
        Of the pool's samples, not negative.
    n_instances : int
        At most n.
    radius : float, default=1.0
        Length scale of the kernel.
    """
    similar = kernel(pool, pool, radius)
    covered = pool.new_zeros(len(pool))
    if len(labeled):
        covered = kernel(pool, labeled, radius).amax(1)
    picks: list[int] = []
    for _ in range(n_instances):
        gains = (similar - covered).relu_() @ weights
        gains[picks] = -torch.inf
        picks.append(int(gains.argmax()))
        covered = torch.maximum(covered, similar[picks[-1]])
    return picks
