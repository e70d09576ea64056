"""Views of parameters: operations that only place a parameter's entries elsewhere."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor

from skfishermask.jacobian.operations import Node, View, operation_of, signed


@dataclass(frozen=True)
class Step:
    """A step of a parameter's way: a node, which input of it and which output is on the way."""

    node: Node
    slot: int
    output: int

    @cached_property
    def shape(self) -> torch.Size:
        """Shape of the output."""
        return torch.Size(self.node._input_metadata[self.output].shape)

    @property
    def key(self) -> Hashable:
        """What says, for views, where entries go; None: their values do."""
        if operation_of(self.node).view is View.INDEXED:
            return None
        return self.node.name(), self.slot, self.output, tuple(self.shape), static_values(self.node)


@cache
def _static_names(kind: type) -> tuple[str, ...]:
    names = set(dir(kind))
    # A saved tensor has a raw form beside it.
    return tuple(sorted(n for n in names if n.startswith("_saved_") and f"_raw{n}" not in names))


def static_values(node: Node) -> tuple[Hashable, ...]:
    """Give what a node has saved besides tensors: axes, sizes, strides ..."""
    values = []
    kind: type = type(node)
    for name in _static_names(kind):
        value = getattr(node, name)
        values.append(value if isinstance(value, Hashable) else repr(value))
    return tuple(values)


class Places:
    """Where a parameter's entries stand in an operand.

    Parameters
    ----------
    shape : torch.Size
        The parameter's.
    views : sequence of Step
        From the parameter to the operand.
    """

    def __init__(self, shape: torch.Size, views: Sequence[Step]) -> None:
        self.numel = shape.numel()
        # Entry by place of the operand, -1 where another tensor's are; None: in the same order.
        self._entries: Tensor | None = None
        steps = [step for step in views if operation_of(step.node).view is not View.SAME_ORDER]
        if not steps:
            return
        entries = torch.arange(self.numel).view(shape)
        for step in steps:
            is_moved = operation_of(step.node).view is View.MOVED
            entries = (_moved if is_moved else _copied)(step, entries)
        self._entries = entries.flatten()

    def of(self, index: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Find entries.

        Parameters
        ----------
        index : Tensor of int64, or None
            Flat indices of entries, increasing, on the CPU; None: all.

        Returns
        -------
        which : Tensor of int64, or None
            Positions in `index`, once for each place; None: all of them once, in order.
        place : Tensor of int64, or None
            The flat places in the operand; None: these are in order and all.
        """
        if self._entries is None:
            return None, index
        numbers = torch.full((self.numel + 1,), -1)
        wanted = torch.arange(self.numel) if index is None else index
        numbers[wanted] = torch.arange(len(wanted))
        found = numbers[self._entries]  # An entry of -1 finds the last number, which is -1.
        place = torch.nonzero(found >= 0).flatten()
        which, order = found[place].sort(stable=True)
        place = place[order]
        if len(which) == len(wanted) and bool((which == torch.arange(len(which))).all()):
            return None, place
        return which, place


def _moved(step: Step, entries: Tensor) -> Tensor:
    """Follow entries through a node that moves them."""
    # Counted from one: what the step leaves out gets zero.
    place = _called(step, torch.arange(1.0, step.shape.numel() + 1, dtype=torch.float64))
    moved = torch.full((step.shape.numel(),), -1)
    kept = place.flatten() > 0
    moved[place.flatten()[kept].long() - 1] = entries.flatten()[kept]
    return moved.view(step.shape)


def _called(step: Step, numbers: Tensor) -> Tensor:
    """Call a node, which gives gradients at its outputs back to its inputs, with numbers."""
    given = [numbers.new_zeros(tuple(m.shape)) for m in step.node._input_metadata]
    given[step.output] = numbers.view(step.shape)
    with torch.no_grad():
        back = step.node(*given)
    taken: Tensor = back[step.slot] if isinstance(back, tuple) else back
    return taken


def _copied(step: Step, entries: Tensor) -> Tensor:
    """Follow entries through a node that copies them: do to their numbers what it did to them."""
    node, name = step.node, step.node.name()
    if name == "ExpandBackward0":
        return entries.expand(step.shape)
    if name == "RepeatBackward0":
        return entries.repeat(node._saved_repeats)
    if name == "EmbeddingBackward0":
        ids = node._saved_indices.cpu()
        padding = ids == signed(node._saved_padding_idx)
        return torch.where(padding[..., None], -1, entries[ids])
    if name == "IndexSelectBackward0":
        return entries.index_select(signed(node._saved_dim), node._saved_index.cpu())
    if name == "GatherBackward0":
        return entries.gather(signed(node._saved_dim), node._saved_index.cpu())
    ids = [slice(None) if i is None else i.cpu() for i in node._saved_indices]
    return entries[tuple(ids)]
