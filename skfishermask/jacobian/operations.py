"""What is known of PyTorch's operations: one row each.

An operation without a row is read correctly, too: samples are then located anew in every batch, and
no parameter is seen through it. The gradients of operands are functions of
:mod:`skfishermask.jacobian.rules`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, Protocol

from torch import Tensor

# Names that autograd gives to the nodes of PyTorch's own operations; a user's have no number.
_NODE_NAME = re.compile(r"(\w+)Backward\d+")


class Node(Protocol):
    """A node of the autograd graph, with what its operation saved as attributes."""

    @property
    def next_functions(self) -> tuple[tuple[Node | None, int], ...]:
        """The node that computed each operand, and which of its outputs the operand is."""

    def name(self) -> str:
        """Return the name of the operation's gradient."""

    def __call__(self, *gradients: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Return the gradients of the operands, from those of the outputs."""

    def __getattr__(self, name: str) -> Any:
        """Return a saved value: each operation, of PyTorch or a user, has its own, of any type."""


class View(Enum):
    """Where an operation moves a parameter's entries to in its output."""

    SAME_ORDER = auto()
    """All entries once, in order; the dtype may change."""
    MOVED = auto()
    """Each entry at most once: calling the node with positions shows where each one went."""
    EXPANDED = auto()
    """Each entry several times, as shapes decide. There are rules for one copy a sample."""
    INDEXED = auto()
    """Entries as the values of an index decide. There are rules for one copy a sample."""


class Mixing(Enum):
    """Which entries of an operation's output depend on one entry of its input."""

    NONE = auto()
    """Those at positions that shapes alone decide."""
    FIRST_AXIS = auto()
    """Those of the same index along the first axis."""
    FACTORS = auto()
    """Those of a row of the left factor, or of a column of the right one."""
    SOFTMAX = auto()
    """Those along the axis that is normalised."""
    LAYER_NORM = auto()
    """Those along the last axes, which are normalised."""
    BATCH_NORM = auto()
    """In training mode those of the same channel, else itself."""


@dataclass(frozen=True)
class Operation:
    """What is known of an operation.

    Attributes
    ----------
    view : View or None
        Where it moves a parameter's entries; None: it is no view.
    mixing : Mixing or None
        What its output entries depend on; None: on values, or unknown.
    transform : bool
        Whether parameters may pass through it before samples come in. Not: what selects entries by
        values that the graph does not show, such as a table of tokens.
    product : bool
        Whether it may be an output layer.
    factors : tuple of str
        For a matrix product, the attributes in which the node has saved its factors.
    """

    view: View | None = None
    mixing: Mixing | None = None
    transform: bool = False
    product: bool = False
    factors: tuple[str, ...] = ()

    @property
    def keeps_parameters_apart(self) -> bool:
        """Whether its output depends on no sample if all its operands are parameters."""
        return self.transform or self.view in (View.SAME_ORDER, View.MOVED, View.EXPANDED)


OPERATIONS = {
    "Abs": Operation(mixing=Mixing.NONE),
    "AdaptiveAvgPool2D": Operation(mixing=Mixing.FIRST_AXIS),
    "AdaptiveAvgPool3D": Operation(mixing=Mixing.FIRST_AXIS),
    "AdaptiveMaxPool2D": Operation(mixing=Mixing.FIRST_AXIS),
    "Add": Operation(mixing=Mixing.NONE, transform=True),
    "Addcdiv": Operation(mixing=Mixing.NONE),
    "Addcmul": Operation(mixing=Mixing.NONE),
    "Addmm": Operation(
        mixing=Mixing.FACTORS, transform=True, product=True, factors=("_saved_mat1", "_saved_mat2")
    ),
    "Alias": Operation(view=View.SAME_ORDER, mixing=Mixing.NONE),
    "Amax": Operation(mixing=Mixing.NONE),
    "Amin": Operation(mixing=Mixing.NONE),
    "AvgPool2D": Operation(mixing=Mixing.FIRST_AXIS),
    "AvgPool3D": Operation(mixing=Mixing.FIRST_AXIS),
    "Baddbmm": Operation(
        mixing=Mixing.FACTORS, product=True, factors=("_saved_batch1", "_saved_batch2")
    ),
    "Bmm": Operation(
        mixing=Mixing.FACTORS, transform=True, product=True, factors=("_saved_self", "_saved_mat2")
    ),
    "Cat": Operation(view=View.MOVED, mixing=Mixing.NONE),
    "Celu": Operation(mixing=Mixing.NONE),
    "Clamp": Operation(mixing=Mixing.NONE),
    "ClampMax": Operation(mixing=Mixing.NONE),
    "ClampMin": Operation(mixing=Mixing.NONE),
    "Clone": Operation(view=View.SAME_ORDER, mixing=Mixing.NONE),
    "ConstantPadNd": Operation(view=View.MOVED, mixing=Mixing.NONE),
    "Convolution": Operation(mixing=Mixing.FIRST_AXIS, product=True),
    "Cos": Operation(mixing=Mixing.NONE),
    "CudnnBatchNorm": Operation(mixing=Mixing.BATCH_NORM),
    "Diagonal": Operation(view=View.MOVED, mixing=Mixing.NONE),
    "Div": Operation(mixing=Mixing.NONE, transform=True),
    "Elu": Operation(mixing=Mixing.NONE),
    "Embedding": Operation(view=View.INDEXED),
    "Erf": Operation(mixing=Mixing.NONE),
    "Exp": Operation(mixing=Mixing.NONE, transform=True),
    "Expand": Operation(view=View.EXPANDED, mixing=Mixing.NONE),
    "Flip": Operation(view=View.MOVED, mixing=Mixing.NONE),
    "FusedRmsNorm": Operation(mixing=Mixing.LAYER_NORM),
    "Gather": Operation(view=View.INDEXED),
    "Gelu": Operation(mixing=Mixing.NONE),
    "Glu": Operation(mixing=Mixing.NONE),
    "Hardsigmoid": Operation(mixing=Mixing.NONE),
    "Hardswish": Operation(mixing=Mixing.NONE),
    "Hardtanh": Operation(mixing=Mixing.NONE),
    "Index": Operation(view=View.INDEXED),
    "IndexSelect": Operation(view=View.INDEXED),
    "LeakyRelu": Operation(mixing=Mixing.NONE),
    "Lerp": Operation(mixing=Mixing.NONE),
    "LinalgVectorNorm": Operation(mixing=Mixing.NONE, transform=True),
    "Log": Operation(mixing=Mixing.NONE),
    "Log1P": Operation(mixing=Mixing.NONE),
    "LogSigmoid": Operation(mixing=Mixing.NONE),
    "LogSoftmax": Operation(mixing=Mixing.SOFTMAX),
    "MaskedFill": Operation(mixing=Mixing.NONE),
    "Max": Operation(mixing=Mixing.NONE),
    "MaxPool2DWithIndices": Operation(mixing=Mixing.FIRST_AXIS),
    "MaxPool3DWithIndices": Operation(mixing=Mixing.FIRST_AXIS),
    "Maximum": Operation(mixing=Mixing.NONE),
    "Mean": Operation(mixing=Mixing.NONE),
    "Min": Operation(mixing=Mixing.NONE),
    "Minimum": Operation(mixing=Mixing.NONE),
    "Mish": Operation(mixing=Mixing.NONE),
    "Mm": Operation(
        mixing=Mixing.FACTORS, transform=True, product=True, factors=("_saved_self", "_saved_mat2")
    ),
    "Mul": Operation(mixing=Mixing.NONE, transform=True),
    "Mv": Operation(transform=True, product=True),
    "NativeBatchNorm": Operation(mixing=Mixing.BATCH_NORM),
    "NativeDropout": Operation(mixing=Mixing.NONE),
    "NativeGroupNorm": Operation(mixing=Mixing.FIRST_AXIS),
    "NativeLayerNorm": Operation(mixing=Mixing.LAYER_NORM),
    "Neg": Operation(mixing=Mixing.NONE),
    "Norm": Operation(mixing=Mixing.NONE, transform=True),
    "Permute": Operation(view=View.MOVED, mixing=Mixing.NONE),
    "Pow": Operation(mixing=Mixing.NONE, transform=True),
    "PreluKernel": Operation(mixing=Mixing.NONE),
    "Reciprocal": Operation(mixing=Mixing.NONE),
    "ReflectionPad1D": Operation(mixing=Mixing.FIRST_AXIS),
    "ReflectionPad2D": Operation(mixing=Mixing.FIRST_AXIS),
    "Relu": Operation(mixing=Mixing.NONE),
    "Repeat": Operation(view=View.EXPANDED, mixing=Mixing.NONE),
    "ReplicationPad1D": Operation(mixing=Mixing.FIRST_AXIS),
    "ReplicationPad2D": Operation(mixing=Mixing.FIRST_AXIS),
    "ReplicationPad3D": Operation(mixing=Mixing.FIRST_AXIS),
    "ReshapeAlias": Operation(view=View.MOVED, mixing=Mixing.NONE),
    "Roll": Operation(view=View.MOVED, mixing=Mixing.NONE),
    "Rot90": Operation(view=View.MOVED),
    "Rsqrt": Operation(mixing=Mixing.NONE, transform=True),
    "SafeSoftmax": Operation(mixing=Mixing.SOFTMAX),
    "ScaledDotProductCudnnAttention": Operation(mixing=Mixing.FIRST_AXIS),
    "ScaledDotProductEfficientAttention": Operation(mixing=Mixing.FIRST_AXIS),
    "ScaledDotProductFlashAttention": Operation(mixing=Mixing.FIRST_AXIS),
    "ScaledDotProductFlashAttentionForCpu": Operation(mixing=Mixing.FIRST_AXIS),
    "Select": Operation(view=View.MOVED, mixing=Mixing.NONE),
    "Sigmoid": Operation(mixing=Mixing.NONE, transform=True),
    "Silu": Operation(mixing=Mixing.NONE),
    "Sin": Operation(mixing=Mixing.NONE),
    "Slice": Operation(view=View.MOVED, mixing=Mixing.NONE),
    "Softmax": Operation(mixing=Mixing.SOFTMAX, transform=True),
    "Softplus": Operation(mixing=Mixing.NONE, transform=True),
    "Split": Operation(view=View.MOVED, mixing=Mixing.NONE),
    "SplitWithSizes": Operation(view=View.MOVED, mixing=Mixing.NONE),
    "Sqrt": Operation(mixing=Mixing.NONE, transform=True),
    "Squeeze": Operation(view=View.MOVED, mixing=Mixing.NONE),
    "Stack": Operation(view=View.MOVED, mixing=Mixing.NONE),
    "Std": Operation(mixing=Mixing.NONE),
    "Sub": Operation(mixing=Mixing.NONE, transform=True),
    "Sum": Operation(mixing=Mixing.NONE, transform=True),
    "T": Operation(view=View.MOVED, mixing=Mixing.NONE),
    "Tanh": Operation(mixing=Mixing.NONE, transform=True),
    "ToCopy": Operation(view=View.SAME_ORDER, mixing=Mixing.NONE),
    "Transpose": Operation(view=View.MOVED, mixing=Mixing.NONE),
    "Tril": Operation(view=View.MOVED, mixing=Mixing.NONE),
    "Trilinear": Operation(product=True),
    "Triu": Operation(view=View.MOVED, mixing=Mixing.NONE),
    "Unbind": Operation(view=View.MOVED, mixing=Mixing.NONE),
    "UnsafeSplit": Operation(view=View.MOVED, mixing=Mixing.NONE),
    "UnsafeSplitWithSizes": Operation(view=View.MOVED, mixing=Mixing.NONE),
    "UnsafeView": Operation(view=View.MOVED, mixing=Mixing.NONE),
    "Unsqueeze": Operation(view=View.MOVED, mixing=Mixing.NONE),
    "UpsampleBilinear2D": Operation(mixing=Mixing.FIRST_AXIS),
    "UpsampleNearest1D": Operation(mixing=Mixing.FIRST_AXIS),
    "UpsampleNearest2D": Operation(mixing=Mixing.FIRST_AXIS),
    "UpsampleNearest3D": Operation(mixing=Mixing.FIRST_AXIS),
    "Var": Operation(mixing=Mixing.NONE),
    "View": Operation(view=View.MOVED, mixing=Mixing.NONE),
    "WeightNormInterface": Operation(transform=True),
    "Where": Operation(mixing=Mixing.NONE),
}
_UNKNOWN = Operation()


def operation_name(node: Node) -> str:
    """Return the name of the operation that a node belongs to, for messages and lookups."""
    name: str = node.name().rsplit("::", 1)[-1]
    return name.split("Backward")[0] or name


def operation_of(node: Node) -> Operation:
    """Return what is known of a node's operation."""
    matched = _NODE_NAME.fullmatch(node.name())
    return OPERATIONS.get(matched.group(1), _UNKNOWN) if matched else _UNKNOWN


def signed(number: int) -> int:
    """Return the signed number that a node has saved as an unsigned one."""
    return number - 2**64 if number >= 2**63 else number
