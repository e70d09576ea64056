"""The greedy loop picks what the oracle picks, for embeddings in any place of this machine."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from skfishermask.selection import Batch, SelectionProblem, select, stored
from skfishermask.selection.greedy import BestCandidate, InverseFisher
from skfishermask.selection.storage import ScratchEmbedding, TensorEmbedding
from tests import oracles
from tests.problems import problem
from tests.selection.selectors import (
    Selector,
    check_any_problem,
    check_larger_pool,
    in_memory,
    picks_per_round,
)


def in_a_scratch_file(V: Tensor, problem: SelectionProblem, width: int, **options: Any) -> Batch:
    with ScratchEmbedding(V.shape, V.dtype, "cpu") as scratch, picks_per_round(width):
        scratch.write(0, V)
        return select(scratch, problem, **options)


def on_a_device(
    V: Tensor, problem: SelectionProblem, width: int, in_host_memory: bool = False, **options: Any
) -> Batch:
    from benchmarks.common.pretended import DEVICE, Pretended, on_host, pretending

    with pretending(), picks_per_round(width):
        there = {
            name: None if value is None else Pretended(value)
            for name in ("fisher", "fisher_labeled")
            for value in [getattr(problem, name)]
        }
        embedding = TensorEmbedding(V, DEVICE) if in_host_memory else stored(Pretended(V))
        found = select(embedding, replace(problem, **there), **options)
    return replace(found, positions=on_host(found.positions), gains=on_host(found.gains))


def in_memory_beside_a_device(
    V: Tensor, problem: SelectionProblem, width: int, **options: Any
) -> Batch:
    return on_a_device(V, problem, width, in_host_memory=True, **options)


QUICK = [in_memory, in_a_scratch_file]
# A pick takes as long as a hundred elsewhere.
SLOW = [
    pytest.param(on_a_device, marks=pytest.mark.pretended),
    pytest.param(in_memory_beside_a_device, marks=pytest.mark.pretended),
]


@pytest.mark.parametrize(("selector", "n_examples"), [(in_memory, 30), (in_a_scratch_file, 10)])
def test_the_picks_are_the_oracles(selector: Selector, n_examples: int) -> None:
    def picks(data: st.DataObject) -> None:
        check_any_problem(selector, 60, data)

    settings(max_examples=n_examples)(given(st.data())(picks))()


@pytest.mark.parametrize("selector", SLOW)
@settings(max_examples=8)
@given(data=st.data())
def test_few_picks_are_the_oracles(selector: Selector, data: st.DataObject) -> None:
    check_any_problem(selector, 6, data)


@pytest.mark.parametrize("width", [1, 4, 16])
@pytest.mark.parametrize("selector", QUICK + SLOW)
def test_larger_pools_in_float32(selector: Selector, width: int) -> None:
    check_larger_pool(selector, width)


@pytest.mark.parametrize("kinds", [0, 1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equal_candidates_cost_no_more_than_others(kinds: int, dtype: torch.dtype) -> None:
    V, _ = problem(400, 3, 40)
    V = V[torch.arange(400) % kinds] if kinds else 0 * V
    target = torch.eye(40, dtype=torch.float64)
    computed: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        compute = InverseFisher.exact_gains

        def counted(self: InverseFisher, v: Tensor) -> Any:
            computed.append(len(v))
            return compute(self, v)

        patch.setattr(InverseFisher, "exact_gains", counted)
        found = in_memory(V.to(dtype), SelectionProblem(20, target), 2)
    assert found.positions.tolist() == oracles.select_batch_oracle(V.to(dtype), 20, target)[0]
    # A few for each pick.
    assert sum(computed) <= 6 * 20


def update(inverse_fisher: InverseFisher, v: torch.Tensor) -> None:
    """Pick a sample by its embedding, (1, r, k)."""
    zero = torch.zeros(1, dtype=torch.int64)
    exact = inverse_fisher.exact_gains(v)
    inverse_fisher.update(BestCandidate(zero, zero, exact, zero, zero[0] == 0))


@pytest.mark.parametrize("first", [0.5, "matrix"])
def test_inverse_fisher(first: float | str) -> None:
    k, r = 10, 3
    start = first * torch.eye(k).double() if first == 0.5 else torch.linalg.inv(problem(9, 3, k)[1])
    inverse_fisher = InverseFisher(0.5 if first == 0.5 else start, problem(9, 3, k)[1])
    expected, x = start, torch.randn(2, 4, k, dtype=torch.float64)
    for _ in range(12):
        v = torch.randn(1, r, k, dtype=torch.float64)
        assert inverse_fisher.reserve(1, r) == 1
        update(inverse_fisher, v)
        expected = torch.linalg.inv(torch.linalg.inv(expected) + v[0].T @ v[0])
        torch.testing.assert_close(inverse_fisher.multiply(x), x @ expected)
        torch.testing.assert_close(inverse_fisher.to_dense(), expected)


def test_undone_picks_leave_no_trace() -> None:
    k, r = 20, 3
    inverse_fisher = InverseFisher(1.0, problem(9, 3, k)[1])
    for _ in range(5):
        assert inverse_fisher.reserve(4, r) == 4
        before = inverse_fisher.to_dense()
        for _ in range(4):
            v = torch.randn(1, r, k, dtype=torch.float64)
            update(inverse_fisher, v)
        inverse_fisher.undo(4, r)
        assert torch.equal(inverse_fisher.to_dense(), before)
        update(inverse_fisher, v)
