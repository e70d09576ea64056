"""Coverage of the inputs, weighted by uncertainty: UHerding, and how much of a batch it takes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# So many labels for each class, and what they do not cover matters no more.
_ENOUGH_LABELS = 20
# Numbers of a matrix of similarities that are there at a time.
_AT_ONCE = 1 << 24
# Gains that are brought up to date together.
_TOGETHER = 32


def margin_uncertainty(probabilities: Tensor) -> Tensor:
    """Give one minus the difference of the two largest probabilities of each sample.

    Parameters
    ----------
    probabilities : Tensor of shape (n, C)
        Of the classes.

    Returns
    -------
    Tensor of shape (n,)
        From 0 (certain) to 1.
    """
    top = probabilities.topk(2, dim=1).values
    return 1 - (top[:, 0] - top[:, 1])


def predicted_balance(probabilities: Tensor) -> float:
    """Say how balanced the predicted classes are.

    Parameters
    ----------
    probabilities : Tensor of shape (n, C)
        Of the classes.

    Returns
    -------
    float
        The effective number of classes, 1 / sum_c (mean p_c)^2, as a share of C: 1 where all are
        predicted as often.
    """
    mean = probabilities.mean(0)
    return 1 / (float(mean.square().sum()) * len(mean))


def early_share(n_labeled: int, n_classes: int) -> float:
    """Give the share of a batch that coverage takes, at most, while there are few labels.

    Parameters
    ----------
    n_labeled : int
        Labelled samples so far.
    n_classes : int
        Number of classes.

    Returns
    -------
    float
        1 without labels, falling to 0 at 20 labels for each class.
    """
    return max(0.0, 1 - n_labeled / (_ENOUGH_LABELS * n_classes))


def automatic_share(probabilities: Tensor, n_labeled: int) -> float:
    """Give the share of a batch that coverage takes: much with few labels, in a balanced pool.

    Parameters
    ----------
    probabilities : Tensor of shape (n, C)
        Of the classes, for the pool.
    n_labeled : int
        Labelled samples so far.

    Returns
    -------
    float
        :func:`early_share`, times 2 b - 1 where that is positive, b the predicted balance.
    """
    return early_share(n_labeled, probabilities.shape[1]) * max(
        0.0, 2 * predicted_balance(probabilities) - 1
    )


@torch.no_grad()
def covering(
    pool: Tensor,
    labeled: Tensor,
    weights: Tensor,
    n_picks: int,
    *,
    radius: float = 1.0,
    on_pick: Callable[[], object] = lambda: None,
) -> list[int]:
    """Pick greedily what raises the weighted coverage sum_j w_j max_i k(x_i, x_j) the most.

    The x_j are the pool, the x_i the labelled samples and the picks, and k(a, b) =
    exp(-|a - b|^2 / radius^2). With the uncertainty of the predictions for weights this is UHerding
    [1]_, with equal ones MaxHerding. A gain never rises, so the largest known one that is up to
    date is the largest of all.

    Parameters
    ----------
    pool, labeled : Tensor of shape (n, d), (n_labeled, d)
        Samples of unit length.
    weights : Tensor of shape (n,)
        Of the pool's samples, not negative.
    n_picks : int
        At most n.
    radius : float, default=1.0
        Of the kernel.
    on_pick : callable, optional
        Called after each pick.

    Returns
    -------
    list of int
        Rows of `pool` in the order chosen; of equal ones the first.

    References
    ----------
    .. [1] W. Bae, G. L. Oliveira, D. J. Sutherland, "Uncertainty Herding: One Active Learning
       Method for All Label Budgets", ICLR 2025, arXiv 2412.20644.
    """
    rows = max(1, _AT_ONCE // len(pool))
    covered = pool.new_zeros(len(pool))
    for start in range(0, len(labeled), rows):
        some = labeled[start : start + rows]
        covered = torch.maximum(covered, _kernel(pool, some, radius).amax(1))

    def gains(of: Tensor) -> Tensor:
        return (_kernel(of, pool, radius) - covered).relu_() @ weights

    known = torch.cat([gains(some) for some in pool.split(rows)])
    is_old = torch.zeros_like(known, dtype=torch.bool)
    picks: list[int] = []
    for _ in range(n_picks):
        while is_old[best := int(known.argmax())]:
            largest = known.topk(min(_TOGETHER, len(pool))).indices
            outdated = largest[is_old[largest]]
            known[outdated] = gains(pool[outdated])
            is_old[outdated] = False
        picks.append(best)
        covered = torch.maximum(covered, _kernel(pool, pool[best : best + 1], radius)[:, 0])
        known[best] = -torch.inf
        is_old = ~torch.isinf(known)
        on_pick()
    return picks


def _kernel(a: Tensor, b: Tensor, radius: float) -> Tensor:
    # |a - b|^2 = 2 - 2 a b at unit length.
    return (a @ b.T).sub_(1).mul_(2 / radius**2).clamp_(max=0).exp_()
