"""Every use of every parameter in the autograd graph of one batch.

From the outputs back, the graph names all operations that a parameter enters. Before that a
parameter may pass through *views*: operations that only move its entries (a transpose, a slice, a
cast, a row of a table). What it enters then is an operation that combines it with the samples, for
which :mod:`skfishermask.jacobian.rules` may have a rule.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Hashable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import cast

import torch
from torch import Tensor

from skfishermask.jacobian.operations import Node, View, operation_name, operation_of
from skfishermask.jacobian.views import ViewStep, static_values

# For each node its name, that of the parameter if it is a leaf, and the number of the node that
# computed each operand, with which of its outputs the operand is.
Structure = tuple[tuple[str, str | None, tuple[tuple[int | None, int], ...]], ...]


@dataclass(frozen=True)
class Use:
    """A use of a parameter."""

    name: str  # the parameter's
    shape: torch.Size  # of the operand: of the parameter after its views
    views: tuple[ViewStep, ...]  # from the parameter to the operation
    node: Node  # the operation
    operand: int  # its number

    @property
    def kind(self) -> Hashable:
        """All that identifies the use, also in other batches: names, sizes and options."""
        views = tuple((step.node.name(), step.operand, step.output) for step in self.views)
        return self.name, views, self.node.name(), self.operand, static_values(self.node)

    @property
    def operation(self) -> str:
        """PyTorch's name of the operation."""
        return operation_name(self.node)


@dataclass(frozen=True)
class Signature:
    """What is equal for batches with the same operations on the same shapes."""

    n: int  # samples
    parameters: frozenset[str]  # those that may take part
    structure: Structure
    sizes: tuple[Hashable, ...]  # of each node: shapes, dtypes, devices and options

    def is_alike(self, other: Signature) -> bool:
        """Return whether another batch differs in the number of samples alone, if at all."""
        return self.structure == other.structure and _in_proportion(
            self.sizes, other.sizes, self.n, other.n
        )

    def restricted(self, names: frozenset[str]) -> Signature:
        """Return the signature of the same batch where some of the parameters alone take part."""
        structure, kept = restrict(self.structure, names)
        sizes = tuple(self.sizes[i] for i in kept)
        return replace(self, parameters=names, structure=structure, sizes=sizes)


def restrict(structure: Structure, names: Collection[str]) -> tuple[Structure, list[int]]:
    """Leave out what leads to none of some parameters; also return the numbers of what is left."""
    consumers: dict[int | None, list[int]] = defaultdict(list)
    for i, (*_, edges) in enumerate(structure):
        for source, _ in edges:
            consumers[source].append(i)
    stack = [i for i, (_, parameter, _) in enumerate(structure) if parameter in names]
    reaching = set(stack)
    while stack:
        further = {*consumers[stack.pop()]} - reaching
        reaching |= further
        stack += further
    # In the order in which `Graph` would number them.
    kept = sorted(reaching)
    number: dict[int | None, int] = {old: new for new, old in enumerate(kept)}
    restricted = tuple(
        (name, parameter, tuple((number[i], o) if i in number else (None, 0) for i, o in edges))
        for name, parameter, edges in (structure[i] for i in kept)
    )
    return restricted, kept


def _in_proportion(one: Hashable, other: Hashable, n: int, n_other: int) -> bool:
    """Return whether values are equal, but for numbers in proportion to those of samples."""
    if isinstance(one, tuple) and isinstance(other, tuple):
        pairs = zip(one, other, strict=False)
        return len(one) == len(other) and all(_in_proportion(*pair, n, n_other) for pair in pairs)
    if one == other:
        return True
    return isinstance(one, int) and isinstance(other, int) and one * n_other == other * n


class Graph:
    """The autograd graph of a batch's outputs, with the uses of some parameters in it."""

    def __init__(self, outputs: Tensor, parameters: Mapping[str, Tensor]) -> None:
        name_of = {id(p): name for name, p in parameters.items()}
        self._n = len(outputs)
        self._shapes = {name: p.shape for name, p in parameters.items()}
        self._consumers: dict[Node, list[tuple[Node, int, int]]] = defaultdict(list)
        self.leaves: dict[str, Node] = {}
        self.nodes: list[Node] = []
        number: dict[Node, int] = {}
        stack = [cast(Node, outputs.grad_fn)] if outputs.grad_fn is not None else []
        number |= dict.fromkeys(stack, 0)
        while stack:
            node = stack.pop()
            number[node] = len(self.nodes)
            self.nodes.append(node)
            for operand, (source, output) in enumerate(node.next_functions):
                if source is None:
                    continue
                self._consumers[source].append((node, operand, output))
                if source not in number:
                    number[source] = -1
                    stack.append(source)
            name = name_of.get(id(getattr(node, "variable", None)))
            if name is not None:
                self.leaves[name] = node
        self._number = number

    def uses(self) -> Iterator[Use]:
        """Yield each operation that a parameter enters, if it is no view.

        One that may be a view (a row of a table, an expanded token) is followed by the uses of its
        output.
        """
        for name, leaf in self.leaves.items():
            stack: list[tuple[Node, tuple[ViewStep, ...]]] = [(leaf, ())]
            while stack:
                source, views = stack.pop()
                source_output = views[-1].output if views else 0
                for node, operand, output in self._consumers[source]:
                    if output != source_output:
                        continue
                    shape = views[-1].shape if views else self._shapes[name]
                    view = operation_of(node).view
                    if view not in (View.SAME_ORDER, View.MOVED):
                        yield Use(name, shape, views, node, operand)
                    if view is not None:
                        outputs = {output for _, _, output in self._consumers[node]}
                        stack += [
                            (node, (*views, ViewStep(node, operand, i))) for i in sorted(outputs)
                        ]

    @cached_property
    def structure(self) -> Structure:
        """A key that is equal for batches with the same operations, on any shapes."""
        number = self._number
        parameter_of = {leaf: name for name, leaf in self.leaves.items()}
        return tuple(
            (
                node.name(),
                parameter_of.get(node),
                tuple((number[source] if source else None, i) for source, i in node.next_functions),
            )
            for node in self.nodes
        )

    def signature(self) -> Signature:
        """Return a key that is equal for batches with the same operations on the same shapes."""
        sizes = tuple(
            (
                tuple((tuple(m.shape), m.dtype, m.device) for m in node._input_metadata),
                static_values(node),
            )
            for node in self.nodes
        )
        return Signature(self._n, frozenset(self._shapes), self.structure, sizes)

    def bytes_of_sample(self) -> float:
        """Return the size of the largest output that depends on samples, for each of these."""
        outputs = (
            m for n in self.nodes if n not in self.from_parameters for m in n._input_metadata
        )
        return max((prod(m.shape) * m.dtype.itemsize for m in outputs), default=0) / self._n

    @cached_property
    def from_parameters(self) -> set[Node]:
        """The nodes that compute from parameters alone, not from samples."""
        missing = {node: len(node.next_functions) for node in self.nodes}
        stack = [node for node in self.nodes if hasattr(node, "variable")]
        nodes = set(stack)
        while stack:
            for node, _, _ in self._consumers[stack.pop()]:
                missing[node] -= 1
                if missing[node] == 0 and operation_of(node).keeps_parameters_apart:
                    nodes.add(node)
                    stack.append(node)
        return nodes

    def output_layer(self) -> set[str]:
        """Name the parameters of the last product with parameters, and of what is added to it.

        Where there is no product, those of the last operation that a matrix enters.
        """
        products, others = [], []
        for node in self.nodes:
            names = self._parameters_of(node)
            if node not in self.from_parameters and operation_of(node).product and names:
                products.append(node)
            elif any(len(self._shapes[name]) >= 2 for name in names):
                others.append(node)
        if not products and not others:
            return set()
        # The forward pass numbers its nodes.
        last = max(products or others, key=lambda node: node._sequence_nr())
        names = self._parameters_of(last)
        stack = [last]
        while stack:
            for node, _, _ in self._consumers[stack.pop()]:
                if operation_of(node).view in (View.SAME_ORDER, View.MOVED):
                    stack.append(node)
                elif operation_name(node) == "Add" and products:
                    names |= self._parameters_of(node)
        return names

    def _parameters_of(self, node: Node) -> set[str]:
        """Name the parameters that enter an operation, perhaps transformed, beside the samples."""
        names: set[str] = set()
        stack = [source for source, _ in node.next_functions if source in self.from_parameters]
        name_of_leaf = {leaf: name for name, leaf in self.leaves.items()}
        while stack:
            source = stack.pop()
            if source in name_of_leaf:
                names.add(name_of_leaf[source])
            stack += [further for further, _ in source.next_functions if further is not None]
        return names
