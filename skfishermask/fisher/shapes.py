"""Whether it follows from the shapes of a batch alone which rows belong to which sample.

Where it does, what is found on one batch holds for every batch whose graph has the same
operations on the same shapes. Where rows go by their values (routed experts, packed sequences,
whatever is not listed here), it must be found anew in every batch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from math import prod

from torch import Tensor

from skfishermask.fisher.graph import Graph, Node, operation_name, signed

# Each input entry's gradient comes from output entries at places that shapes alone decide.
_PLACED = {
    *("Abs", "Add", "Addcdiv", "Addcmul", "Alias", "Amax", "Amin", "Cat", "Celu", "Clamp"),
    *("ClampMax", "ClampMin", "Clone", "ConstantPadNd", "Cos", "Diagonal", "Div", "Elu", "Erf"),
    *("Exp", "Expand", "Flip", "Gelu", "Glu", "Hardsigmoid", "Hardswish", "Hardtanh", "LeakyRelu"),
    *("Lerp", "LinalgVectorNorm", "Log", "Log1P", "LogSigmoid", "MaskedFill", "Max", "Maximum"),
    *("Mean", "Min", "Minimum", "Mish", "Mul", "NativeDropout", "Neg", "Norm", "Permute", "Pow"),
    *("PreluKernel", "Reciprocal", "Relu", "Repeat", "ReshapeAlias", "Roll", "Rsqrt", "Select"),
    *("Sigmoid", "Silu", "Sin", "Slice", "Softplus", "Split", "SplitWithSizes", "Sqrt", "Squeeze"),
    *("Stack", "Std", "Sub", "Sum", "T", "Tanh", "ToCopy", "Transpose", "Tril", "Triu", "Unbind"),
    *("UnsafeSplit", "UnsafeSplitWithSizes", "UnsafeView", "Unsqueeze", "Var", "View", "Where"),
}
# Entries mix, but none with those of another index of the first axis.
_FIRST_AXIS = {
    *("AdaptiveAvgPool2D", "AdaptiveAvgPool3D", "AdaptiveMaxPool2D", "AvgPool2D", "AvgPool3D"),
    *("Convolution", "MaxPool2DWithIndices", "MaxPool3DWithIndices"),
    *("NativeGroupNorm", "ReflectionPad1D", "ReflectionPad2D", "ReplicationPad1D"),
    *("ReplicationPad2D", "ReplicationPad3D", "ScaledDotProductCudnnAttention"),
    *("ScaledDotProductEfficientAttention", "ScaledDotProductFlashAttention"),
    *("ScaledDotProductFlashAttentionForCpu", "UpsampleBilinear2D", "UpsampleNearest1D"),
    *("UpsampleNearest2D", "UpsampleNearest3D"),
}

# Matrix products, and where they have saved their factors.
_FACTORS = {
    "Addmm": ("_saved_mat1", "_saved_mat2"),
    "Baddbmm": ("_saved_batch1", "_saved_batch2"),
    "Bmm": ("_saved_self", "_saved_mat2"),
    "Mm": ("_saved_self", "_saved_mat2"),
}

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
        name = operation_name(node)
        if name in _FACTORS:
            grouped = _kept_apart(node, graph, constants)
            if grouped is None:
                return None
            found.append((node, grouped))
        elif name in ("Softmax", "LogSoftmax", "SafeSoftmax"):
            found.append((node, _without(signed(node._saved_dim))))
        elif name in ("NativeLayerNorm", "FusedRmsNorm"):
            found.append((node, _last(prod(node._saved_normalized_shape))))
        elif name in ("NativeBatchNorm", "CudnnBatchNorm"):
            if node._saved_training:  # Instance normalisation: samples and channels together.
                found.append((node, lambda g: g.movedim(1, 0).flatten(1)))
        elif name in _FIRST_AXIS:
            found.append((node, lambda g: g.flatten(1)))
        elif name not in _PLACED:
            return None
    return found


def _without(axis: int) -> Grouped:
    return lambda g: g.movedim(axis, -1).flatten(0, -2) if g.dim() > 1 else g[None]


def _last(size: int) -> Grouped:
    return lambda g: g.reshape(-1, size)


def _kept_apart(node: Node, graph: Graph, constants: Collection[int]) -> Grouped | None:
    """Say what a matrix product keeps apart: the rows, if the right factor is the network's own."""
    name = operation_name(node)
    factors = _FACTORS[name]

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
    return (lambda g: g.flatten(1)) if name in ("Bmm", "Baddbmm") else None
