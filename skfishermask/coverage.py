"""Coverage of the inputs, weighted by uncertainty: UHerding, and how much of a batch it takes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# So many labels for each class, and what they do not cover matters no more.
_ENOUGH_LABELS = 20
# Entries of a matrix of similarities that are held at a time.
_KERNEL_ENTRIES = 1 << 24
# Gains that are brought up to date together.
_GROUP = 32
# Gains that differ by less than this share of the total weight are taken for equal.
_TIE = 1e-12


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
    """Pick greedily the samples that raise the weighted coverage sum_j w_j max_i k(x_i, x_j) most.

    The x_j are the pool, the x_i the labelled samples and the picks, and k(a, b) =
    exp(-|a - b|^2 / radius^2). With the uncertainty of the predictions for weights this is UHerding
    [1]_, with equal ones MaxHerding. All is computed in float64. A gain never rises with a pick, so
    an earlier one bounds it from above: a pick computes afresh only those gains that may be the
    largest.

    Parameters
    ----------
    pool, labeled : Tensor of shape (n, d), (n_labeled, d)
        Samples.
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
        Rows of `pool` in the order chosen; of equal gains, up to rounding, the first.

    References
    ----------
    .. [1] W. Bae, G. L. Oliveira, D. J. Sutherland, "Uncertainty Herding: One Active Learning
       Method for All Label Budgets", ICLR 2025, arXiv 2412.20644.
    """
    pool, labeled, weights = pool.double(), labeled.double(), weights.double()
    left, right = _two_sides(pool, radius)
    rows = max(1, _KERNEL_ENTRIES // len(pool))
    covered = pool.new_zeros(len(pool))
    for some in _two_sides(labeled, radius)[0].split(rows):
        if len(some):
            covered = torch.maximum(covered, _kernel(some, right).amax(0))

    def gains(of: Tensor) -> Tensor:
        return _kernel(of, right).sub_(covered).relu_() @ weights

    tie = _TIE * float(weights.sum())
    bounds = torch.cat([gains(some) for some in left.split(rows)])
    picks: list[int] = []
    for _ in range(n_picks):
        largest = -torch.inf
        # Before the first pick all gains are up to date.
        for some in bounds.argsort(descending=True).split(_GROUP) if picks else ():
            if bounds[some[0]] <= tie or bounds[some[0]] < largest - tie:
                break
            bounds[some] = torch.where(torch.isinf(bounds[some]), -torch.inf, gains(left[some]))
            largest = max(largest, float(bounds[some].amax()))
        best = int(torch.nonzero(bounds >= bounds.amax() - tie)[0])
        picks.append(best)
        covered = torch.maximum(covered, _kernel(left[best : best + 1], right)[0])
        bounds[best] = -torch.inf
        on_pick()
    return picks


def _two_sides(x: Tensor, radius: float) -> tuple[Tensor, Tensor]:
    """Return matrices such that `left @ right.T` is -|a - b|^2 / radius^2 for all pairs of rows."""
    squares = x.square().sum(1, keepdim=True) / radius**2
    ones = torch.ones_like(squares)
    right = torch.cat([x, squares, ones], 1)
    return torch.cat([x * (2 / radius**2), -ones, -squares], 1), right


def _kernel(left: Tensor, right: Tensor) -> Tensor:
    # Rounding alone makes a distance of equal samples differ from 0.
    return (left @ right.T).clamp_(max=0).exp_()
