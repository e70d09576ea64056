"""Views of parameters: operations that only move or copy a parameter's entries."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor

from skfishermask.jacobian.operations import Node, View, operation_of, signed


@dataclass(frozen=True)
class ViewStep:
    """One view of a parameter: a node, and the operand and output that the parameter passes."""

    node: Node
    operand: int
    output: int

    @cached_property
    def shape(self) -> torch.Size:
        """The shape of the output."""
        return torch.Size(self.node._input_metadata[self.output].shape)

    @property
    def key(self) -> Hashable:
        """What decides where entries go; None: the values of an index do."""
        if operation_of(self.node).view is View.INDEXED:
            return None
        return (
            self.node.name(),
            self.operand,
            self.output,
            tuple(self.shape),
            static_values(self.node),
        )


@cache
def _static_names(kind: type) -> tuple[str, ...]:
    names = set(dir(kind))
    # A saved tensor has a raw form beside it. Where a factor lies in memory is saved only if it
    # needs a gradient.
    saved = (n for n in names if n.startswith("_saved_") and not n.endswith("_sym_strides"))
    return tuple(sorted(n for n in saved if f"_raw{n}" not in names))


def static_values(node: Node) -> tuple[Hashable, ...]:
    """Return what a node has saved besides tensors: axes, sizes ..."""
    values = []
    kind: type = type(node)
    for name in _static_names(kind):
        value = getattr(node, name)
        values.append(value if isinstance(value, Hashable) else repr(value))
    return tuple(values)


def entry_positions(
    shape: torch.Size, views: Sequence[ViewStep], index: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Find where entries of a parameter of some shape lie in an operand, after some views.

    The `index` is flat, increasing, on the CPU; None: all entries. Returns for each position in the
    operand the position in `index` (None: all of them once, in order), and the flat positions in
    the operand (None: all, in order).
    """
    steps = [step for step in views if operation_of(step.node).view is not View.SAME_ORDER]
    if not steps:
        return None, index
    n_entries = shape.numel()
    # The entry at each position of the operand; -1: of another tensor.
    entries = torch.arange(n_entries).view(shape)
    for step in steps:
        is_moved = operation_of(step.node).view is View.MOVED
        entries = (_moved if is_moved else _copied)(step, entries)
    index = torch.arange(n_entries) if index is None else index
    # One more than there are entries: an entry of -1 finds it, and so is not in `index`.
    position_in_index = torch.full((n_entries + 1,), -1)
    position_in_index[index] = torch.arange(len(index))
    positions = position_in_index[entries.flatten()]
    operand_index = torch.nonzero(positions >= 0).flatten()
    entry_index, order = positions[operand_index].sort(stable=True)
    operand_index = operand_index[order]
    if len(entry_index) == len(index) and bool((entry_index == torch.arange(len(index))).all()):
        return None, operand_index
    return entry_index, operand_index


def _moved(step: ViewStep, entries: Tensor) -> Tensor:
    """Return the entry at each position of the output of a node that moves entries."""
    # Counted from one: an entry that the output leaves out gets zero.
    numbers = torch.arange(1.0, step.shape.numel() + 1, dtype=torch.float64)
    position = _backward_of(step, numbers).flatten()
    moved = torch.full((step.shape.numel(),), -1)
    kept = position > 0
    moved[position[kept].long() - 1] = entries.flatten()[kept]
    return moved.view(step.shape)


def _backward_of(step: ViewStep, gradient: Tensor) -> Tensor:
    """Call a node, which maps gradients at its outputs to gradients of its operands."""
    gradients = [gradient.new_zeros(tuple(m.shape)) for m in step.node._input_metadata]
    gradients[step.output] = gradient.view(step.shape)
    with torch.no_grad():
        result = step.node(*gradients)
    of_operand: Tensor = result[step.operand] if isinstance(result, tuple) else result
    return of_operand


def _copied(step: ViewStep, entries: Tensor) -> Tensor:
    """Return the entry at each position of the output of a node that copies entries."""
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
