"""Where entries lie after views, against the views themselves done to the entries' numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from skfishermask.jacobian.views import ViewStep, entry_positions, static_values
from tests.jacobian.common import graph_of, with_parameters

# A view of a parameter (4, 6).
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda w: w,
    "transpose": lambda w: w.T,
    "slice of a transpose": lambda w: w.T[1:4, ::2],
    "row": lambda w: w[2],
    "reshape": lambda w: w.reshape(3, 8),
    "copy": lambda w: w.clone().float(),
    "flip": lambda w: w.flip(0),
    "roll": lambda w: w.roll(1, 1),
    "pad": lambda w: torch.nn.functional.pad(w, (1, 2)),
    "triangle": lambda w: w.tril(),
    "diagonal": lambda w: w.diagonal(1),
    "last part": lambda w: w.split([1, 3])[1],
    "expand": lambda w: w[:, None].expand(4, 2, 6),
    "repeat": lambda w: w.repeat(2, 3),
    "rows by index": lambda w: w[torch.tensor([2, 0, 2])],
    "selected columns": lambda w: w.index_select(1, torch.tensor([5, 0])),
    "embedding": lambda w: torch.nn.functional.embedding(torch.tensor([3, 1]), w),
    "gather": lambda w: w.gather(1, torch.tensor([[0, 5], [1, 1], [2, 2], [5, 4]])),
}


def steps_of(view: Callable[[Tensor], Tensor]) -> tuple[torch.Size, list[ViewStep]]:
    """Follow the parameter's node to the output, by a sum that ends the views."""
    w = torch.zeros(4, 6, requires_grad=True)
    steps: list[ViewStep] = []
    node = view(w).grad_fn
    while node is not None and not hasattr(node, "variable"):
        steps.insert(0, ViewStep(node, 0, 0))
        node = node.next_functions[0][0]
    return w.shape, steps


@pytest.mark.parametrize("index", [None, torch.tensor([0, 3, 7, 8, 17, 23])], ids=["all", "some"])
@pytest.mark.parametrize("name", VIEWS)
def test_entry_positions(name: str, index: Tensor | None) -> None:
    view = VIEWS[name]
    shape, steps = steps_of(view)
    if name == "last part":
        steps[-1] = ViewStep(steps[-1].node, 0, 1)
    entry_index, operand_index = entry_positions(shape, steps, index)
    # Numbers from one: padding and what a triangle leaves out are zero.
    numbers = view(torch.arange(1.0, shape.numel() + 1).view(shape)).flatten().tolist()
    entries = range(shape.numel()) if index is None else index.tolist()
    expected = sorted(
        (i, position)
        for i, entry in enumerate(entries)
        for position, number in enumerate(numbers)
        if number == entry + 1
    )
    if operand_index is None:
        operand_index = torch.arange(shape.numel())
    if entry_index is None:
        entry_index = torch.arange(len(entries))
    assert [*zip(entry_index.tolist(), operand_index.tolist(), strict=True)] == expected


def test_entries_of_two_joined_parameters() -> None:
    module = with_parameters(lambda x, v, w: x @ torch.cat([v, w], 1), (3, 2), (3, 4))
    _, graph = graph_of(module, torch.randn(2, 3).double())
    for use in graph.uses():
        size = module.get_parameter(use.name).shape
        entry_index, operand_index = entry_positions(size, use.views, None)
        columns = range(2) if use.name == "p0" else range(2, 6)
        assert entry_index is None
        assert operand_index is not None
        assert operand_index.tolist() == [6 * i + j for i in range(3) for j in columns]


def test_key_of_a_view() -> None:
    w, index = torch.zeros(4, 6, requires_grad=True), torch.tensor([2, 0])
    keys = [ViewStep(t.grad_fn, 0, 0).key for t in (w.T, w.T, w[1:], w[:3], w.T[1:])]
    assert keys[0] == keys[1]
    assert len({*keys[1:]}) == 4
    # Values decide, which the key does not show.
    assert ViewStep(w[index].grad_fn, 0, 0).key is None


def test_static_values_hold_no_tensor() -> None:
    x, w = torch.randn(2, 3, 8), torch.randn(4, 3, 3, requires_grad=True)
    one, other = (
        static_values(torch.nn.functional.conv1d(x, w, stride=stride).grad_fn) for stride in (1, 2)
    )
    assert one != other
    assert not any(isinstance(value, Tensor) for value in one)
