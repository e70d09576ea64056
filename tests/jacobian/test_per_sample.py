"""Per-sample gradients of a group of uses, against a loop over samples."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from skfishermask import fisher_diagonal
from skfishermask.jacobian.entries import ParameterEntries
from skfishermask.jacobian.located_uses import (
    LocatedUse,
    backward,
    locate_uses,
    output_edges,
    probe_layouts,
)
from skfishermask.jacobian.operations import Node
from skfishermask.jacobian.per_sample import (
    TensorCache,
    scatter_to_entries,
    squares_of_parameter,
)
from tests import oracles
from tests.jacobian.common import assert_close, gradients_by_sample, graph_of, with_parameters

N = 4
# A network with one parameter p0, and the shape of a sample.
MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "product": (lambda: with_parameters(lambda x, w: torch.tanh(x @ w), (5, 3)), (5,)),
    "product of positions": (
        lambda: with_parameters(lambda x, w: torch.tanh(x @ w).sum(1), (5, 3)),
        (2, 5),
    ),
    "product, positions first": (
        lambda: with_parameters(lambda x, w: torch.tanh(x.transpose(0, 1) @ w).sum(0), (5, 3)),
        (2, 5),
    ),
    "product of the transpose": (
        lambda: with_parameters(lambda x, w: torch.tanh(x @ w.T), (3, 5)),
        (5,),
    ),
    "two products": (lambda: with_parameters(lambda x, w: torch.tanh(x @ w) @ w, (5, 5)), (5,)),
    "two products, one transposed": (
        lambda: with_parameters(lambda x, w: torch.tanh(x @ w) @ w.T, (5, 3)),
        (5,),
    ),
    "halves": (
        lambda: with_parameters(lambda x, w: torch.tanh(x @ w[:, :2]) @ w[1:3].T, (5, 2)),
        (5,),
    ),
    "convolution": (
        lambda: with_parameters(lambda x, w: torch.tanh(F.conv1d(x, w)).sum(2), (3, 2, 2)),
        (2, 5),
    ),
    "grouped convolution": (
        lambda: with_parameters(lambda x, w: F.conv1d(x, w, groups=2).tanh().sum(2), (4, 1, 2)),
        (2, 5),
    ),
    "scale": (lambda: with_parameters(lambda x, w: torch.tanh(x * w), (5,)), (5,)),
    "scale and shift": (lambda: with_parameters(lambda x, w: torch.tanh(x * w) - w, (5,)), (5,)),
    "table": (lambda: with_parameters(lambda x, w: torch.tanh(w[x.long()]).sum(1), (6, 3)), (4,)),
    "table and product": (
        lambda: with_parameters(lambda x, w: torch.tanh(w[x.long()]).sum(1) @ w.T, (6, 3)),
        (4,),
    ),
}


@torch.enable_grad()
def setting(name: str) -> tuple[nn.Module, list[LocatedUse], dict[Node, Tensor], Tensor]:
    """Return a network, the uses of p0, the gradients at them and those of each sample."""
    make, shape = MODULES[name]
    torch.manual_seed(0)
    module = make()
    x = torch.randint(0, 6, (N, *shape)).double() if "table" in name else torch.randn(N, *shape)
    x = x.double()
    outputs, graph = graph_of(module, x)
    uses = [*graph.uses()]
    found, unsupported = locate_uses(uses, probe_layouts(outputs, graph, uses, set(), {}).layouts)
    assert unsupported == {}
    row = torch.randn_like(outputs)
    gradients = backward(outputs, output_edges([one.use.node for one in found]), row, last=False)
    expected = gradients_by_sample(module, x, row)["p0"].flatten(1)
    return module, found, gradients, expected


@pytest.mark.parametrize("n_bytes", [0, 1 << 20])
@pytest.mark.parametrize("name", MODULES)
@torch.no_grad()
def test_gradients_of_each_sample(name: str, n_bytes: int) -> None:
    module, uses, gradients, expected = setting(name)
    numel = expected.shape[1]
    for index in (torch.arange(numel), torch.arange(1, numel, 3), torch.tensor([numel - 1])):
        cache = TensorCache(n_bytes)
        entries = ParameterEntries(module, {"p0": index})
        total = torch.zeros(N, len(index), dtype=torch.float64)
        for group, nodes in entries.use_groups(uses, index, cache):
            contract = group.contraction()
            values = contract([gradients[node] for node in nodes])
            total += scatter_to_entries(group, values, len(index))
        torch.testing.assert_close(total, expected[:, index])


@pytest.mark.parametrize("name", MODULES)
@torch.no_grad()
def test_squares_summed_over_samples(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Two samples at once, where groups are added up first.
    monkeypatch.setattr("skfishermask.jacobian.per_sample._CHUNK_NUMBERS", 50)
    module, uses, gradients, of_samples = setting(name)
    expected = of_samples.square().sum(0)
    groups = ParameterEntries(module, None).use_groups(uses, None, TensorCache(0))
    given = [[gradients[node] for node in nodes] for _, nodes in groups]
    total = squares_of_parameter([group for group, _ in groups], given, N, len(expected))
    torch.testing.assert_close(total, expected)
    if len(groups) == 1 and groups[0][0].entry_index is None:
        squares = groups[0][0].square_sums()(given[0])
        index = groups[0][0].operand_index
        torch.testing.assert_close(squares if index is None else squares[index], expected)


@pytest.mark.parametrize("name", ["product of positions", "scale and shift", "convolution"])
@torch.no_grad()
def test_absolute_values_are_summed(name: str) -> None:
    module, uses, gradients, _ = setting(name)
    index = torch.arange(module.p0.numel())
    [(group, nodes)] = ParameterEntries(module, None).use_groups(uses, index, TensorCache(0))
    given = [gradients[node] for node in nodes]
    absolute = group.contraction(absolute=True)(given)
    assert bool((absolute >= group.contraction()(given).abs() - 1e-12).all())
    # What does not depend on signs is the same.
    flipped = group.contraction(absolute=True)([-g for g in given])
    torch.testing.assert_close(flipped, absolute)


def test_cache_holds_what_fits() -> None:
    made: list[int] = []

    def make(size: int) -> Callable[[], Tensor]:
        def tensor() -> Tensor:
            made.append(size)
            return torch.full((size,), 1, dtype=torch.float64)

        return tensor

    cache = TensorCache(100)
    small, large, other = cache.get(make(8)), cache.get(make(9)), cache.get(make(4))
    assert cache.exceeded
    made.clear()
    for get, size in ((small, 8), (large, 9), (other, 4)):
        assert get().shape == get().shape == (size,)
    assert made == [9, 9]
    fitting = TensorCache(64)
    fitting.get(make(8))
    assert not fitting.exceeded


def test_squares_of_a_convolution_too_large_for_the_cache() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(180, 1400, 3, groups=2, bias=False),
        nn.Tanh(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(1400, 3),
    ).double()
    x = torch.randn(3, 180, 4, 4).double()
    g, p = oracles.scores(module, x)
    found = torch.cat([values.flatten() for values in fisher_diagonal(module, [x]).values()])
    assert_close(found, oracles.diagonal(g, p))
