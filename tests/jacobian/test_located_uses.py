"""Which uses of parameters are contracted, in which layout, and which are not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from skfishermask import fisher_diagonal
from skfishermask.jacobian.located_uses import (
    LocatedUse,
    backward,
    locate_uses,
    output_edges,
    probe_layouts,
)
from skfishermask.jacobian.sample_layout import SampleLayout
from tests import networks, oracles
from tests.jacobian.common import graph_of, with_parameters
from tests.networks import Net


def x_of(n: int, *shape: int) -> Tensor:
    return torch.randn(n, *shape, dtype=torch.float64)


def located(module: nn.Module, x: Tensor) -> tuple[list[LocatedUse], dict[str, str], bool]:
    outputs, graph = graph_of(module, x)
    uses = [*graph.uses()]
    probe = probe_layouts(outputs, graph, uses, set(), {})
    return *locate_uses(uses, probe.layouts), probe.reusable


def test_layouts_and_gradients_of_a_probe() -> None:
    module = nn.Linear(5, 3).double()
    outputs, graph = graph_of(module, x_of(4, 5))
    uses = [*graph.uses()]
    constants = {p.untyped_storage().data_ptr() for p in module.parameters()}
    edges = {name: get_gradient_edge(p) for name, p in module.named_parameters()}
    probe = probe_layouts(outputs, graph, uses, constants, edges)
    # A bias is as if it had an axis before the output's own.
    axes = {"weight": 0, "bias": 1}
    assert probe.layouts == [SampleLayout(4, axes[use.name]) for use in uses]
    assert len(uses) == 2
    assert probe.reusable
    # In one pass: the weights of the outputs are the gradient at the only operation.
    weights = probe.gradients[uses[0].node]
    expected = torch.autograd.grad((weights * outputs).sum(), [*module.parameters()])
    for name, right in zip(edges, expected, strict=True):
        torch.testing.assert_close(probe.gradients[name], right)


def test_a_copy_for_each_sample_is_contracted_where_it_is_expanded() -> None:
    module = with_parameters(lambda x, w: torch.tanh(x * w.expand(len(x), 5)), (1, 5))
    [use], unsupported, _ = located(module, x_of(4, 5))
    assert (use.use.operation, unsupported) == ("Expand", {})


def test_a_copy_for_each_column_is_a_view() -> None:
    # Of the copies, none belongs to one sample: the product does.
    module = with_parameters(lambda x, w: torch.tanh(x @ w.expand(5, 3)), (1, 3))
    [use], unsupported, _ = located(module, x_of(4, 5))
    assert (use.use.operation, unsupported) == ("Mm", {})


def test_a_function_of_a_parameter_is_unsupported() -> None:
    module = with_parameters(lambda x, v, w: x @ w.exp() + v, (3,), (5, 3))
    uses, unsupported, _ = located(module, x_of(4, 5))
    assert [use.use.name for use in uses] == ["p0"]
    assert unsupported == {"p1": "Exp"}


def test_one_unsupported_use_is_enough() -> None:
    module = with_parameters(lambda x, w: torch.tanh(x @ w) @ w.exp(), (5, 5))
    assert located(module, x_of(4, 5))[:2] == ([], {"p0": "Exp"})


def test_an_operation_on_no_rows_counts_as_none() -> None:
    module = with_parameters(lambda x, w: torch.cat([x @ w, (x[:0] @ w)]), (5, 3))
    uses, unsupported, _ = located(module, x_of(4, 5))
    assert (len(uses), unsupported) == (1, {})


def test_layouts_by_values_are_not_reusable() -> None:
    module = networks.routed(lambda x: x).double()
    *_, reusable = located(module, x_of(6, 4))
    assert not reusable


def test_gradients_at_edges() -> None:
    module = networks.mlp().double()
    outputs, graph = graph_of(module, x_of(4, 5))
    nodes = [use.node for use in graph.uses()]
    weights = torch.randn_like(outputs)
    found = backward(outputs, output_edges(nodes), weights, last=True)
    # The last operation's output is the network's.
    torch.testing.assert_close(found[graph.nodes[0]], weights)
    assert {*found} == {*nodes}


def test_a_view_in_which_entries_overlap_is_read_sample_by_sample() -> None:
    module = Net(
        lambda net, x: net.output(torch.tanh(x @ net.band.unfold(0, 4, 1))),
        band=nn.Parameter(torch.randn(8)),
        output=nn.Linear(4, 3),
    ).double()
    x = torch.randn(6, 5).double()
    g, p = oracles.scores(module, x)
    with pytest.warns(UserWarning, match=r"^Reading .*band \(Unfold\)"):
        found = fisher_diagonal(module, [x])
    flat = torch.cat([found[name].flatten() for name, _ in module.named_parameters()])
    torch.testing.assert_close(flat, oracles.diagonal(g, p))
