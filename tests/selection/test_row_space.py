"""Coordinates in the space of few rows, and the choice made in them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from skorch import NeuralNetClassifier
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from skfishermask import PUBLISHED, FisherMaskSampler
from skfishermask.fisher import fisher_matrix
from skfishermask.placement import MemoryEstimate
from skfishermask.selection import SelectionProblem, row_coordinates, select, stored
from skfishermask.selection.storage import ScratchEmbedding
from tests import oracles
from tests.problems import problem


@pytest.mark.parametrize("rank", [0, 1, 5, 12])
@pytest.mark.parametrize("width", [3, 7, 30])
def test_inner_products_are_kept(rank: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("skfishermask.selection.row_space._MIN_COLUMNS", width)
    monkeypatch.setattr("skfishermask.selection.row_space._BLOCK_BYTES", 0)
    rows = torch.randn(12, rank).double() @ torch.randn(rank, 30).double()
    rows = rows * torch.logspace(-8, 8, 12).double()[:, None]
    found = row_coordinates(stored(rows.view(6, 2, 30)))
    assert found.shape == (6, 2, 12)
    found, sizes = found.flatten(0, 1), torch.linalg.vector_norm(rows, dim=1)
    off = (found @ found.T - rows @ rows.T).abs()
    assert (off <= 1e-13 * sizes[:, None] * sizes).all()


def test_equal_samples_have_equal_coordinates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("skfishermask.selection.row_space._MIN_COLUMNS", 7)
    monkeypatch.setattr("skfishermask.selection.row_space._BLOCK_BYTES", 0)
    V = torch.randn(9, 2, 30)
    V[5], V[8] = V[2], V[2]
    # The same columns in another order are not the same.
    V[3] = torch.cat([V[2, :, 7:14], V[2, :, :7], V[2, :, 14:]], 1)
    found = row_coordinates(stored(V))
    equal = [[torch.equal(found[i], found[j]) for j in range(9)] for i in range(9)]
    kinds = [0, 1, 2, 3, 4, 2, 6, 7, 2]
    assert equal == [[kinds[i] == kinds[j] for j in range(9)] for i in range(9)]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_named(value: float) -> None:
    V = torch.randn(5, 2, 30)
    V[3, 1, 17] = value
    with pytest.raises(ValueError, match="embedding must be finite, row 3"):
        row_coordinates(stored(V))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("n_labeled", [0, 12])
@pytest.mark.parametrize("oversample", [1.0, 1.5])
@pytest.mark.parametrize("on_disk", [False, True])
def test_the_choice_is_the_oracles(
    on_disk: bool, oversample: float, n_labeled: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    V, _ = problem(30 + n_labeled, 2, 200, decay=0.3)
    V[7], V[9] = V[3], 0
    V = V.to(dtype)
    options = labelled(V, n_labeled) | {"oversample": oversample}
    expected = oracles.select_batch_oracle(V[:30], 12, fisher_matrix(V.double()), **options)
    with ScratchEmbedding(V.shape, dtype, "cpu", tmp_path) as scratch:
        scratch.write(0, V)
        C = row_coordinates(scratch if on_disk else stored(V))
    assert C.shape[2] == 2 * len(V)
    in_row_space = SelectionProblem(
        12, fisher_matrix(C), **labelled(C, n_labeled), oversample=oversample
    )
    found = select(stored(C[:30]), in_row_space)
    assert found.positions.tolist() == expected[0]
    torch.testing.assert_close(found.gains.tolist(), expected[1], rtol=1e-8, atol=1e-14)


def labelled(V: Tensor, n_labeled: int) -> dict[str, Any]:
    if not n_labeled:
        return {}
    return {"fisher_labeled": fisher_matrix(V[30:].double()), "n_labeled": n_labeled}


# --- Memory ---------------------------------------------------------------------------

N_COLUMNS = 16_000


def most_bytes_of_tensors(work: Callable[[], None]) -> int:
    """Return the most that PyTorch's allocator has given out at a time during some work.

    Of a process's size no test can tell: the C library keeps some of what is freed.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(accumulate(change for _, change in changes))


@pytest.mark.parametrize(
    ("n", "n_labeled", "options", "place"),
    [
        (110, 30, {"memory_share": 1e-9}, "scratch file"),
        # Most rows are of labelled samples; in memory, where the embedding counts too.
        (20, 120, {"memory_share": 1e-9}, "scratch file"),
        (110, 30, {}, "memory"),
    ],
)
def test_few_rows_take_no_more_than_was_estimated(
    n: int, n_labeled: int, options: dict[str, float], place: str
) -> None:
    X = np.random.default_rng(0).normal(size=(n + n_labeled, N_COLUMNS // 10)).astype("float32")
    module = nn.Linear(N_COLUMNS // 10, 10, bias=False)
    net = NeuralNetClassifier(module, criterion=nn.CrossEntropyLoss).initialize()
    sampler = FisherMaskSampler(mask="all", batch_size=10, random_state=0, **PUBLISHED, **options)
    taken = most_bytes_of_tensors(lambda: sampler(net, X[:n], 5, X_labeled=X[n:]))
    info = sampler.query_info_
    estimate = MemoryEstimate(n, 9, N_COLUMNS, torch.float32, n_others=n_labeled)
    assert info["dimensions"] == estimate.dimensions == 1260
    assert info["embedding_storage"] == place
    # All of it in float64, with a decomposition, would take several times that.
    in_memory = estimate.embedding_bytes if place == "memory" else 0
    assert taken <= estimate.matrices_bytes + estimate.gains_bytes + in_memory
