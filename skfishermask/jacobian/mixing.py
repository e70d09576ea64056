"""Whether the shapes of a batch alone decide which rows belong to which sample.

Where they do, what is found on one batch holds for every batch with the same operations on the same
shapes. Where values decide (routed experts, packed sequences, operations that are not in the
table), samples are located anew in every batch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from math import prod

from torch import Tensor

from skfishermask.jacobian.graph import Graph
from skfishermask.jacobian.operations import Mixing, Node, operation_of, signed

Grouping = Callable[[Tensor], Tensor]
"""Maps the gradient at a node's output to (groups, entries of a group)."""


def groups_that_mix(graph: Graph, constants: Collection[int]) -> list[tuple[Node, Grouping]] | None:
    """Find the operations that mix entries, and the groups of entries that they mix.

    If each group belongs to one sample, shapes alone decide which rows belong to which sample; None
    is returned where values may. `constants` are the addresses of tensors that are the same in all
    batches: the network's parameters and buffers.
    """
    mixing: list[tuple[Node, Grouping]] = []
    for node in graph.nodes:
        sources = [source for source, _ in node.next_functions if source is not None]
        if graph.from_parameters.issuperset(sources):
            continue  # It computes from parameters alone.
        match operation_of(node).mixing:
            case Mixing.NONE:
                continue
            case Mixing.FACTORS:
                grouping = _factors(node, graph, constants)
            case Mixing.SOFTMAX:
                grouping = _along(signed(node._saved_dim))
            case Mixing.LAYER_NORM:
                grouping = _along_last(prod(node._saved_normalized_shape))
            case Mixing.BATCH_NORM:
                if not node._saved_training:
                    continue
                # Instance normalisation: samples and channels together.
                grouping = _channels
            case Mixing.FIRST_AXIS:
                grouping = _rows
            case None:
                return None
        if grouping is None:
            return None
        mixing.append((node, grouping))
    return mixing


def _channels(g: Tensor) -> Tensor:
    return g.movedim(1, 0).flatten(1)


def _rows(g: Tensor) -> Tensor:
    return g.flatten(1)


def _along(axis: int) -> Grouping:
    return lambda g: g.movedim(axis, -1).flatten(0, -2) if g.dim() > 1 else g[None]


def _along_last(size: int) -> Grouping:
    return lambda g: g.reshape(-1, size)


def _factors(node: Node, graph: Graph, constants: Collection[int]) -> Grouping | None:
    """Return the grouping of a matrix product: by rows, if the right factor is the network's own.

    None: both factors depend on the batch.
    """
    factors = operation_of(node).factors

    def is_constant(side: int) -> bool:
        source = node.next_functions[len(node.next_functions) - 2 + side][0]
        if source is not None:
            return source in graph.from_parameters
        value = getattr(node, factors[side])
        return value is not None and value.untyped_storage().data_ptr() in constants

    if is_constant(1):
        return lambda g: g.flatten(0, -2)
    if is_constant(0):
        return lambda g: g.mT.flatten(0, -2)
    return _rows if node._input_metadata[0].shape[2:] else None
