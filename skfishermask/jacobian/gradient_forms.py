"""The two forms of the per-sample gradient of an operand.

In an outer product (:class:`OuterProductGrad`: linear layers, convolutions, tables) the gradient of
an entry is a sum over positions of one feature of the other operand times one of the output's
gradient. Of an operand that is broadcast (:class:`BroadcastGrad`: biases, normalisations) it is the
output's gradient itself, perhaps times a factor, summed over all that the entry was broadcast to.
Neither form copies the operand for each sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

Features = Tensor | None
"""Indices of features, int64; None: all."""


@dataclass(frozen=True)
class OuterProductGrad:
    """Sums over positions of left feature x right feature.

    The operand, flattened, is (groups, left, right), with features counted through all groups. One
    side is the saved other operand, the same for all gradients; the other side is made of the
    gradient at the output. Both are (rows, features, positions), and each row belongs to one
    sample.
    """

    groups: int
    left: int
    right: int
    saved_side: Callable[[Features], Tensor]
    grad_side: Callable[[Tensor, Features], Tensor]
    saved_is_left: bool = True
    # All features of the saved side as (rows, positions, groups, features), in another order, where
    # that is faster to make; and what maps (groups, left, right) in that order to the operand's.
    saved_blocks: Callable[[], Tensor] | None = None
    restore_order: Callable[[Tensor], Tensor] | None = None

    @property
    def axes(self) -> Sequence[int]:
        """The axes that rows may lie along."""
        return (0,)

    def rows(self, g: Tensor, axis: int) -> Tensor:
        """Return a gradient at the output as rows."""
        return self.grad_side(g, None)


@dataclass(frozen=True)
class EmbeddingGrad(OuterProductGrad):
    """An outer product with one-hot left features: the rows of a table that are looked up."""

    ids: Tensor | None = None  # (rows,), the row of the table; -1: one that gets no gradient


@dataclass(frozen=True)
class BroadcastGrad:
    """Sums of the output's gradient over what an entry was broadcast to."""

    shape: tuple[int, ...]  # the operand's, with as many axes as the output's gradient
    # multiplies the gradient: a tensor that can be broadcast to it
    factor: Callable[[], Tensor] | None = None
    view: Callable[[Tensor], Tensor] = lambda g: g  # gives it the axes of `shape`
    scale: float = 1.0  # multiplies the sums

    @property
    def axes(self) -> Sequence[int]:
        """The axes that rows may lie along."""
        return [axis for axis, size in enumerate(self.shape) if size == 1]

    def rows(self, g: Tensor, axis: int) -> Tensor:
        """Return a gradient at the output as rows."""
        return self.view(g).movedim(axis, 0)


Form = OuterProductGrad | BroadcastGrad
