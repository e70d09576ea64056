"""Directions in logit space: rows R(x) that factorise the Fisher information of a softmax."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Literal

import torch
from torch import Tensor

Weighting = Literal["probability", "none"]


def _tails(probabilities: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sort classes by falling probability; give p, the tail sums s_i and the order."""
    p, order = probabilities.sort(dim=1, descending=True, stable=True)
    # Summed from the small end, so that a tail of 1e-12 beside p_1 = 1 keeps its digits.
    inclusive = p.flip(1).cumsum(1).flip(1)
    s = torch.cat([inclusive[:, 1:], torch.zeros_like(p[:, :1])], dim=1)
    return p, s, order


def most_directions(n_classes: int, weighting: Weighting = "probability") -> int:
    """Give the number of rows of the exact factor: C - 1 weighted, C unweighted."""
    return n_classes if weighting == "none" else n_classes - 1


def directions(
    probabilities: Tensor,
    n_directions: int | None = None,
    *,
    weighting: Weighting = "probability",
) -> Tensor:
    r"""Give rows R(x) with :math:`R^\top R = \mathrm{diag}(p) - p p^\top`.

    With the classes sorted by falling probability and the tail sums
    :math:`s_i = \sum_{j>i} p_j`, row i is
    :math:`\sqrt{p_i s_i / s_{i-1}}\,(e_i - \sum_{j>i} (p_j / s_i) e_j)`: the rows of the
    transposed Cholesky factor. They need no eigendecomposition, C - 1 of them are exact,
    and the leading ones carry most of the trace.

    Parameters
    ----------
    probabilities : Tensor of shape (n, C)
        Class probabilities; rows sum to one. Computed with in their own dtype: float64 is
        what the callers of this package pass.
    n_directions : int, optional
        Keep only so many leading rows; None, or a number larger than there are, keeps all.
    weighting : {"probability", "none"}
        ``"none"`` gives the unweighted score directions :math:`e_c - p`, as in the
        FisherMask authors' code, the most probable class first. They are no factor of the
        Fisher information.

    Returns
    -------
    Tensor of shape (n, r, C)
        r is C - 1 (C if unweighted), or `n_directions` where that is smaller.

    References
    ----------
    The matrix diag(p) - p p^T is the Fisher information of a categorical distribution with
    respect to its logits (FisherMask, arXiv 2411.05752, Section III).

    Examples
    --------
    >>> import torch
    >>> from skfishermask.fisher.likelihood import directions
    >>> p = torch.tensor([[0.7, 0.2, 0.1]], dtype=torch.float64)
    >>> R = directions(p)[0]
    >>> torch.allclose(R.T @ R, torch.diag(p[0]) - p.T @ p)
    True
    """
    n, n_classes = probabilities.shape
    p, s, order = _tails(probabilities)
    r = most_directions(n_classes, weighting)
    r = r if n_directions is None else min(r, n_directions)
    eye = torch.eye(r, n_classes, dtype=p.dtype, device=p.device)
    if weighting == "none":
        rows = eye - p[:, None, :]
    else:
        before = torch.cat([p[:, :1] + s[:, :1], s[:, :-1]], dim=1)[:, :r]
        tail = s[:, :r]
        # A tail that underflowed to zero has no row left to give: 0/0 is 0 here.
        scale = (p[:, :r] * tail / torch.where(before > 0, before, 1)).sqrt()
        shares = p[:, None, :] / torch.where(tail > 0, tail, 1)[:, :, None]
        rows = scale[:, :, None] * (eye - shares.triu(1))
    index = order[:, None, :].expand(n, r, n_classes)
    return torch.zeros_like(rows).scatter_(2, index, rows)


def kept_trace(probabilities: Tensor) -> Tensor:
    r"""Give the share of the trace that the first r directions keep, for each r.

    The squared norm of row i is :math:`p_i s_i / s_{i-1} (1 + \sum_{j>i} p_j^2 / s_i^2)`; all
    of them sum to the trace :math:`1 - \sum_c p_c^2`.

    Parameters
    ----------
    probabilities : Tensor of shape (n, C)
        Class probabilities of a sample of the data, float64.

    Returns
    -------
    Tensor of shape (C - 1,)
        Entry r - 1: the trace kept by r directions, summed over the samples, over the whole
        trace. Ends in one.
    """
    squares = directions(probabilities).square().sum(dim=(0, 2))
    total = squares.sum()
    if total == 0:  # Every sample is classified with certainty: one direction loses nothing.
        return torch.ones_like(squares)
    return squares.cumsum(0) / total


def directions_that_keep(probabilities: Tensor, share: float) -> int:
    """Find how many directions keep a share of the trace of diag(p) - p p^T.

    Parameters
    ----------
    probabilities : Tensor of shape (n, C)
        Class probabilities of a sample of the data, float64.
    share : float
        The share of the trace, summed over the samples; between 0 and 1.

    Returns
    -------
    int
        The smallest such number.
    """
    return 1 + int((kept_trace(probabilities) < share).sum())


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
