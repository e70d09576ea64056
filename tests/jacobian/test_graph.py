"""The uses of parameters in a graph, and what of it is equal for other batches."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from skfishermask.jacobian.graph import Graph, Signature
from skfishermask.jacobian.isolation import isolated
from skfishermask.jacobian.module_io import call_module
from tests import networks
from tests.jacobian.common import graph_of, with_parameters
from tests.networks import Net


def x_of(n: int) -> torch.Tensor:
    return torch.randn(n, 5, dtype=torch.float64)


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.Linear(5, 3), {("weight", "Addmm", 2, 1), ("bias", "Addmm", 0, 0)}),
        (with_parameters(lambda x, w: torch.tanh(x @ w) @ w, (5, 5)), {("p0", "Mm", 1, 0)}),
        (with_parameters(lambda x, w: x * w[0] + w[1], (2, 5)),
         {("p0", "Mul", 1, 1), ("p0", "Add", 1, 1)}),
        # It may be a view, or a copy for each sample: both are uses.
        (with_parameters(lambda x, w: x * w.expand(len(x), 5), (1, 5)),
         {("p0", "Expand", 0, 0), ("p0", "Mul", 1, 1)}),
        (with_parameters(lambda x, w: x @ w.exp(), (5, 3)), {("p0", "Exp", 0, 0)}),
        (Net(lambda net, x: x, unused=nn.Linear(2, 2)), set()),
    ],
)  # fmt: skip
def test_uses(module: nn.Module, expected: set[tuple[str, str, int, int]]) -> None:
    _, graph = graph_of(module.double(), x_of(4))
    uses = [*graph.uses()]
    found = {(use.name, use.operation, use.operand, len(use.views)) for use in uses}
    assert found == expected
    for use in uses:
        assert use.shape == (
            use.views[-1].shape if use.views else module.get_parameter(use.name).shape
        )


def test_a_parameter_that_is_used_twice_has_two_uses() -> None:
    module = with_parameters(lambda x, w: torch.tanh(x @ w) @ w, (5, 5))
    _, graph = graph_of(module, x_of(4))
    nodes = [use.node for use in graph.uses()]
    assert len({*nodes}) == len(nodes) == 2


def test_signature_is_equal_for_the_same_operations_on_the_same_shapes() -> None:
    module = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    first, second, shorter = (graph_of(module, x_of(n))[1].signature() for n in (4, 4, 3))
    assert first == second
    assert hash(first) == hash(second)
    assert first != shorter
    assert first.structure == shorter.structure
    relu = nn.Sequential(module[0], nn.ReLU(), module[2])
    assert graph_of(relu, x_of(4))[1].signature() != first


def test_signatures_are_alike_for_another_number_of_samples() -> None:
    module = nn.Sequential(nn.Linear(5, 6), nn.Unflatten(1, (2, 3)), nn.Flatten(0, 1)).double()
    four, three = (graph_of(module, x_of(n))[1].signature() for n in (4, 3))
    assert four.is_alike(three)
    assert four.is_alike(four)
    other_shape = nn.Sequential(module[0], nn.Unflatten(1, (3, 2)), module[2])
    assert not four.is_alike(graph_of(other_shape, x_of(3))[1].signature())
    other_operation = nn.Sequential(module[0], nn.Tanh(), *module[1:])
    assert not four.is_alike(graph_of(other_operation, x_of(3))[1].signature())


def test_kind_of_a_use_depends_on_options() -> None:
    x = torch.randn(4, 2, 8, dtype=torch.float64)
    kinds = [
        [use.kind for use in graph_of(nn.Conv1d(2, 3, 2, stride).double(), x)[1].uses()]
        for stride in (1, 1, 2)
    ]
    assert kinds[0] == kinds[1]
    assert not {*kinds[0]} & {*kinds[2]}


def test_nodes_that_compute_from_parameters_alone() -> None:
    module = with_parameters(lambda x, v, w: x @ (v @ w).exp(), (5, 2), (2, 3))
    _, graph = graph_of(module, x_of(4))
    own = {node.name() for node in graph.from_parameters if not hasattr(node, "variable")}
    assert own == {"ExpBackward0", "MmBackward0"}
    # The product with the samples is not among them.
    assert graph.nodes[0] not in graph.from_parameters


def test_outputs_without_a_graph() -> None:
    graph = Graph(torch.zeros(2, 3), {"w": torch.zeros(2, requires_grad=True)})
    assert [*graph.uses()] == []
    assert graph.output_layer() == set()


@pytest.mark.parametrize("name", ["mobilenet", "gru", "decoder_sequence_first", "bag_mean", "tied"])
def test_signature_and_uses_where_some_of_the_parameters_alone_take_part(name: str) -> None:
    make, sample = networks.NETWORKS[name]
    module, x = make(), sample(3)
    parameters = dict(module.named_parameters())

    def read(names: list[str]) -> tuple[Signature, list[tuple[str, str, int]]]:
        some = {name: parameters[name] for name in names}
        with isolated(module, some.values()):
            graph = Graph(call_module(module, x, None), some)
        return graph.signature(), [(use.name, use.operation, use.operand) for use in graph.uses()]

    names = [*parameters]
    signature, uses = read(names)
    for some in (names, names[::2], names[-1:]):
        restricted, used = read(some)
        assert signature.restricted(frozenset(some)) == restricted
        assert [use for use in uses if use[0] in some] == used
