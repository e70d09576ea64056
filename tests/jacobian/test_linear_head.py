"""Linear heads are found where the outputs' Jacobian is their input, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from skfishermask.jacobian import (
    JacobianReader,
    NoLinearHeadError,
    find_linear_head,
    trainable_parameters,
)


class Net(nn.Module):
    """A frozen layer, and a function of its values and a weight and bias."""

    def __init__(self, function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.trunk = nn.Linear(5, 4).requires_grad_(False)
        self.weight, self.bias = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(3))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.trunk(x).relu(), self.weight, self.bias)


def without_bias(net: Net) -> Net:
    net.bias.requires_grad_(False)
    return net


HEADS = {
    "a layer": lambda: nn.Linear(5, 3),
    "without bias": lambda: nn.Linear(5, 3, bias=False),
    "one output": lambda: nn.Linear(5, 1),
    "a frozen trunk": lambda: nn.Sequential(nn.Linear(5, 4).requires_grad_(False), nn.Linear(4, 3)),
    "a product": lambda: without_bias(Net(lambda x, w, b: x @ w.T)),
    "a function": lambda: Net(functional.linear),
    "transposed twice": lambda: Net(lambda x, w, b: torch.addmm(b, x, w.T.T.T)),
    "a cast weight": lambda: Net(lambda x, w, b: functional.linear(x, w.double().float(), b)),
    "double": lambda: nn.Linear(5, 3).double(),
}
OTHERS = {
    "two layers": lambda: nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)),
    "a softmax": lambda: nn.Sequential(nn.Linear(5, 3), nn.LogSoftmax(1)),
    "scaled outputs": lambda: Net(lambda x, w, b: 2 * functional.linear(x, w, b)),
    "a scaled product": lambda: Net(lambda x, w, b: torch.addmm(b, x, w.T, alpha=2)),
    "a scaled bias": lambda: Net(lambda x, w, b: torch.addmm(b, x, w.T, beta=2)),
    "used twice": lambda: Net(lambda x, w, b: functional.linear(x + w.sum(), w, b)),
    "a bias added": lambda: Net(lambda x, w, b: x @ w.T + b),
    "a bias that is a function": lambda: Net(lambda x, w, b: functional.linear(x, w, b.exp())),
    "some rows": lambda: Net(lambda x, w, b: functional.linear(x, w[:2], b[:2])),
    "rows twice": lambda: Net(lambda x, w, b: functional.linear(x, w[[0, 1, 1]], b)),
    "a parameter as samples": lambda: Net(lambda x, w, b: (w @ x.T).T + 0 * b),
    "tokens": lambda: Net(lambda x, w, b: functional.linear(x[:, None], w, b)[:, 0]),
    "a normalisation": lambda: nn.Sequential(nn.Linear(5, 3), nn.LayerNorm(3)),
}


def entries(module: nn.Module) -> dict[str, Tensor]:
    """Some entries of each trainable parameter."""
    return {
        name: torch.arange(p.numel())[:: 2 if p.numel() > 3 else 1]
        for name, p in trainable_parameters(module).items()
    }


@pytest.mark.parametrize("n", [1, 6])
@pytest.mark.parametrize("make", HEADS.values(), ids=HEADS)
def test_factors_multiply_to_the_jacobian(make: Callable[[], nn.Module], n: int) -> None:
    torch.manual_seed(0)
    module = make()
    indices = entries(module)
    x = torch.randn(n, 5, dtype=next(module.parameters()).dtype)
    head = find_linear_head(module, x[:1], indices)
    assert head is not None
    reader = JacobianReader(module, indices)
    R = torch.randn(n, 2, head.n_outputs).double()
    with reader.open():
        expected = reader.forward(x).multiply(R)
        factors = reader.forward(x).factors(R, head)
    assert factors.dtype == expected.dtype
    features, rows = factors[:, 0].tensor_split([head.features.shape[1]], 1)
    outputs, places = head.columns
    found = rows.view(n, 2, -1)[:, :, outputs] * features[:, None, places]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS)
def test_other_networks_have_none(make: Callable[[], nn.Module]) -> None:
    module = make()
    for n in (1, 3):
        assert find_linear_head(module, torch.randn(n, 5), entries(module)) is None


def test_a_mask_that_reaches_the_head_alone_has_one() -> None:
    module = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    indices = {"2.weight": torch.tensor([1, 7]), "2.bias": torch.tensor([2])}
    head = find_linear_head(module, torch.randn(1, 5), indices)
    assert head is not None
    assert head.columns.tolist() == [[0, 1, 2], [1, 3, 4]]
    assert head.features[0, 4] == 1
    assert find_linear_head(module, torch.randn(1, 5), {"2.bias": None}) is None


def test_a_batch_with_other_operations_is_refused() -> None:
    module = Net(lambda x, w, b: functional.linear(x, w, b) if len(x) < 5 else x @ w.T + b)
    head = find_linear_head(module, torch.randn(1, 5), entries(module))
    assert head is not None
    reader = JacobianReader(module, entries(module))
    R = torch.randn(6, 2, 3)
    with reader.open(), pytest.raises(NoLinearHeadError):
        reader.forward(torch.randn(6, 5)).factors(R, head)
    other = replace(head, columns=head.columns.roll(1, 1))
    with reader.open(), pytest.raises(NoLinearHeadError):
        reader.forward(torch.randn(4, 5)).factors(R[:4], other)
