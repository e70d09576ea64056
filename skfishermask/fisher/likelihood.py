"""Likelihoods: how a label depends on the network's outputs. Nothing else knows what a class is.

With the Jacobian J of the outputs, a sample's Fisher information is J^T H J, where H is that of the
label's distribution with respect to the outputs. A likelihood gives a factor R with R^T R = H.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from skfishermask.fisher.output_likelihood import (
    DiagonalLikelihood,
    Ignored,
    Likelihood,
    OutputLikelihood,
    weighted_mean,
)

Weighting = Literal["probability", "none"]


class Categorical(OutputLikelihood):
    r"""One of C classes, for each position where there are several; outputs are logits (n, C, ...).

    The information in the logits of a position is :math:`\mathrm{diag}(p) - p p^\top`, with p
    their softmax.

    Parameters
    ----------
    ignored : callable or None, default=None
        Maps a batch of inputs to a bool tensor (n, ...) that is True at positions without a label,
        such as padding.
    """

    has_uncertainty = True

    def check(self, outputs: Tensor) -> None:
        """Raise ValueError unless the outputs are (n, C, ...), with two classes at least."""
        if outputs.dim() < 2 or outputs.shape[1] < 2:
            raise ValueError(
                f"Expected logits of shape ({len(outputs)}, C), or ({len(outputs)}, C, ...) for a "
                f"label a position, with at least two classes, found {tuple(outputs.shape)}."
            )

    def rank(self, outputs: Tensor) -> int:
        """Return C - 1 for each position."""
        return (outputs.shape[1] - 1) * math.prod(outputs.shape[2:])

    def is_ordered(self, outputs: Tensor) -> bool:
        """Return whether there is one label a sample."""
        return outputs.dim() == 2

    def factor(self, outputs: Tensor) -> Tensor:
        """Return rows R(x), (n, rank, C, ...), by `categorical_factor`."""
        p = self.mean(outputs)
        if p.dim() == 2:
            return categorical_factor(p)
        n, n_classes = p.shape[:2]
        p = p.flatten(2).movedim(1, 2)  # (n, positions, C)
        blocks = categorical_factor(p.flatten(0, 1)).unflatten(0, p.shape[:2])
        # (n, C - 1, C, positions, positions), of which the first are rows.
        spread = torch.diag_embed(blocks.movedim(1, 3))
        rows: Tensor = spread.permute(0, 3, 1, 2, 4).reshape(n, -1, n_classes, *outputs.shape[2:])
        return rows

    def leading(self, outputs: Tensor, r: int | None) -> Tensor:
        """Compute the first r rows of the factor; where there are no positions, these alone."""
        if outputs.dim() == 2:
            return categorical_factor(self.mean(outputs), r)
        return super().leading(outputs, r)

    def combined(self, outputs: Tensor, signs: Callable[[tuple[int, ...]], Tensor]) -> Tensor:
        """Return a combination of the C rows sqrt(p_c) (e_c - p) of each position."""
        p = self.mean(outputs)
        weighted = p.sqrt() * signs(tuple(p.shape))
        return weighted - p * weighted.sum(1, keepdim=True)

    def mean(self, outputs: Tensor) -> Tensor:
        """Return the class probabilities (n, C, ...)."""
        return outputs.detach().double().softmax(dim=1)

    def uncertainty(self, outputs: Tensor, counted: Tensor | None = None) -> Tensor:
        """Return one minus the margin of the probabilities, in the mean over positions."""
        return weighted_mean(margin_uncertainty(self.mean(outputs)), counted, 1)


class UnweightedCategorical(Categorical):
    """Scores without the probabilities that make them Fisher information, as in the authors' code.

    Rows are e_c - p, the most probable class first.
    """

    def rank(self, outputs: Tensor) -> int:
        """Return the number of classes."""
        return outputs.shape[1]

    def factor(self, outputs: Tensor) -> Tensor:
        """Return rows (n, C, C), which are no factor of the Fisher information."""
        p = self.mean(outputs)
        order = p.argsort(dim=1, descending=True, stable=True)
        rows = torch.zeros(*order.shape, p.shape[1], dtype=p.dtype, device=p.device)
        return rows.scatter_(2, order[:, :, None], 1) - p[:, None, :]

    def leading(self, outputs: Tensor, r: int | None) -> Tensor:
        """Return the first r rows."""
        return self.factor(outputs)[:, :r]


class Bernoulli(DiagonalLikelihood):
    """Several labels a sample, each present or not; the outputs are logits (n, L) or (n, L, ...).

    The information in a logit is p (1 - p), with p its sigmoid. Labels are independent.

    Parameters
    ----------
    ignored : callable or None, default=None
        As for :class:`Categorical`.
    """

    has_uncertainty = True

    def is_ordered(self, outputs: Tensor) -> bool:
        """Return whether there are no positions: the rows of the least certain labels lead."""
        return outputs.dim() <= 2

    def factor(self, outputs: Tensor) -> Tensor:
        """Return rows (n, L, ...) with one entry each; without positions, large ones first."""
        rows = super().factor(outputs)
        if outputs.dim() != 2:
            return rows
        order = self.scale(outputs).argsort(dim=1, descending=True, stable=True)
        return rows.gather(1, order[:, :, None].expand_as(rows))

    def scale(self, outputs: Tensor) -> Tensor:
        """Return sqrt(p (1 - p))."""
        z = outputs.detach().double()
        return (z.sigmoid() * (-z).sigmoid()).sqrt()

    def mean(self, outputs: Tensor) -> Tensor:
        """Return the probability of each label."""
        return outputs.detach().double().sigmoid()

    def uncertainty(self, outputs: Tensor, counted: Tensor | None = None) -> Tensor:
        """Return the mean over labels of 1 - abs(2 p - 1)."""
        each = 1 - (2 * self.mean(outputs) - 1).abs()
        counted = None if counted is None else counted[:, None].expand(each.shape)
        return weighted_mean(each, counted, 1)


class Gaussian(DiagonalLikelihood):
    r"""Numbers, one or several a sample, with equal variance; the outputs are their means.

    The information in an output is :math:`1 / \sigma^2`.

    Parameters
    ----------
    variance : float, default=1.0
        :math:`\sigma^2`, of a label about its mean.
    ignored : callable or None, default=None
        As for :class:`Categorical`.
    """

    def __init__(self, variance: float = 1.0, ignored: Ignored | None = None) -> None:
        super().__init__(ignored)
        if not 0 < variance < math.inf:
            raise ValueError(f"variance must be a positive number, got {variance!r}.")
        self.variance = variance

    def scale(self, outputs: Tensor) -> Tensor:
        """Return one over sigma."""
        return torch.full_like(outputs.detach(), self.variance**-0.5, dtype=torch.float64)


class _Given(OutputLikelihood):
    """A user's likelihood, with what the package asks for beside."""

    def __init__(self, likelihood: Likelihood) -> None:
        super().__init__()
        self._likelihood = likelihood

    def check(self, outputs: Tensor) -> None:
        self._likelihood.check(outputs)

    def rank(self, outputs: Tensor) -> int:
        return int(self._likelihood.rank(outputs))

    def factor(self, outputs: Tensor) -> Tensor:
        factor = self._likelihood.factor(outputs.detach())
        expected = (len(outputs), self.rank(outputs), *outputs.shape[1:])
        if not isinstance(factor, Tensor) or factor.shape != expected:
            shape = tuple(getattr(factor, "shape", ())) or type(factor).__name__
            raise ValueError(
                f"The factor of {type(self._likelihood).__name__} must be a tensor of shape (n, "
                f"rank, ...), here {expected}, found {shape}."
            )
        return factor.double()


LIKELIHOODS: dict[str, type[OutputLikelihood]] = {
    "categorical": Categorical,
    "bernoulli": Bernoulli,
    "gaussian": Gaussian,
}


def as_likelihood(likelihood: str | Likelihood) -> OutputLikelihood:
    """Return the likelihood of a name, or a user's with all methods; TypeError if it is neither."""
    if isinstance(likelihood, OutputLikelihood):
        return likelihood
    if isinstance(likelihood, str) and likelihood in LIKELIHOODS:
        return LIKELIHOODS[likelihood]()
    methods = ("check", "rank", "factor")
    if isinstance(likelihood, type) or not all(
        callable(getattr(likelihood, name, None)) for name in methods
    ):
        raise TypeError(
            f"likelihood must be one of {(*LIKELIHOODS,)} or an object with the methods "
            f"check, rank and factor, got {likelihood!r}."
        )
    return _Given(likelihood)  # type: ignore[arg-type]


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
    """Compute one minus the difference of the two largest of the class probabilities (n, C, ...).

    The result, (n, ...), goes from 0 (certain) to 1.
    """
    top = probabilities.topk(2, dim=1).values
    return 1 - (top[:, 0] - top[:, 1])
