"""Every use of every parameter in the autograd graph of one batch.

From the logits back, the graph names all operations that a parameter enters. On its way a
parameter may pass *views*: operations that only move its entries (a transpose, a slice, a cast,
a row of a table). What it enters then is an operation that mixes it with the samples, for which
:mod:`skfishermask.jacobian.rules` may have a rule.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import torch
from torch import Tensor

from skfishermask.jacobian.operations import Node, View, operation_name, operation_of
from skfishermask.jacobian.views import Step, static_values


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
                    view = operation_of(node).view
                    if view not in (View.SAME_ORDER, View.MOVED):
                        yield Use(name, shape, views, node, slot)
                    if view is not None:
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
                if missing[node] == 0 and operation_of(node).keeps_parameters_apart:
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
            if node not in self.from_parameters and operation_of(node).product and names:
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
                if operation_of(node).view in (View.SAME_ORDER, View.MOVED):
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
