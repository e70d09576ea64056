"""What is known of operations, looked up by the nodes of a graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from skfishermask.jacobian.operations import (
    _ROWS,
    OPERATIONS,
    Mixing,
    Operation,
    View,
    operation_name,
    operation_of,
    signed,
)
from skfishermask.jacobian.rules import RULES


class Mul(torch.autograd.Function):
    """A user's function with the name of PyTorch's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g


def node_of(t: Tensor) -> Any:
    return t.grad_fn


def test_each_operation_has_one_row() -> None:
    names = " ".join(names for _, names in _ROWS).split()
    assert len(names) == len(set(names))


def test_a_users_function_is_unknown_even_with_a_name_of_pytorch() -> None:
    x = torch.ones(2, requires_grad=True)
    assert operation_of(node_of(x * 2)) is OPERATIONS["Mul"]
    assert operation_of(node_of(Mul.apply(x))) == Operation()
    assert operation_name(node_of(Mul.apply(x))) == operation_name(node_of(x * 2)) == "Mul"


@pytest.mark.parametrize("name", [name for name, row in OPERATIONS.items() if row.factors])
def test_factors_are_the_last_two_operands(name: str) -> None:
    x, y = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 4, 5, requires_grad=True)
    bias = torch.zeros(5)
    made = {
        "Mm": lambda: x[0] @ y[0],
        "Addmm": lambda: torch.addmm(bias, x[0], y[0]),
        "Bmm": lambda: torch.bmm(x, y),
        "Baddbmm": lambda: torch.baddbmm(bias, x, y),
    }
    node = node_of(made[name]())
    assert operation_name(node) == name
    left, right = (getattr(node, attribute) for attribute in OPERATIONS[name].factors)
    for saved, factor in ((left, x), (right, y)):
        torch.testing.assert_close(saved, factor if saved.dim() == 3 else factor[0])


def test_every_rule_is_of_an_operation_with_a_row() -> None:
    named = {name.split("Backward")[0] for name, _ in RULES}
    # The gradient of a bag is by its offsets: which rows are a sample's is found in each batch.
    assert named - OPERATIONS.keys() == {"EmbeddingBag"}


def test_what_moves_entries_keeps_parameters_apart() -> None:
    for row in OPERATIONS.values():
        if row.view in (View.SAME_ORDER, View.MOVED, View.EXPANDED):
            assert row.keeps_parameters_apart
        if row.view is View.INDEXED:
            assert not row.keeps_parameters_apart
        assert (row.mixing is Mixing.FACTORS) == bool(row.factors)


def test_signed() -> None:
    assert [signed(2**64 - 1), signed(2**64 - 3), signed(0), signed(7)] == [-1, -3, 0, 7]
