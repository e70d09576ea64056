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

    The operand, flattened, is (groups, left, right). One side is the saved other operand, the same
    for all gradients; the other side is made of the gradient at the output. Rows come first, and
    each belongs to one sample.

    Attributes
    ----------
    groups, left, right : int
        Numbers of groups, and of features of each side in a group.
    saved_side : callable
        Features (counted through all groups) -> (rows, features, positions).
    grad_side : callable
        Gradient at the output, features -> the same for the other side.
    saved_is_left : bool
        Whether the saved side is the left one.
    saved_blocks : callable, optional
        Returns all features of the saved side as (rows, positions, groups, features), in another
        order, where that is faster to make.
    restore_order : callable, optional
        Maps (groups, left, right) in that order to the operand's.
    """

    groups: int
    left: int
    right: int
    saved_side: Callable[[Features], Tensor]
    grad_side: Callable[[Tensor, Features], Tensor]
    saved_is_left: bool = True
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
    """An outer product with one-hot left features: the rows of a table that are looked up.

    Attributes
    ----------
    ids : Tensor of shape (rows,)
        The row of the table that is looked up; -1: one that gets no gradient.
    """

    ids: Tensor | None = None


@dataclass(frozen=True)
class BroadcastGrad:
    """Sums of the output's gradient over what an entry was broadcast to.

    Attributes
    ----------
    shape : tuple of int
        The operand's, with as many axes as the output's gradient.
    factor : callable, optional
        Returns what the gradient is multiplied by: a tensor that can be broadcast to it.
    view : callable, optional
        Maps the gradient to one with the axes of `shape`, where its own differ.
    scale : float
        Multiplies the sums.
    """

    shape: tuple[int, ...]
    factor: Callable[[], Tensor] | None = None
    view: Callable[[Tensor], Tensor] = lambda g: g
    scale: float = 1.0

    @property
    def axes(self) -> Sequence[int]:
        """The axes that rows may lie along."""
        return [axis for axis, size in enumerate(self.shape) if size == 1]

    def rows(self, g: Tensor, axis: int) -> Tensor:
        """Return a gradient at the output as rows."""
        return self.view(g).movedim(axis, 0)


Form = OuterProductGrad | BroadcastGrad
