"""One selection, checked against the oracle, for embeddings in any place."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from skfishermask.selection import Batch, SelectionProblem, batch, select, stored
from tests import oracles
from tests.problems import labeled, problem

# Of embeddings, a problem, picks per round, and options.
Selector = Callable[..., Batch]


@contextmanager
def picks_per_round(width: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch, "choose_picks_per_round", lambda embedding: width)
        yield


def in_memory(V: Tensor, problem: SelectionProblem, width: int, **options: Any) -> Batch:
    with picks_per_round(width):
        return select(stored(V), problem, **options)


def cut(n: int, n_parts: int) -> list[slice]:
    cuts = {n * i // n_parts for i in range(n_parts + 1)}
    return [slice(*ends) for ends in itertools.pairwise(sorted(cuts))]


def check_any_problem(selector: Selector, most_picks: int, data: st.DataObject) -> None:
    """Check that the picks for a drawn problem are the oracle's."""
    n = data.draw(st.integers(1, 60), "n")
    r = data.draw(st.integers(1, 4), "r")
    k = data.draw(st.integers(1, 12), "k")
    K = data.draw(st.integers(1, min(n, most_picks)), "K")
    width = data.draw(st.sampled_from([1, 4, 16]), "picks per round")
    decay = data.draw(st.sampled_from([0.0, 1.0, 2.0]), "decay")
    V, target = problem(n, r, k, decay=decay, seed=data.draw(st.integers(0, 99), "seed"))
    for row, other in data.draw(st.lists(st.tuples(*[st.integers(0, n - 1)] * 2), max_size=4)):
        V[row] = V[other]
    if data.draw(st.booleans(), "identity"):
        target = torch.eye(k, dtype=torch.float64)
    options: dict[str, Any] = labeled(k) if data.draw(st.booleans(), "labelled") else {}
    options["oversample"] = data.draw(st.sampled_from([1.0, 1.5]), "oversample")
    first = data.draw(st.lists(st.integers(0, n - 1), max_size=min(3, K), unique=True), "first")
    expected = oracles.select_batch_oracle(V, K, target, preselected=first, **options)
    found = selector(V, SelectionProblem(K, target, **options), width, preselected=first)
    assert found.positions.tolist() == expected[0]
    torch.testing.assert_close(
        found.gains.tolist(), expected[1], rtol=1e-8, atol=1e-11 * max(expected[1])
    )
    del options["oversample"]
    for positions, value in zip(([], expected[0]), found.objective, strict=True):
        information = oracles.batch_information(V, positions, K, **options)
        assert value == pytest.approx(oracles.objective(information, target), rel=1e-8)

    single = selector(V.float(), SelectionProblem(K, target, **options), width, preselected=first)
    best, _ = oracles.select_batch_oracle(V.float(), K, target, preselected=first, **options)
    reached, wanted = (
        oracles.objective(oracles.batch_information(V.float(), chosen, K, **options), target)
        for chosen in (single.positions, best)
    )
    assert reached <= wanted * (1 + 1e-4)


def check_larger_pool(selector: Selector, width: int) -> None:
    # More candidates than are on a shortlist, some of them equal, and gains that fall a lot.
    V, target = problem(500, 3, 60, decay=0.5, scale=3.0)
    V[400:420] = V[10:30]
    V = V.float()
    expected, gains = oracles.select_batch_oracle(V, 30, target)
    found = selector(V, SelectionProblem(30, target), width)
    assert found.positions.tolist() == expected
    torch.testing.assert_close(found.gains.tolist(), gains, rtol=1e-8, atol=0)
