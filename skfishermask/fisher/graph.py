"""Every use of every parameter in the autograd graph of one batch.

From the logits back, the graph names all operations that a parameter enters. On its way a
parameter may pass *views*: operations that only move its entries (a transpose, a slice, a cast,
a row of a table). What it enters then is an operation that mixes it with the samples, for which
:mod:`skfishermask.fisher.rules` may have a rule.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, Protocol, cast

import torch
from torch import Tensor


class Node(Protocol):
    """A node of the autograd graph, with what its operation saved as attributes."""

    @property
    def next_functions(self) -> tuple[tuple[Node | None, int], ...]:
        """Where each operand comes from."""

    def name(self) -> str:
        """Give the name of the operation's gradient."""

    def __call__(self, *gradients: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Give gradients at the outputs back to the operands."""

    def __getattr__(self, name: str) -> Any:
        """Give a saved value: every operation of PyTorch or of a user has its own, of any type."""


# Each moves entries of its input to places of their own: called with numbers of places, such a
# node tells where each entry went.
_MOVES = {
    f"{name}Backward0"
    for name in (
        *("Alias", "Cat", "Clone", "ConstantPadNd", "Diagonal", "Flip", "Permute"),
        *("ReshapeAlias", "Roll", "Rot90", "Select", "Slice", "Split", "SplitWithSizes", "Squeeze"),
        *("Stack", "T", "ToCopy", "Transpose", "Tril", "Triu", "Unbind", "UnsafeSplit"),
        *("UnsafeSplitWithSizes", "UnsafeView", "Unsqueeze", "View"),
    )
} | {"SqueezeBackward1", "SqueezeBackward2", "SqueezeBackward3", "TransposeBackward1"}
# They copy all numbers as they are, also where they change the dtype.
_COPIES = {"AliasBackward0", "CloneBackward0", "ToCopyBackward0"}
# These copy entries to several places. Where the copies belong to one sample each, there are rules.
_SPREADS = {
    f"{name}Backward0"
    for name in ("Embedding", "Expand", "Gather", "Index", "IndexSelect", "Repeat")
}
# What an output layer does.
_PRODUCTS = {"Addmm", "Baddbmm", "Bmm", "Convolution", "Mm", "Mv", "Trilinear"}
# What may be done to parameters before samples come in. Not here: whatever takes rows or entries by
# values that the graph does not show, such as a table of tokens.
_TRANSFORMS = {
    *("Add", "Addmm", "Bmm", "Div", "Exp", "LinalgVectorNorm", "Mm", "Mul", "Mv", "Norm", "Pow"),
    *(
        "Rsqrt",
        "Sigmoid",
        "Softmax",
        "Softplus",
        "Sqrt",
        "Sub",
        "Sum",
        "Tanh",
        "WeightNormInterface",
    ),
}
_VALUED_SPREADS = _SPREADS - {"ExpandBackward0", "RepeatBackward0"}


def is_spread(node: Node) -> bool:
    """Tell whether an operation may be a view of a parameter that copies entries."""
    return node.name() in _SPREADS


def _transforms(node: Node) -> bool:
    spreads = _SPREADS - _VALUED_SPREADS
    return node.name() in _MOVES | spreads or operation_name(node) in _TRANSFORMS


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
        if self.node.name() in _VALUED_SPREADS:
            return None
        return self.node.name(), self.slot, self.output, tuple(self.shape), static_values(self.node)


@dataclass(frozen=True)
class Use:
    """A use of a parameter.

    Attributes
    ----------
    name : str
        The parameter's.
    shape : torch.Size
        Of the operand: the parameter after its views.
    views : tuple of Step
        From the parameter to the operation.
    node : autograd node
        The operation.
    slot : int
        Which operand of it.
    """

    name: str
    shape: torch.Size
    views: tuple[Step, ...]
    node: Node
    slot: int

    @property
    def kind(self) -> Hashable:
        """The parameter and everything about the use but shapes and values."""
        views = tuple((step.node.name(), step.slot, step.output) for step in self.views)
        return self.name, views, self.node.name(), self.slot, static_values(self.node)

    @property
    def operation(self) -> str:
        """Its name, as PyTorch gives it."""
        return operation_name(self.node)


def operation_name(node: Node) -> str:
    """Name the operation that a node belongs to."""
    name: str = node.name().rsplit("::", 1)[-1]
    return name.split("Backward")[0] or name


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


class Graph:
    """The autograd graph of a batch's logits.

    Parameters
    ----------
    logits : Tensor
        Their graph.
    parameters : dict of str to Tensor
        Whose uses are looked for.
    """

    def __init__(self, logits: Tensor, parameters: Mapping[str, Tensor]) -> None:
        name_of = {id(p): name for name, p in parameters.items()}
        self._shapes = {name: p.shape for name, p in parameters.items()}
        self._consumers: dict[Node, list[tuple[Node, int, int]]] = defaultdict(list)
        self.leaves: dict[str, Node] = {}
        self.nodes: list[Node] = []
        number: dict[Node, int] = {}
        stack = [cast(Node, logits.grad_fn)] if logits.grad_fn is not None else []
        number |= dict.fromkeys(stack, 0)
        while stack:
            node = stack.pop()
            number[node] = len(self.nodes)
            self.nodes.append(node)
            for slot, (source, output) in enumerate(node.next_functions):
                if source is None:
                    continue
                self._consumers[source].append((node, slot, output))
                if source not in number:
                    number[source] = -1
                    stack.append(source)
            name = name_of.get(id(getattr(node, "variable", None)))
            if name is not None:
                self.leaves[name] = node
        self._number = number

    def uses(self) -> Iterator[Use]:
        """Find all uses of all parameters.

        Yields
        ------
        Use
            An operation that is no view; also each that may be a view or not (a row of a table, an
            expanded token), followed by the uses of its output.
        """
        for name, leaf in self.leaves.items():
            todo: list[tuple[Node, tuple[Step, ...]]] = [(leaf, ())]
            while todo:
                source, views = todo.pop()
                taken = views[-1].output if views else 0
                for node, slot, output in self._consumers[source]:
                    if output != taken:
                        continue
                    shape = views[-1].shape if views else self._shapes[name]
                    kind = node.name()
                    if kind not in _MOVES:
                        yield Use(name, shape, views, node, slot)
                    if kind in _MOVES or kind in _SPREADS:
                        outputs = {taken for _, _, taken in self._consumers[node]}
                        todo += [(node, (*views, Step(node, slot, i))) for i in sorted(outputs)]

    def signature(self) -> Hashable:
        """Describe the graph: equal for batches that run the same operations on the same shapes."""
        number = self._number
        return tuple(
            (
                node.name(),
                tuple(tuple(m.shape) for m in node._input_metadata),
                tuple((number[source] if source else None, i) for source, i in node.next_functions),
                static_values(node),
            )
            for node in self.nodes
        )

    @cached_property
    def from_parameters(self) -> set[Node]:
        """The nodes that compute from parameters alone: no sample is in them."""
        missing = {node: len(node.next_functions) for node in self.nodes}
        todo = [node for node in self.nodes if hasattr(node, "variable")]
        found = set(todo)
        while todo:
            for node, _, _ in self._consumers[todo.pop()]:
                missing[node] -= 1
                if missing[node] == 0 and _transforms(node):
                    found.add(node)
                    todo.append(node)
        return found

    def last_layer(self) -> set[str]:
        """Name the parameters of the last product with parameters, and of what is added to it.

        Where there is no product, those of the last operation that a matrix enters.
        """
        products, others = [], []
        for node in self.nodes:
            names = self._own(node)
            if node not in self.from_parameters and operation_name(node) in _PRODUCTS and names:
                products.append(node)
            elif any(len(self._shapes[name]) >= 2 for name in names):
                others.append(node)
        if not products and not others:
            return set()
        # The number in which the forward pass made the node.
        last = max(products or others, key=lambda node: node._sequence_nr())
        names = self._own(last)
        todo = [last]
        while todo:
            for node, _, _ in self._consumers[todo.pop()]:
                if node.name() in _MOVES:
                    todo.append(node)
                elif operation_name(node) == "Add" and products:
                    names |= self._own(node)
        return names

    def _own(self, node: Node) -> set[str]:
        """Name the parameters that enter an operation beside the samples, perhaps transformed."""
        found: set[str] = set()
        todo = [source for source, _ in node.next_functions if source in self.from_parameters]
        names = {leaf: name for name, leaf in self.leaves.items()}
        while todo:
            source = todo.pop()
            if source in names:
                found.add(names[source])
            todo += [further for further, _ in source.next_functions if further is not None]
        return found


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
        steps = [step for step in views if step.node.name() not in _COPIES]
        if not steps:
            return
        entries = torch.arange(self.numel).view(shape)
        for step in steps:
            name = step.node.name()
            entries = (_spread if name in _SPREADS else _moved)(step, entries)
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


def _spread(step: Step, entries: Tensor) -> Tensor:
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


def signed(number: int) -> int:
    """Read a number that a node has saved: a negative one comes as a large unsigned one."""
    return number - 2**64 if number >= 2**63 else number
