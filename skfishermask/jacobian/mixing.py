"""Whether it follows from the shapes of a batch alone which rows belong to which sample.

Where it does, what is found on one batch holds for every batch whose graph has the same
operations on the same shapes. Where rows go by their values (routed experts, packed sequences,
operations that are not in the table), it must be found anew in every batch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from math import prod

from torch import Tensor

from skfishermask.jacobian.graph import Graph
from skfishermask.jacobian.operations import Mixing, Node, operation_of, signed

Grouped = Callable[[Tensor], Tensor]
"""Views the gradient at a node's output as (groups, entries of a group)."""


def groups_that_mix(graph: Graph, constants: Collection[int]) -> list[tuple[Node, Grouped]] | None:
    """Find the operations that mix entries, and what they mix.

    Parameters
    ----------
    graph : Graph
        Of a batch.
    constants : collection of int
        Addresses of what is the same in all batches: the network's parameters and buffers.

    Returns
    -------
    list of (node, callable), or None
        With what views the gradient at the node's output by groups. If each group belongs to one
        sample, it follows from shapes alone which rows belong to which. None: it does not.
    """
    found: list[tuple[Node, Grouped]] = []
    for node in graph.nodes:
        sources = [source for source, _ in node.next_functions if source is not None]
        if graph.from_parameters.issuperset(sources):
            continue  # Behind it there are parameters alone.
        match operation_of(node).mixing:
            case Mixing.NONE:
                continue
            case Mixing.FACTORS:
                grouped = _kept_apart(node, graph, constants)
            case Mixing.SOFTMAX:
                grouped = _without(signed(node._saved_dim))
            case Mixing.LAYER_NORM:
                grouped = _last(prod(node._saved_normalized_shape))
            case Mixing.BATCH_NORM:
                if not node._saved_training:
                    continue
                # Instance normalisation: samples and channels together.
                grouped = _channels
            case Mixing.FIRST_AXIS:
                grouped = _rows
            case None:
                return None
        if grouped is None:
            return None
        found.append((node, grouped))
    return found


def _channels(g: Tensor) -> Tensor:
    return g.movedim(1, 0).flatten(1)


def _rows(g: Tensor) -> Tensor:
    return g.flatten(1)


def _without(axis: int) -> Grouped:
    return lambda g: g.movedim(axis, -1).flatten(0, -2) if g.dim() > 1 else g[None]


def _last(size: int) -> Grouped:
    return lambda g: g.reshape(-1, size)


def _kept_apart(node: Node, graph: Graph, constants: Collection[int]) -> Grouped | None:
    """Say what a matrix product keeps apart: the rows, if the right factor is the network's own."""
    factors = operation_of(node).factors

    def is_own(side: int) -> bool:
        source = node.next_functions[len(node.next_functions) - 2 + side][0]
        if source is not None:
            return source in graph.from_parameters
        value = getattr(node, factors[side])
        return value is not None and value.untyped_storage().data_ptr() in constants

    if is_own(1):
        return lambda g: g.flatten(0, -2)
    if is_own(0):
        return lambda g: g.mT.flatten(0, -2)
    return _rows if node._input_metadata[0].shape[2:] else None
