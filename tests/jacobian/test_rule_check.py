"""The rules are checked against autograd's gradient, on samples that show something."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from skfishermask import fisher_diagonal, fisher_embedding
from skfishermask.jacobian import share_facts
from skfishermask.jacobian.gradient_forms import BroadcastGrad, Form
from skfishermask.jacobian.operations import Node
from skfishermask.jacobian.rules import RULES
from tests.jacobian.common import mask_of
from tests.networks import Net, weight

GENERATOR = torch.Generator().manual_seed(0)
# The units of the first layer are off for the first six samples.
OFF = torch.rand(6, 3, generator=GENERATOR, dtype=torch.float64).neg()
X = torch.cat([OFF, torch.rand(9, 3, generator=GENERATOR, dtype=torch.float64)])


def positive(*shape: int) -> nn.Parameter:
    return nn.Parameter(weight(*shape).detach().abs() + 0.1)


def net(run: Callable[[Net, Tensor], Tensor], w: nn.Parameter) -> Net:
    torch.manual_seed(0)
    return Net(lambda net, x: net.last(run(net, x)), w=w, last=nn.Linear(3, 3)).double()


def rows_of_a_table(net: Net, x: Tensor) -> Tensor:
    """Row 1 for the samples that are off, and far ones for others."""
    return torch.nn.functional.embedding((1 + 9e3 * x[:, 0].relu()).long(), net.w)


def experts(net: Net, x: Tensor) -> Tensor:
    """Two that weigh in by what the sample is: one has no part in the first samples."""
    gate = (x[:, :1] > 0).to(x.dtype)
    return gate * torch.tanh(x @ net.w) + (1 - gate) * torch.tanh(x)


# A network, and the operand for which the rule is made wrong.
LATE: dict[str, tuple[Callable[[], nn.Module], tuple[str, int]]] = {
    "product": (
        lambda: net(lambda net, x: torch.relu(x @ net.w), positive(3, 3)),
        ("MmBackward0", 1),
    ),
    "inputs": (
        lambda: net(lambda net, x: torch.tanh(x.relu() @ net.w), positive(3, 3)),
        ("MmBackward0", 1),
    ),
    "scale": (
        lambda: net(lambda net, x: torch.relu(x * net.w), positive(3)),
        ("MulBackward0", 1),
    ),
    "shift": (
        lambda: net(lambda net, x: torch.relu(9 * x - net.w), positive(3)),
        ("SubBackward0", 1),
    ),
    "experts": (lambda: net(experts, positive(3, 3)), ("MmBackward0", 1)),
    "table": (lambda: net(rows_of_a_table, positive(10_000, 3)), ("EmbeddingBackward0", 0)),
    # Beside a use that shows something in all samples.
    "twice": (
        lambda: net(lambda net, x: torch.relu(x @ net.w) + x * net.w[0], positive(3, 3)),
        ("MmBackward0", 1),
    ),
}


def doubled(form: Form | None) -> Form | None:
    if isinstance(form, BroadcastGrad):
        return replace(form, scale=2 * form.scale)
    return form and replace(form, grad_side=lambda g, some: 2 * form.grad_side(g, some))


def read(module: nn.Module, sizes: list[int]) -> tuple[Mapping[str, Tensor], Tensor]:
    diagonal = fisher_diagonal(module, X.split(sizes))
    return diagonal, fisher_embedding(module, X.split(sizes), mask_of(module), dtype=torch.float64)


@pytest.mark.parametrize("sizes", [[15], [6, 9], [6, 1, 8], [5, 5, 5], [2] * 7 + [1]], ids=str)
@pytest.mark.parametrize("name", LATE)
def test_a_wrong_rule_that_shows_on_later_samples(
    name: str, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    make, operand = LATE[name]
    module, right = make(), RULES[operand]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = read(module, sizes)

    def wrong(node: Node, shape: torch.Size) -> Form | None:
        return doubled(right(node, shape))

    monkeypatch.setitem(RULES, operand, wrong)
    with pytest.warns(UserWarning, match=r"w \(its rule does not give autograd's gradient\)"):
        found = read(module, sizes)
    torch.testing.assert_close(found, expected)


def test_what_shows_nothing_is_checked_until_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    make, _ = LATE["inputs"]
    module, grad, numbers = make(), torch.autograd.grad, []

    def counting(outputs: Tensor, inputs: Any, *arguments: Any, **options: Any) -> Any:
        numbers.append((len(outputs), len(inputs)))
        return grad(outputs, inputs, *arguments, **options)

    monkeypatch.setattr(torch.autograd, "grad", counting)
    fisher_embedding(module, X.split([5, 5, 5]), mask_of(module), n_directions=1)
    # Two operations, and in the first passes three parameters, then the weights, then none.
    assert numbers == [(4, 5), (4, 2), (5, 4), (5, 4), (5, 2)]


@pytest.mark.parametrize("is_next_query", [False, True])
def test_what_has_shown_nothing_is_checked_by_the_next_reader(
    is_next_query: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, operand = LATE["product"]
    module, right = make(), RULES[operand]
    expected = fisher_embedding(module, [X[6:]], mask_of(module))

    def wrong(node: Node, shape: torch.Size) -> Form | None:
        return doubled(right(node, shape))

    monkeypatch.setitem(RULES, operand, wrong)
    share_facts(module, module)
    fisher_diagonal(module, [X[:6]])
    if is_next_query:
        share_facts(module, module)
    with pytest.warns(UserWarning, match=r"w \(its rule does not"):
        found = fisher_embedding(module, [X[6:]], mask_of(module))
    torch.testing.assert_close(found, expected)
    # A reader without that parameter has nothing to warn of.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        some = fisher_embedding(module, [X[6:]], mask_of(module, ["last.bias"]))
    torch.testing.assert_close(some, expected[..., -3:])
    with pytest.warns(UserWarning, match=r"w \(its rule does not"):
        fisher_diagonal(module, [X[6:]])
