"""Likelihoods: how a label depends on the network's outputs. Nothing else knows what a class is.

With the Jacobian J of the outputs, a sample's Fisher information is J^T H J, where H is that of the
label's distribution with respect to the outputs. A likelihood gives a factor R with R^T R = H.
"""

from __future__ import annotations

from numbers import Integral, Real
from typing import Literal, Protocol

import torch
from torch import Tensor

Weighting = Literal["probability", "none"]


class Likelihood(Protocol):
    """The distribution of a sample's label, given the network's outputs for it."""

    def check(self, outputs: Tensor) -> None:
        """Raise ValueError unless outputs of this shape, samples first, are of this likelihood."""

    def rank(self, outputs: Tensor) -> int:
        """Return the number of rows of the exact factor."""

    def factor(self, outputs: Tensor, n_directions: int | None = None) -> Tensor:
        """Return rows R, (n, r, ...) for outputs (n, ...), with R^T R the information in them.

        With `n_directions`, at most that many rows.
        """

    def mean(self, outputs: Tensor) -> Tensor:
        """Return the mean of the label's distribution, in float64."""

    def uncertainty(self, outputs: Tensor) -> Tensor:
        """Return how uncertain the label of each sample is, (n,), in float64."""

    def class_probabilities(self, outputs: Tensor) -> Tensor:
        """Return the probabilities of the classes, (n, C), in float64."""


class Categorical:
    r"""One of C classes; the outputs are logits (n, C).

    The information in the logits is :math:`\mathrm{diag}(p) - p p^\top`, with p their softmax.
    """

    def check(self, outputs: Tensor) -> None:
        """Raise ValueError unless the outputs are (n, C), with two classes at least."""
        if outputs.dim() != 2 or outputs.shape[1] < 2:
            raise ValueError(
                f"Expected logits of shape ({len(outputs)}, C) with one row a sample and at least "
                f"two classes, found {tuple(outputs.shape)}."
            )

    def rank(self, outputs: Tensor) -> int:
        """Return the number of rows of the exact factor: C - 1."""
        return outputs.shape[1] - 1

    def factor(self, outputs: Tensor, n_directions: int | None = None) -> Tensor:
        """Return rows R(x), (n, r, C): see :func:`categorical_factor`."""
        return categorical_factor(self.mean(outputs), n_directions)

    def mean(self, outputs: Tensor) -> Tensor:
        """Return the class probabilities (n, C)."""
        return outputs.detach().double().softmax(dim=1)

    def uncertainty(self, outputs: Tensor) -> Tensor:
        """Return one minus the margin of the probabilities."""
        return margin_uncertainty(self.mean(outputs))

    def class_probabilities(self, outputs: Tensor) -> Tensor:
        """Return the class probabilities (n, C)."""
        return self.mean(outputs)


class UnweightedCategorical(Categorical):
    """Scores without the probabilities that make them Fisher information, as in the authors' code.

    Rows are e_c - p, the most probable class first.
    """

    def rank(self, outputs: Tensor) -> int:
        """Return the number of classes."""
        return outputs.shape[1]

    def factor(self, outputs: Tensor, n_directions: int | None = None) -> Tensor:
        """Return rows (n, r, C), which are no factor of the Fisher information."""
        p = self.mean(outputs)
        order = p.argsort(dim=1, descending=True, stable=True)[:, :n_directions]
        rows = torch.zeros(*order.shape, p.shape[1], dtype=p.dtype, device=p.device)
        return rows.scatter_(2, order[:, :, None], 1) - p[:, None, :]


def categorical_factor(probabilities: Tensor, n_directions: int | None = None) -> Tensor:
    r"""Compute rows R(x) with :math:`R^\top R = \mathrm{diag}(p) - p p^\top`.

    With the classes sorted by falling probability and the tail sums
    :math:`s_i = \sum_{j>i} p_j`, row i is
    :math:`\sqrt{p_i s_i / s_{i-1}}\,(e_i - \sum_{j>i} (p_j / s_i) e_j)`: the rows of the
    transposed Cholesky factor. They need no eigendecomposition, C - 1 of them are exact,
    and the leading ones carry most of the trace. The squared norm of row i is
    :math:`p_i s_i / s_{i-1} (1 + \sum_{j>i} p_j^2 / s_i^2)`.

    Parameters
    ----------
    probabilities : Tensor of shape (n, C)
        Class probabilities; rows sum to one. The computation is in their own dtype: float64 is
        what the callers of this package pass.
    n_directions : int, optional
        Keep only this number of leading rows; None, or a number larger than there are, keeps all.

    Returns
    -------
    Tensor of shape (n, r, C)
        r is C - 1, or `n_directions` where that is smaller.

    References
    ----------
    The matrix diag(p) - p p^T is the Fisher information of a categorical distribution with
    respect to its logits (FisherMask, arXiv 2411.05752, Section III).

    Examples
    --------
    >>> import torch
    >>> from skfishermask.fisher.likelihood import categorical_factor
    >>> p = torch.tensor([[0.7, 0.2, 0.1]], dtype=torch.float64)
    >>> R = categorical_factor(p)[0]
    >>> torch.allclose(R.T @ R, torch.diag(p[0]) - p.T @ p)
    True
    """
    n, n_classes = probabilities.shape
    p, order = probabilities.sort(dim=1, descending=True, stable=True)
    # Summed from the small end, so that a tail of 1e-12 beside p_1 = 1 keeps its digits.
    inclusive = p.flip(1).cumsum(1).flip(1)
    s = torch.cat([inclusive[:, 1:], torch.zeros_like(p[:, :1])], dim=1)
    r = n_classes - 1 if n_directions is None else min(n_classes - 1, n_directions)
    eye = torch.eye(r, n_classes, dtype=p.dtype, device=p.device)
    before = torch.cat([p[:, :1] + s[:, :1], s[:, :-1]], dim=1)[:, :r]
    tail = s[:, :r]
    # A tail that underflowed to zero has no row left to give: 0/0 is 0 here.
    scale = (p[:, :r] * tail / torch.where(before > 0, before, 1)).sqrt()
    shares = p[:, None, :] / torch.where(tail > 0, tail, 1)[:, :, None]
    rows = scale[:, :, None] * (eye - shares.triu(1))
    index = order[:, None, :].expand(n, r, n_classes)
    return torch.zeros_like(rows).scatter_(2, index, rows)


def margin_uncertainty(probabilities: Tensor) -> Tensor:
    """Compute one minus the difference of the two largest probabilities of each sample.

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
    """Find how many rows keep a share, between 0 and 1, of the trace.

    Parameters
    ----------
    norms : Tensor of shape (rank,)
        As in :func:`kept_trace`.
    share : float
        Of the trace, summed over the samples.

    Returns
    -------
    int
        The smallest such number.
    """
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
