"""The entries to read of a network, and the groups of uses that share their positions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from skfishermask.jacobian.entries import ParameterEntries
from skfishermask.jacobian.located_uses import (
    locate_uses,
    probe_layouts,
)
from skfishermask.jacobian.per_sample import TensorCache
from tests.jacobian.common import graph_of, with_parameters


def test_unknown_parameter() -> None:
    with pytest.raises(ValueError, match="no parameter 'other'"):
        ParameterEntries(nn.Linear(2, 3), {"other": torch.arange(2)})


def test_two_dtypes_and_none() -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3).double())
    assert ParameterEntries(module, None).sum_dtype == torch.float64
    with pytest.raises(ValueError, match="found no parameters"):
        ParameterEntries(nn.ReLU(), None)


@pytest.mark.parametrize(
    ("dtype", "sum_dtype"),
    [
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_dtypes(dtype: torch.dtype, sum_dtype: torch.dtype) -> None:
    entries = ParameterEntries(nn.Linear(2, 3).to(dtype), None)
    assert entries.sum_dtype == sum_dtype
    assert [*entries.parameters] == ["weight", "bias"]


def test_only_parameters_with_entries() -> None:
    module, index = nn.Linear(2, 3), torch.tensor([0, 4])
    entries = ParameterEntries(module, {"weight": index})
    assert {**entries.parameters} == {"weight": module.weight}
    assert entries.device_indices["weight"] is not None


@pytest.mark.parametrize("index", [None, torch.arange(3, 600, 3)])
def test_sample_reaches_from_the_first_to_the_last(index: Tensor | None) -> None:
    entries = ParameterEntries(nn.Linear(200, 3), {"weight": index})
    every = torch.arange(600) if index is None else index
    for size in (1, 2, 64, 1000):
        found = entries.sample("weight", size)
        assert len(found) == min(size, len(every))
        assert set(found.tolist()) <= set(every.tolist())
        assert bool((found.diff() > 0).all())
        assert found[0] == every[0]
        assert size == 1 or found[-1] == every[-1]


def group_sizes(module: nn.Module, x: Tensor, index: Tensor) -> list[int]:
    outputs, graph = graph_of(module, x)
    uses = [*graph.uses()]
    located, _ = locate_uses(uses, probe_layouts(outputs, graph, uses, set(), {}).layouts)
    entries = ParameterEntries(module, {"p0": index})
    return [len(nodes) for _, nodes in entries.use_groups(located, index, TensorCache(0))]


def test_uses_of_equal_views_and_forms_are_one_group() -> None:
    x = torch.randn(4, 5, dtype=torch.float64)
    same = with_parameters(lambda x, w: torch.tanh(torch.tanh(x @ w) @ w) @ w, (5, 5))
    assert group_sizes(same, x, torch.arange(25)) == [3]
    other_view = with_parameters(lambda x, w: torch.tanh(torch.tanh(x @ w) @ w) @ w.T, (5, 5))
    assert sorted(group_sizes(other_view, x, torch.arange(25))) == [1, 2]
    other_form = with_parameters(lambda x, w: (torch.tanh(x @ w) @ w) * w[0], (5, 5))
    assert sorted(group_sizes(other_form, x, torch.arange(25))) == [1, 2]


def test_a_group_without_entries_is_left_out() -> None:
    module = with_parameters(lambda x, w: torch.tanh(x @ w[:2].T) @ w[2:, :2].T, (5, 5))
    x = torch.randn(4, 5, dtype=torch.float64)
    assert group_sizes(module, x, torch.arange(25)) == [1, 1]
    assert group_sizes(module, x, torch.arange(10)) == [1]
