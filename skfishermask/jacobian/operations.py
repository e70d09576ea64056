"""What is known of PyTorch's operations: a row for those of which the same is known.

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
    """What is known of an operation."""

    view: View | None = None  # where it moves a parameter's entries; None: it is no view
    mixing: Mixing | None = None  # what its output entries depend on; None: on values, or unknown
    # Whether parameters may pass through it before samples come in. Not: what selects entries by
    # values that the graph does not show, such as a table of tokens.
    transform: bool = False
    product: bool = False  # whether it may be an output layer
    factors: tuple[str, ...] = ()  # of a matrix product, the names of what it has saved of them

    @property
    def keeps_parameters_apart(self) -> bool:
        """Whether its output depends on no sample if all its operands are parameters."""
        return self.transform or self.view in (View.SAME_ORDER, View.MOVED, View.EXPANDED)


# What is known, and the operations of which it is known.
_ROWS = (
    (
        Operation(mixing=Mixing.NONE),
        "Abs Addcdiv Addcmul Amax Amin AsStrided Celu Clamp ClampMax ClampMin Cos Elu Erf Gelu Glu "
        "Hardsigmoid Hardswish Hardtanh LeakyRelu Lerp Log Log1P LogSigmoid MaskedFill Max Maximum "
        "Mean Min Minimum Mish NativeDropout Neg PreluKernel Reciprocal Relu Silu Sin Std Var "
        "Where",
    ),
    (
        Operation(mixing=Mixing.NONE, transform=True),
        "Add Div Exp LinalgVectorNorm Mul Norm Pow Rsqrt Sigmoid Softplus Sqrt Sub Sum Tanh",
    ),
    (
        Operation(mixing=Mixing.FIRST_AXIS),
        "AdaptiveAvgPool2D AdaptiveAvgPool3D AdaptiveMaxPool2D AvgPool2D AvgPool3D "
        "MaxPool2DWithIndices MaxPool3DWithIndices NativeGroupNorm ReflectionPad1D ReflectionPad2D "
        "ReplicationPad1D ReplicationPad2D ReplicationPad3D ScaledDotProductCudnnAttention "
        "ScaledDotProductEfficientAttention ScaledDotProductFlashAttention "
        "ScaledDotProductFlashAttentionForCpu UpsampleBilinear2D UpsampleNearest1D "
        "UpsampleNearest2D UpsampleNearest3D",
    ),
    (Operation(mixing=Mixing.LAYER_NORM), "FusedRmsNorm NativeLayerNorm"),
    (Operation(mixing=Mixing.BATCH_NORM), "CudnnBatchNorm NativeBatchNorm"),
    (Operation(mixing=Mixing.SOFTMAX), "LogSoftmax SafeSoftmax"),
    (Operation(mixing=Mixing.SOFTMAX, transform=True), "Softmax"),
    (
        Operation(
            mixing=Mixing.FACTORS,
            transform=True,
            product=True,
            factors=("_saved_self", "_saved_mat2"),
        ),
        "Bmm Mm",
    ),
    (
        Operation(
            mixing=Mixing.FACTORS,
            transform=True,
            product=True,
            factors=("_saved_mat1", "_saved_mat2"),
        ),
        "Addmm",
    ),
    (
        Operation(mixing=Mixing.FACTORS, product=True, factors=("_saved_batch1", "_saved_batch2")),
        "Baddbmm",
    ),
    (Operation(transform=True, product=True), "Mv"),
    (Operation(product=True), "Trilinear"),
    (Operation(mixing=Mixing.FIRST_AXIS, product=True), "Convolution"),
    (Operation(view=View.SAME_ORDER, mixing=Mixing.NONE), "Alias Clone ToCopy"),
    (
        Operation(view=View.MOVED, mixing=Mixing.NONE),
        "Cat ConstantPadNd Diagonal Flip Permute ReshapeAlias Roll Select Slice Split "
        "SplitWithSizes Squeeze Stack T Transpose Tril Triu Unbind UnsafeSplit "
        "UnsafeSplitWithSizes UnsafeView Unsqueeze View",
    ),
    (Operation(view=View.MOVED), "Rot90"),
    (Operation(view=View.EXPANDED, mixing=Mixing.NONE), "Expand Repeat"),
    (Operation(view=View.INDEXED), "Embedding Gather Index IndexSelect"),
    (Operation(transform=True), "WeightNormInterface"),
)
OPERATIONS = {name: operation for operation, names in _ROWS for name in names.split()}
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
