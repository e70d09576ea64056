"""What a likelihood is: what a user's must have, and what the package asks of one."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from copy import copy
from functools import partial
from typing import Protocol, Self

import torch
from torch import Tensor

from skfishermask.fisher.directions import random_signs
from skfishermask.jacobian import Inputs

# Inputs of a batch -> the positions of its samples that have no label.
Ignored = Callable[[Inputs], Tensor]


class Likelihood(Protocol):
    """The distribution of a sample's label given the network's outputs: three methods.

    Examples
    --------
    Counts with a Poisson distribution of mean exp(f), as with ``torch.nn.PoissonNLLLoss``. The
    Fisher information in an output f is exp(f), so the factor of n x 1 outputs is exp(f / 2):

    >>> import torch
    >>> from skfishermask import ParameterMask, fisher_diagonal, fisher_embedding
    >>> class Poisson:
    ...     def check(self, outputs):
    ...         if outputs.dim() != 2 or outputs.shape[1] != 1:
    ...             raise ValueError(f"Expected outputs (n, 1), found {tuple(outputs.shape)}.")
    ...     def rank(self, outputs):
    ...         return 1
    ...     def factor(self, outputs):
    ...         return torch.exp(outputs.double() / 2)[:, None]
    >>> module, x = torch.nn.Linear(4, 1), torch.randn(8, 4)
    >>> diagonal = fisher_diagonal(module, [x], likelihood=Poisson())
    >>> expected = (module(x).exp() * x**2).mean(0)
    >>> torch.allclose(diagonal["weight"][0].float(), expected)
    True
    """

    def check(self, outputs: Tensor) -> None:
        """Raise ValueError unless outputs of this shape, samples first, are of this likelihood."""

    def rank(self, outputs: Tensor) -> int:
        """Return the number of rows of the factor."""

    def factor(self, outputs: Tensor) -> Tensor:
        """Return rows R, (n, rank, ...) for outputs (n, ...), with R^T R the information in them.

        The information is the expected second derivative of the negative log-likelihood.
        """


class OutputLikelihood(ABC):
    """What the package asks of a likelihood; :class:`Likelihood` is what a user's must have.

    For outputs with positions, (n, C, ...), `ignored` maps a batch of inputs, as the module takes
    it, to a bool tensor (n, ...) that is True at positions without a label, such as padding. They
    count nothing.
    """

    # Outputs of each sample, where they have no positions.
    _n_outputs: int | None = None
    # Whether predictions of some samples are less certain than of others.
    has_uncertainty = False

    def __init__(self, ignored: Ignored | None = None) -> None:
        self.ignored = ignored

    def __repr__(self) -> str:
        values = {name: value for name, value in vars(self).items() if name[0] != "_" and value}
        options = ", ".join(f"{name}={value!r}" for name, value in values.items())
        return f"{type(self).__name__}({options})"

    def of_samples_like(self, outputs: Tensor) -> Self:
        """Return the same for samples that all have as many outputs as these, (1, m)."""
        same = copy(self)
        same._n_outputs = outputs.shape[1] if outputs.dim() == 2 else None
        return same

    def check_samples(self, outputs: Tensor) -> None:
        """Check outputs, and that each sample has as many of them as the first sample of all."""
        self.check(outputs)
        if self._n_outputs is not None and outputs.shape[1:] != (self._n_outputs,):
            raise ValueError(
                f"Expected {self._n_outputs} outputs a sample, as the first sample has, found "
                f"outputs of shape {tuple(outputs.shape)}. Sequences of several lengths have their "
                "positions along a third axis: (n, 1, positions) for one output each."
            )

    @abstractmethod
    def check(self, outputs: Tensor) -> None:
        """Raise ValueError unless outputs of this shape are of this likelihood."""

    @abstractmethod
    def rank(self, outputs: Tensor) -> int:
        """Return the number of rows of the exact factor."""

    @abstractmethod
    def factor(self, outputs: Tensor) -> Tensor:
        """Return rows R, (n, rank, ...), in float64."""

    def mean(self, outputs: Tensor) -> Tensor:
        """Return the mean of the label's distribution, in float64."""
        return outputs.detach().double()

    def is_ordered(self, outputs: Tensor) -> bool:
        """Return whether the leading rows of the factor carry most of its trace."""
        return False

    def leading(self, outputs: Tensor, r: int | None) -> Tensor:
        """Return the first r rows of the factor; None: all."""
        return self.factor(outputs)[:, :r]

    def combined(self, outputs: Tensor, signs: Callable[[tuple[int, ...]], Tensor]) -> Tensor:
        """Return a random combination of the rows of the factor, (n, ...).

        `signs` returns one random sign for each entry of a shape (n, ...).
        """
        factor = self.factor(outputs)
        flat = signs(tuple(factor.shape[:2]))[:, None] @ factor.flatten(2)
        return flat.view(outputs.shape)

    def uncertainty(self, outputs: Tensor, counted: Tensor | None = None) -> Tensor:
        """Return how uncertain the label of each sample is, (n,); of counted positions."""
        return torch.ones(len(outputs), dtype=torch.float64, device=outputs.device)

    def counted(self, batch: Inputs, outputs: Tensor) -> Tensor | None:
        """Return one (n, ...) where a position counts and zero where not; None: all count."""
        if self.ignored is None:
            return None
        counted = ~self.ignored(batch).to(outputs.device)
        expected = (len(outputs), *outputs.shape[2:])
        if counted.shape != expected:
            raise ValueError(
                f"Expected ignored positions of shape {expected} for outputs of shape "
                f"{tuple(outputs.shape)}, found {tuple(counted.shape)}."
            )
        return counted.double()

    def directions(
        self,
        outputs: Tensor,
        n_directions: int | None = None,
        *,
        counted: Tensor | None = None,
        first_row: int = 0,
    ) -> Tensor:
        r"""Compute the rows that a network is differentiated along, (n, r, ...), in float64.

        Fewer than the rank are the leading ones where these carry most of the trace, else random
        combinations :math:`\frac{1}{\sqrt r} \sum_j \pm R_j` in the outputs' dtype, for which
        :math:`R^\top R` is exact in the mean over the signs; these depend on `first_row`, the
        number of the first sample. None: all rows. With sequences of several lengths a batch of
        short ones may have all rows, and a longer one combinations. The `counted` positions are
        those of :meth:`counted`.
        """
        rank = self.rank(outputs)
        r = rank if n_directions is None else n_directions
        if r >= rank or self.is_ordered(outputs):
            rows = self.leading(outputs, r)
            if outputs.dim() > 2 and n_directions is not None and r > rank:
                # Sequences of another length may have more rows.
                rows = torch.cat([rows, rows.new_zeros(len(rows), r - rank, *rows.shape[2:])], 1)
        else:
            combined = [
                self.combined(outputs, partial(random_signs, first_row, i, outputs.device))
                for i in range(r)
            ]
            rows = torch.stack([row.to(outputs.dtype) for row in combined], 1) / math.sqrt(r)
        if counted is None:
            return rows
        # (n, ...) beside (n, r, C, ...), or (n, r) of outputs (n,).
        return rows * counted.view(len(rows), *[1] * min(2, rows.dim() - 1), *counted.shape[1:])


class DiagonalLikelihood(OutputLikelihood):
    """A likelihood of independent labels, one for each output of any shape (n, ...)."""

    def check(self, outputs: Tensor) -> None:
        """Accept outputs of any shape."""

    def rank(self, outputs: Tensor) -> int:
        """Return the number of outputs of a sample."""
        return math.prod(outputs.shape[1:])

    @abstractmethod
    def scale(self, outputs: Tensor) -> Tensor:
        """Return the root of the information in each output, (n, ...), in float64."""

    def factor(self, outputs: Tensor) -> Tensor:
        """Return rows with one entry each."""
        flat = self.scale(outputs).reshape(len(outputs), -1)
        return torch.diag_embed(flat).view(*flat.shape, *outputs.shape[1:])

    def combined(self, outputs: Tensor, signs: Callable[[tuple[int, ...]], Tensor]) -> Tensor:
        """Return each row's entry with a random sign."""
        return self.scale(outputs) * signs(tuple(outputs.shape))


def weighted_mean(values: Tensor, counted: Tensor | None, first: int) -> Tensor:
    """Return the mean over the axes from `first` on, with weights."""
    if values.dim() == first:
        return values if counted is None else values * counted
    values = values.flatten(first)
    if counted is None:
        return values.mean(-1)
    counted = counted.flatten(first)
    return (values * counted).sum(-1) / counted.sum(-1).clamp_min(1)
