"""R(x) J(x) of one batch against a loop over samples, and what it costs."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from skfishermask import ParameterMask, fisher_embedding
from skfishermask.fisher.likelihood import categorical_factor
from skfishermask.jacobian.reader import JacobianReader
from tests import forked, networks, oracles
from tests.jacobian.common import (
    assert_close,
    diagonal_and_embedding,
    gradients_by_sample,
    pooled,
    with_parameters,
)
from tests.networks import Net

MODULES: dict[str, Callable[[], nn.Module]] = {
    "mlp": networks.mlp,
    # Parameters that no rule covers beside others.
    "own function": networks.own_function,
    "product with itself": lambda: with_parameters(lambda x, w: torch.tanh(x @ w) @ w, (5, 5)),
    "outputs of two axes": lambda: Net(
        lambda net, x: net.inner(x).unflatten(1, (2, 3)), inner=nn.Linear(5, 6)
    ),
    "one output": lambda: Net(lambda net, x: net.inner(x)[:, 0], inner=nn.Linear(5, 1)),
}


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("name", MODULES)
@pytest.mark.filterwarnings("ignore:Reading sample by sample")
def test_rows_times_the_jacobian(name: str, n: int) -> None:
    torch.manual_seed(0)
    module, x = MODULES[name]().double().eval(), torch.randn(n, 5, dtype=torch.float64)
    shapes = {key: p.shape for key, p in module.named_parameters()}
    indices = {key: torch.arange(0, shape.numel(), 2) for key, shape in shapes.items()}
    rows = torch.randn(n, 3, *module(x).shape[1:], dtype=torch.float64)
    expected = [gradients_by_sample(module, x, rows[:, i]) for i in range(3)]

    jacobian = JacobianReader(module, indices).forward(x)
    products = torch.stack(
        [torch.cat([g[key].flatten(1)[:, indices[key]] for key in shapes], 1) for g in expected], 1
    )
    torch.testing.assert_close(jacobian.multiply(rows), products)

    squares = JacobianReader(module).forward(x).sum_of_squares(rows)
    for key, found in squares.items():
        total = sum(g[key].square().sum(0) for g in expected)
        torch.testing.assert_close(found, total)


def test_whole_parameters_have_no_columns() -> None:
    jacobian = JacobianReader(nn.Linear(5, 3).eval()).forward(torch.randn(2, 5))
    with pytest.raises(ValueError, match="no entries to multiply at"):
        jacobian.multiply(torch.ones(2, 1, 3))


@pytest.mark.parametrize("size", [1, 4])
def test_a_parameter_that_is_not_used(size: int) -> None:
    module = Net(
        lambda net, x: net.output(x), output=nn.Linear(5, 3), spare=nn.Linear(2, 2)
    ).double()
    x = torch.randn(4, 5).double()
    g, p = oracles.scores(module, x)
    diagonal, V = diagonal_and_embedding(module, list(x.split(size)))
    assert_close(diagonal, oracles.diagonal(g, p))
    assert_close(V, categorical_factor(p) @ g)


@pytest.mark.slow
def test_one_sample_of_a_network_whose_gradients_are_taken_in_parts() -> None:
    # More numbers in two parameters than are asked for together.
    module = nn.Sequential(nn.Linear(5, 3000), nn.Tanh(), nn.Linear(3000, 3000), nn.Linear(3000, 3))
    x = torch.randn(2, 5)
    shapes = {name: p.shape for name, p in module.named_parameters()}
    mask = ParameterMask({name: torch.arange(3) for name in shapes}, shapes)
    alone = fisher_embedding(module, x.split(1), mask)
    torch.testing.assert_close(alone, fisher_embedding(module, [x], mask))


def test_a_network_that_does_not_use_its_parameters() -> None:
    module = Net(lambda net, x: 2 * x, unused=nn.Linear(3, 3))
    for x in (torch.randn(1, 3), torch.randn(4, 3)):
        diagonal, V = diagonal_and_embedding(module, [x])
        assert not diagonal.any()
        assert V.shape == (len(x), 2, 12)
        assert not V.any()


@pytest.mark.parametrize(
    "name",
    ["conv_norm", "norms", "prelu", "rms_norm", "layer_scale", "tied", "text_gru", "masked_text",
     "windows", "swin", "vit", "encoder", "decoder", "convnext", "autocast", "lora_merged"],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:Reading sample by sample")
def test_what_is_not_held_is_made_anew(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with operands too large to be held, also in the last backward pass."""
    monkeypatch.setattr("skfishermask.jacobian.batch_jacobian.TENSOR_CACHE_BYTES", 0)
    module, x, diagonal, V = pooled(name)
    found_diagonal, found_V = diagonal_and_embedding(module, [x])
    assert_close(found_diagonal, diagonal)
    assert_close(found_V, V)


class _OwnLookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.shape = table.shape
        return F.embedding(index, table)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return g.new_zeros(ctx.shape).index_add(0, index.flatten(), g.flatten(0, -2)), None


def look_up(n_rows: int) -> nn.Module:
    """A table of 100 columns behind a function that no rule covers."""

    def run(net: Net, x: Tensor) -> Tensor:
        return net.output(torch.tanh(_OwnLookup.apply(net.table, x)).mean(1))

    return Net(run, table=networks.weight(n_rows, 100), output=nn.Linear(100, 6))


def peak() -> float:
    """Return the most memory that this process has had, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def memory_of_ten_entries() -> float:
    """Return how far the embedding lies above a pass of its network, forward and backward."""

    def embed(module: nn.Module) -> Tensor:
        shapes = {name: p.shape for name, p in module.named_parameters()}
        return fisher_embedding(module, [x], ParameterMask({"table": torch.arange(10)}, shapes))

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    x = torch.randint(0, 10, (16, 3))
    # A small network first brings in what is imported late.
    embed(look_up(20))
    module = look_up(110_000)
    torch.autograd.grad(module(x).sum(), [*module.parameters()])
    before = peak()
    assert embed(module).any()
    return peak() - before


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's peak of memory")
@pytest.mark.xdist_group("processes")
@pytest.mark.slow
def test_ten_entries_of_a_large_table_without_a_rule() -> None:
    # A process remembers its own peak.
    status, found = forked.run(memory_of_ten_entries)
    assert status == 0
    # MB; a gradient of the table by itself has 44.
    assert found < 50
