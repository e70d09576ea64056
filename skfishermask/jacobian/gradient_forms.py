"""The two forms that an operand's per-sample gradient has.

In an :class:`Outer` product (linear layers, convolutions, tables) an entry's gradient is a sum over
positions of one feature of the other operand times one of the output's gradient; in a :class:`Sum`
(biases, normalisations, broadcasting) it is the output's gradient itself, perhaps times a factor,
summed over all that the entry was broadcast to. Neither forms the operand anew for each sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

Features = Tensor | None
"""Numbers of features, int64; None: all."""


@dataclass(frozen=True)
class Outer:
    """Sums over positions of left feature x right feature.

    The operand, flattened, is (groups, left, right). One side is the other operand and stays the
    same for all gradients; the other side is made of the gradient at the output. Rows come first,
    and belong to a sample each.

    Attributes
    ----------
    groups, left, right : int
        Numbers of groups, and of features of each side in a group.
    fixed : callable
        Features (counted through all groups) -> (rows, features, positions).
    moving : callable
        Gradient at the output, features -> the same for the other side.
    fixed_is_left : bool
        Which side is which.
    blocks : callable, optional
        Gives all features of the fixed side as (rows, positions, groups, features), in another
        order, where that is faster to make.
    restored : callable, optional
        Turns (groups, left, right) in that order into the operand's.
    """

    groups: int
    left: int
    right: int
    fixed: Callable[[Features], Tensor]
    moving: Callable[[Tensor, Features], Tensor]
    fixed_is_left: bool = True
    blocks: Callable[[], Tensor] | None = None
    restored: Callable[[Tensor], Tensor] | None = None

    @property
    def axes(self) -> Sequence[int]:
        """Axes that rows may run along."""
        return (0,)

    def rows(self, g: Tensor, axis: int) -> Tensor:
        """View a gradient at the output as rows."""
        return self.moving(g, None)


@dataclass(frozen=True)
class Table(Outer):
    """An outer product whose left features are the table's rows, one-hot.

    Attributes
    ----------
    ids : Tensor of shape (rows,)
        Which row of the table was taken; -1: one that gets no gradient.
    """

    ids: Tensor | None = None


@dataclass(frozen=True)
class Sum:
    """Sums of the output's gradient over what an entry was broadcast to.

    Attributes
    ----------
    shape : tuple of int
        The operand's, with as many axes as the output's gradient.
    factor : callable, optional
        What the gradient is multiplied by: a tensor that can be broadcast to it.
    view : callable, optional
        Views the gradient, where its own axes would not do.
    scale : float
        Multiplies it.
    """

    shape: tuple[int, ...]
    factor: Callable[[], Tensor] | None = None
    view: Callable[[Tensor], Tensor] = lambda g: g
    scale: float = 1.0

    @property
    def axes(self) -> Sequence[int]:
        """Axes that rows may run along."""
        return [axis for axis, size in enumerate(self.shape) if size == 1]

    def rows(self, g: Tensor, axis: int) -> Tensor:
        """View a gradient at the output as rows."""
        return self.view(g).movedim(axis, 0)


Form = Outer | Sum
