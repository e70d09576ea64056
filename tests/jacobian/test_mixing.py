"""Which operations mix entries, and the groups that they mix."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from skfishermask.jacobian.graph import Graph
from skfishermask.jacobian.mixing import groups_that_mix
from tests.jacobian.common import graph_of, with_parameters
from tests.networks import Net, weight


def groups(module: nn.Module, *shape: int) -> list[tuple[str, tuple[int, ...]]] | None:
    """Names of the operations that mix, with the sizes of their groups for an output of ones."""
    # Behind a parameter: what is computed from inputs alone needs no grouping.
    module = Net(lambda net, x: net.inner(net.scale * x), scale=weight(1), inner=module).double()
    _, graph = graph_of(module, torch.randn(*shape, dtype=torch.float64))
    tensors = [*module.parameters(), *module.buffers()]
    mixing = groups_that_mix(graph, {t.untyped_storage().data_ptr() for t in tensors})
    if mixing is None:
        return None
    return [
        (node.name(), tuple(grouping(torch.ones(node._input_metadata[0].shape)).shape))
        for node, grouping in mixing
    ]


def test_what_mixes_nothing() -> None:
    assert groups(Net(lambda net, x: torch.tanh(x * net.w + net.w), w=weight(5)), 4, 5) == []


def test_a_pool_with_channels_last_mixes_nothing_that_shapes_do_not_decide() -> None:
    def pooled(net: nn.Module, x: Tensor) -> Tensor:
        last = x.contiguous(memory_format=torch.channels_last)
        return torch.nn.functional.adaptive_avg_pool2d(last, 1)

    assert groups(Net(pooled), 4, 3, 5, 5) == []


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], list]] = {
    # By rows: the weight is the same in all batches.
    "linear": (lambda: nn.Linear(5, 3), (4, 5), [("AddmmBackward0", (4, 3))]),
    "weight on the left": (
        lambda: with_parameters(lambda x, w: w @ x.T, (3, 5)),
        (4, 5),
        [("MmBackward0", (4, 3))],
    ),
    "convolution": (lambda: nn.Conv1d(2, 3, 2), (4, 2, 5), [("ConvolutionBackward0", (4, 12))]),
    "softmax": (
        lambda: with_parameters(lambda x, w: (x * w).softmax(1), (5,)),
        (4, 5, 2 + 3),
        [("SoftmaxBackward0", (20, 5))],
    ),
    "layer norm": (
        lambda: nn.LayerNorm([3, 5]),
        (4, 3, 5),
        [("NativeLayerNormBackward0", (4, 15))],
    ),
    "batch norm": (lambda: nn.BatchNorm1d(5).eval(), (4, 5), []),
    "norm of the batch": (
        lambda: nn.BatchNorm1d(5),
        (4, 5),
        [("NativeBatchNormBackward0", (5, 4))],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_groups(name: str) -> None:
    make, shape, expected = CASES[name]
    assert groups(make(), *shape) == expected


def test_groups_hold_what_is_mixed() -> None:
    """An entry of the output depends on one of its group's inputs, and on no other."""
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    w = torch.ones(4, dtype=torch.float64, requires_grad=True)
    # Behind a function: a leaf by itself counts as a parameter.
    outputs = (x.sin() * w).softmax(1)
    [(_, grouping)] = groups_that_mix(Graph(outputs, {"w": w}), set()) or []
    numbers = grouping(torch.arange(24).view(2, 3, 4))
    for group in numbers.tolist():
        [g] = torch.autograd.grad(outputs.flatten()[group[0]], [x], retain_graph=True)
        assert g.flatten().nonzero().flatten().tolist() == sorted(group)


@pytest.mark.parametrize(
    "run",
    [
        lambda x, w: (x * w) @ (x * w).T,  # Both factors are of the samples.
        lambda x, w: (x * w).cumsum(0),  # Not in the table.
        lambda x, w: (x * w)[[0, 2]],  # By values.
    ],
)
def test_shapes_alone_do_not_decide(run: Callable[..., Tensor]) -> None:
    assert groups(with_parameters(run, (5,)), 4, 5) is None


def test_a_product_of_samples_with_each_other_in_turn() -> None:
    def attend(x: Tensor, w: Tensor) -> Tensor:
        h = x * w
        return h @ h.mT

    # Batched: each product has its own entry of the first axis.
    assert groups(with_parameters(attend, (5,)), 4, 3, 5) == [("BmmBackward0", (4, 9))]


def test_what_is_done_to_parameters_alone_is_left_out() -> None:
    module = with_parameters(lambda x, v, w: x * (v @ w).softmax(0), (2,), (2, 5))
    assert groups(module, 4, 5) == []
