"""Per-sample gradients of an operand, from the gradient at its operation's output.

A rule returns, for one operation and one of its operands, the :mod:`form
<skfishermask.jacobian.gradient_forms>` of the gradient of the operand's entries.

To add a rule, write a function of the node and the operand's shape, and register it under the
node's name and the operand's number. The number in the node's name tells variants apart: the
exponent of ``PowBackward0`` is a number, of ``PowBackward1`` a tensor. What autograd has saved for
the node are its attributes ``_saved_...``. The rest that is known of an operation is its row in
:mod:`skfishermask.jacobian.operations`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from skfishermask.jacobian.gradient_forms import (
    BroadcastGrad,
    EmbeddingGrad,
    Features,
    Form,
    OuterProductGrad,
)
from skfishermask.jacobian.graph import Use
from skfishermask.jacobian.operations import Node, operation_of, signed

Rule = Callable[[Node, torch.Size], Form | None]
RULES: dict[tuple[str, int], Rule] = {}


def rule(*operands: tuple[str, int]) -> Callable[[Rule], Rule]:
    """Register a rule for operands: pairs of a node's name and an operand's number."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(operands, function))
        return function

    return register


def form_of(use: Use) -> Form | None:
    """Return the form of a use's gradient; None: no rule covers it."""
    registered = RULES.get((use.node.name(), use.operand))
    return registered(use.node, use.shape) if registered else None


def _select(t: Tensor, features: Features) -> Tensor:
    return t if features is None else t.index_select(1, features)


def _output_shape(node: Node) -> torch.Size:
    return torch.Size(node._input_metadata[0].shape)


def _channels(node: Node, shape: torch.Size) -> tuple[int, ...]:
    """Return the shape of an operand of channels, with as many axes as the output."""
    return (1, *shape, *[1] * (len(_output_shape(node)) - 2))


# Matrix products


def _factor(node: Node, shape: torch.Size, side: int) -> OuterProductGrad:
    """Return the form of the left (0) or right (1) factor of a product, in groups or not."""
    groups, left, right = shape if len(shape) == 3 else (1, *shape)
    scale = getattr(node, "_saved_alpha", 1)

    def rows(t: Tensor) -> Tensor:
        t = t if t.dim() == 3 else t[None]
        return (t.transpose(0, 1) if side == 1 else t.permute(2, 0, 1)).flatten(1)

    x = rows(getattr(node, operation_of(node).factors[1 - side]))
    return OuterProductGrad(
        groups,
        left,
        right,
        lambda features: _select(x, features)[..., None],
        lambda g, features: _select(rows(g if scale == 1 else g * scale), features)[..., None],
        saved_is_left=side == 1,
    )


@rule(("MmBackward0", 0), ("AddmmBackward0", 1), ("BmmBackward0", 0), ("BaddbmmBackward0", 1))
def _left_factor(node: Node, shape: torch.Size) -> Form:
    return _factor(node, shape, 0)


@rule(("MmBackward0", 1), ("AddmmBackward0", 2), ("BmmBackward0", 1), ("BaddbmmBackward0", 2))
def _right_factor(node: Node, shape: torch.Size) -> Form:
    return _factor(node, shape, 1)


@rule(("TrilinearBackward0", 1))
def _bilinear(node: Node, shape: torch.Size) -> Form | None:
    if (node._saved_expand1, node._saved_expand3) != ((1, 3), (1, 2)):  # nn.Bilinear's axes.
        return None
    x = (node._saved_i1[:, :, None] * node._saved_i3[:, None, :]).flatten(1)
    return OuterProductGrad(
        1,
        shape[0],
        shape[1:].numel(),
        lambda features: _select(x, features)[..., None],
        lambda g, features: _select(g.flatten(1), features)[..., None],
        saved_is_left=False,
    )


@rule(("MvBackward0", 1))
def _mv_vector(node: Node, shape: torch.Size) -> Form:
    # (rows, in) @ (in,)
    return BroadcastGrad((1, *shape), lambda: node._saved_self, lambda g: g[:, None])


# Convolutions


def _windows(x: Tensor, node: Node, kernel: Sequence[int]) -> Tensor:
    """Return a view of all windows of an input: (n, channels, *positions, *kernel)."""
    padding = [p for p in reversed(node._saved_padding) for _ in range(2)]
    x = F.pad(x, padding) if any(padding) else x
    for d, size in enumerate(kernel):
        dilation, stride = node._saved_dilation[d], node._saved_stride[d]
        x = x.unfold(2 + d, (size - 1) * dilation + 1, stride)[..., ::dilation]
    return x


def _columns(
    x: Tensor, node: Node, kernel: Sequence[int], features: Features, positions: Sequence[int] = ()
) -> Tensor:
    """Return columns of the (first) windows, counted by channel and position in the kernel."""
    n_axes = len(kernel)
    x = _windows(x, node, kernel)
    for d, length in enumerate(positions):
        x = x.narrow(2 + d, 0, length)
    x = x.movedim(tuple(range(-n_axes, 0)), tuple(range(2, 2 + n_axes)))
    taps = x.shape[1 : 2 + n_axes]
    if features is None:
        return x.reshape(len(x), prod(taps), -1)
    index: list[slice | Tensor] = [slice(None), *torch.unravel_index(features, taps)]
    return x[tuple(index)].flatten(2)


@rule(("ConvolutionBackward0", 1))
def _convolution(node: Node, shape: torch.Size) -> Form:
    x, groups, kernel = node._saved_input, node._saved_groups, shape[2:]
    left, right = shape[0] // groups, shape[1:].numel()
    if node._saved_transposed:
        # The roles of input and output are exchanged. Output padding may add further windows.
        def windows(g: Tensor, features: Features) -> Tensor:
            return _columns(g, node, kernel, features, x.shape[2:])

        return OuterProductGrad(
            groups, left, right, lambda features: _select(x.flatten(2), features), windows
        )

    def blocks() -> Tensor:
        # Channels last in memory: windows are then copied in long runs.
        channels_last = x.movedim(1, -1).contiguous().movedim(-1, 1)
        windows: Tensor = _windows(channels_last, node, kernel).unflatten(1, (groups, -1))
        n_axes = len(kernel)
        windows = windows.movedim((1, 2), (1 + n_axes, -1))
        return windows.reshape(len(x), windows.shape[1 : 1 + n_axes].numel(), groups, -1)

    return OuterProductGrad(
        groups,
        left,
        right,
        lambda features: _columns(x, node, kernel, features),
        lambda g, features: _select(g.flatten(2), features),
        saved_is_left=False,
        saved_blocks=blocks,
        restore_order=lambda t: t.view(shape[0], *kernel, -1).movedim(-1, 1),
    )


# Sums and products that broadcast


def _broadcast(
    node: Node, shape: torch.Size, factor: Callable[[], Tensor] | None = None, scale: float = 1.0
) -> BroadcastGrad:
    """Return the form of an operand that is broadcast, if only to a sample's own output."""
    ones = [1] * (len(_output_shape(node)) - len(shape))
    return BroadcastGrad((1, *ones, *shape), factor, lambda g: g[None], scale)


@rule(
    ("AddBackward0", 0),
    ("SubBackward0", 0),
    ("AddcmulBackward0", 0),
    ("ExpandBackward0", 0),
    ("NativeLayerNormBackward0", 2),
)
def _added(node: Node, shape: torch.Size) -> Form:
    return _broadcast(node, shape)


@rule(
    ("ConvolutionBackward0", 2),
    ("NativeBatchNormBackward0", 2),
    ("CudnnBatchNormBackward0", 2),
    ("NativeGroupNormBackward0", 2),
)
def _added_to_channels(node: Node, shape: torch.Size) -> Form:
    return BroadcastGrad(_channels(node, shape))


@rule(("AddBackward0", 1))
def _added_scaled(node: Node, shape: torch.Size) -> Form:
    return _broadcast(node, shape, scale=node._saved_alpha)


@rule(("SubBackward0", 1))
def _subtracted(node: Node, shape: torch.Size) -> Form:
    return _broadcast(node, shape, scale=-node._saved_alpha)


@rule(("AddmmBackward0", 0), ("BaddbmmBackward0", 0))
def _product_bias(node: Node, shape: torch.Size) -> Form:
    return _broadcast(node, shape, scale=node._saved_beta)


@rule(("MulBackward0", 0))
def _multiplied(node: Node, shape: torch.Size) -> Form:
    return _broadcast(node, shape, lambda: node._saved_other)


@rule(("MulBackward0", 1))
def _multiplier(node: Node, shape: torch.Size) -> Form:
    return _broadcast(node, shape, lambda: node._saved_self)


@rule(("DivBackward0", 0))
def _divided(node: Node, shape: torch.Size) -> Form:
    return _broadcast(node, shape, lambda: 1 / node._saved_other)


@rule(("AddcmulBackward0", 1))
def _addcmul_left(node: Node, shape: torch.Size) -> Form:
    return _broadcast(node, shape, lambda: node._saved_tensor2, scale=node._saved_value)


@rule(("AddcmulBackward0", 2))
def _addcmul_right(node: Node, shape: torch.Size) -> Form:
    return _broadcast(node, shape, lambda: node._saved_tensor1, scale=node._saved_value)


@rule(("PreluKernelBackward0", 1))
def _prelu(node: Node, shape: torch.Size) -> Form:
    return _broadcast(node, shape, lambda: node._saved_self.clamp(max=0))


@rule(("RepeatBackward0", 0))
def _repeated(node: Node, shape: torch.Size) -> Form:
    repeats = node._saved_repeats
    sizes = (*[1] * (len(repeats) - len(shape)), *shape)
    # Along each axis, copies of the operand's axis follow one another.
    pairs = [number for pair in zip(repeats, sizes, strict=True) for number in pair]
    return BroadcastGrad(
        tuple(number for size in sizes for number in (1, size)), view=lambda g: g.reshape(pairs)
    )


# Normalisations


@rule(("NativeBatchNormBackward0", 1), ("CudnnBatchNormBackward0", 1))
def _batch_norm_weight(node: Node, shape: torch.Size) -> Form | None:
    if node._saved_training:
        return None
    sizes = _channels(node, shape)

    def normalized() -> Tensor:
        mean, variance = node._saved_running_mean, node._saved_running_var
        scale: Tensor = (variance + node._saved_eps).rsqrt().view(sizes)
        x: Tensor = scale * (node._saved_input - mean.view(sizes))
        return x

    return BroadcastGrad(sizes, normalized)


@rule(("NativeLayerNormBackward0", 1))
def _layer_norm_weight(node: Node, shape: torch.Size) -> Form:
    def normalized() -> Tensor:
        centred: Tensor = node._saved_input - node._saved_result1
        return centred.mul_(node._saved_result2)  # One over the standard deviation.

    return _broadcast(node, shape, normalized)


@rule(("FusedRmsNormBackward0", 1))
def _rms_norm_weight(node: Node, shape: torch.Size) -> Form:
    return _broadcast(node, shape, lambda: node._saved_input * node._saved_result1)


@rule(("NativeGroupNormBackward0", 1))
def _group_norm_weight(node: Node, shape: torch.Size) -> Form:
    output = _output_shape(node)

    def normalized() -> Tensor:
        x: Tensor = node._saved_input.reshape(node._saved_N, node._saved_group, -1)
        x = (x - node._saved_result1[:, :, None]) * node._saved_result2[:, :, None]
        return x.view(output)

    return BroadcastGrad(_channels(node, shape), normalized)


# Tables


def _table(
    node: Node, shape: torch.Size, ids: Tensor, padding: int, rows: Callable[[Tensor], Tensor]
) -> EmbeddingGrad:
    ids, dtype = ids.flatten(), node._input_metadata[0].dtype
    if padding >= 0:
        ids = torch.where(ids == padding, -1, ids)

    def one_hot(features: Features) -> Tensor:
        if features is None:
            features = torch.arange(shape[0], device=ids.device)
        return (ids[:, None] == features).to(dtype)[..., None]

    return EmbeddingGrad(
        1,
        shape[0],
        shape[1:].numel(),
        one_hot,
        lambda g, features: _select(rows(g), features)[..., None],
        ids=ids,
    )


@rule(("EmbeddingBackward0", 0))
def _embedding(node: Node, shape: torch.Size) -> Form:
    padding = signed(node._saved_padding_idx)
    return _table(node, shape, node._saved_indices, padding, lambda g: g.reshape(-1, g.shape[-1]))


@rule(("IndexBackward0", 0))
def _indexed(node: Node, shape: torch.Size) -> Form | None:
    ids = node._saved_indices
    if len(ids) != 1 or ids[0] is None or ids[0].dtype == torch.bool:
        return None
    ids = torch.where(ids[0] < 0, ids[0] + shape[0], ids[0])
    columns = shape[1:].numel()
    return _table(node, shape, ids, -1, lambda g: g.reshape(-1, columns))


@rule(("IndexSelectBackward0", 0))
def _selected(node: Node, shape: torch.Size) -> Form | None:
    if signed(node._saved_dim) not in (0, -len(shape)):
        return None
    return _table(node, shape, node._saved_index, -1, lambda g: g.flatten(1))


@rule(("EmbeddingBagBackward0", 0))
def _embedding_bag(node: Node, shape: torch.Size) -> Form | None:
    mode, padding = node._saved_mode, signed(node._saved_padding_idx)
    if mode not in (0, 1):  # The sum and the mean; the maximum differs by column.
        return None
    ids, offsets, weights = node._saved_indices, node._saved_offsets, node._saved_per_sample_weights
    n_bags = _output_shape(node)[0]
    positions = torch.arange(len(ids), device=ids.device)
    # Beside the first position of each bag, offsets may end in the number of all.
    bag = torch.searchsorted(offsets[:n_bags].contiguous(), positions, right=True) - 1
    weight = None if weights is None else weights[:, None]
    if mode == 1:
        sizes = torch.bincount(bag[ids != padding], minlength=n_bags)
        weight = 1 / sizes.clamp(min=1)[bag, None].double()

    def rows(g: Tensor) -> Tensor:
        g = g[bag]
        return g if weight is None else g * weight.to(g.dtype)

    return _table(node, shape, ids, padding, rows)
