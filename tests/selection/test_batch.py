from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from skfishermask.selection import select_batch
from skfishermask.selection.storage import ScratchEmbedding
from tests import oracles
from tests.problems import fisher, labeled, problem

# (n, r, k, K): a batch of several times k rows, one row, more rows than columns, a few columns.
SHAPES = [(210, 2, 12, 200), (150, 4, 30, 40), (80, 1, 25, 20), (40, 6, 4, 12), (30, 3, 1, 5)]
# Objectives after float32 selection against the oracle's.
TOLERANCE = 1e-4


def reached(embedding: Tensor, positions: Tensor, target: Tensor, **options: Any) -> float:
    options.pop("oversample", None)
    chosen = oracles.batch_information(embedding, positions, len(positions), **options)
    return oracles.objective(chosen, target)


def assert_same(found: tuple[Tensor, Tensor], expected: tuple[list[int], list[float]]) -> None:
    positions, gains = found
    assert positions.tolist() == expected[0]
    np.testing.assert_allclose(gains.tolist(), expected[1], rtol=1e-8, atol=1e-300)


# --- Against the oracle ---------------------------------------------------------------


@pytest.mark.parametrize("oversample", [1.0, 1.3, 2.0])
@pytest.mark.parametrize("with_labeled", [False, True])
@pytest.mark.parametrize(("n", "r", "k", "n_instances"), SHAPES)
def test_float64_gives_the_oracles_batch(
    n: int, r: int, k: int, n_instances: int, with_labeled: bool, oversample: float, any_device: str
) -> None:
    embedding, target = problem(n, r, k)
    options = {"oversample": oversample, "regularization": 0.3}
    options |= labeled(k) if with_labeled else {}
    expected = oracles.select_batch_oracle(embedding, n_instances, target, **options)
    found = select_batch(embedding.to(any_device), n_instances, target, **options)
    assert found[0].device == found[1].device == embedding.to(any_device).device
    assert (found[0].dtype, found[1].dtype) == (torch.int64, torch.float64)
    assert_same(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("oversample", [1.0, 2.0])
@pytest.mark.parametrize("with_labeled", [False, True])
def test_lower_precision_reaches_the_oracles_objective(
    dtype: torch.dtype, with_labeled: bool, oversample: float, any_device: str
) -> None:
    options: dict[str, Any] = {"oversample": oversample} | (labeled(40) if with_labeled else {})
    for seed, decay in enumerate((0.0, 1.0, 2.0)):
        embedding, target = problem(120, 4, 40, decay=decay, scale=3.0, seed=seed)
        embedding = embedding.to(dtype)
        expected, _ = oracles.select_batch_oracle(embedding, 25, target, **options)
        positions, _ = select_batch(embedding.to(any_device), 25, target, **options)
        best = reached(embedding, torch.tensor(expected), target, **options)
        assert reached(embedding, positions.cpu(), target, **options) == pytest.approx(
            best, rel=TOLERANCE
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_only_storage(dtype: torch.dtype, any_device: str) -> None:
    embedding, target = problem(120, 3, 40)
    stored = embedding.to(any_device, dtype)
    positions, gains = select_batch(stored, 30, target)
    upcast_positions, upcast_gains = select_batch(stored.float(), 30, target)
    assert torch.equal(positions, upcast_positions)
    assert torch.equal(gains, upcast_gains)


@pytest.mark.parametrize("seed", range(12))
def test_float32_settles_near_ties(seed: int, any_device: str) -> None:
    # Where float32 products alone differ from the oracle in every second problem.
    embedding, target = problem(300, 4, 60, decay=0.0, seed=seed)
    embedding = embedding.float()
    expected = oracles.select_batch_oracle(embedding, 25, target)
    assert_same(select_batch(embedding.to(any_device), 25, target), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [3.0, 300.0])
def test_gains_that_collapse(scale: float, dtype: torch.dtype, any_device: str) -> None:
    embedding, target = problem(150, 3, 24, decay=0.0, scale=scale)
    embedding = embedding.to(dtype)
    expected = oracles.select_batch_oracle(embedding, 40, target)
    assert expected[1][0] > 1e4 * expected[1][-1]
    positions, gains = select_batch(embedding.to(any_device), 40, target)
    assert positions.tolist() == expected[0]
    np.testing.assert_allclose(gains.tolist(), expected[1], rtol=1e-6)


def test_states_that_float32_spoils_are_replaced_by_exact_gains(any_device: str) -> None:
    # A starts at 1e11: what float32 leaves of I + A after some picks is not positive definite.
    embedding, target = problem(150, 3, 24, decay=0.0, scale=3e4)
    embedding = embedding.float()
    expected, _ = oracles.select_batch_oracle(embedding, 40, target)
    positions, gains = select_batch(embedding.to(any_device), 40, target)
    assert (gains > 0).all()
    best = reached(embedding, torch.tensor(expected), target)
    assert reached(embedding, positions.cpu(), target) == pytest.approx(best, rel=TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gains_are_the_decrease_of_the_objective(dtype: torch.dtype) -> None:
    embedding, target = problem(60, 3, 20)
    options = labeled(20)
    positions, gains = select_batch(embedding.to(dtype), 10, target, **options)
    values = [
        oracles.objective(
            oracles.batch_information(embedding.to(dtype), positions[:step], 10, **options), target
        )
        for step in range(11)
    ]
    np.testing.assert_allclose(gains, -np.diff(values), rtol=1e-9)


@given(data=st.data())
def test_any_shape(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 14), "n")
    r = data.draw(st.integers(1, 5), "r")
    k = data.draw(st.integers(1, 7), "k")
    n_instances = data.draw(st.integers(1, n) | st.just(n), "n_instances")
    embedding, _ = problem(n, r, k, seed=data.draw(st.integers(0, 99), "seed"))
    copies = data.draw(st.lists(st.tuples(*[st.integers(0, n - 1)] * 2), max_size=4), "copies")
    for row, other in copies:
        embedding[row] = embedding[other]
    embedding[data.draw(st.lists(st.integers(0, n - 1), max_size=3), "zero rows")] = 0
    target = data.draw(st.sampled_from([fisher(embedding), torch.eye(k)]), "fisher")
    options: dict[str, Any] = {
        "oversample": data.draw(st.sampled_from([1.0, 1.5, 2.0]), "oversample"),
        "preselected": data.draw(
            st.lists(st.integers(0, n - 1), max_size=n_instances, unique=True), "preselected"
        ),
        "regularization": data.draw(st.sampled_from([0.01, 1.0]), "regularization"),
    }
    options |= labeled(k) if data.draw(st.booleans(), "labelled") else {}
    expected = oracles.select_batch_oracle(embedding, n_instances, target, **options)
    positions, gains = select_batch(embedding, n_instances, target, **options)
    assert positions.tolist() == expected[0]
    np.testing.assert_allclose(gains, expected[1], rtol=1e-8, atol=1e-12 * max(expected[1]))

    positions, gains = select_batch(embedding.float(), n_instances, target, **options)
    assert sorted(set(positions.tolist())) == sorted(positions.tolist())
    assert torch.isfinite(gains).all()
    assert (gains >= -1e-12 * gains.max()).all()


# --- Properties -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("oversample", [1.0, 2.0])
def test_permuted_pool_gives_the_same_samples(oversample: float, dtype: torch.dtype) -> None:
    embedding, target = problem(100, 3, 20)
    embedding = embedding.to(dtype)
    positions, gains = select_batch(embedding, 20, target, oversample=oversample)
    order = torch.randperm(100)
    found, found_gains = select_batch(embedding[order], 20, target, oversample=oversample)
    assert torch.equal(order[found], positions)
    torch.testing.assert_close(found_gains, gains, rtol=1e-10, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equal_candidates_are_taken_from_the_lowest_position(dtype: torch.dtype) -> None:
    embedding, target = problem(40, 3, 20)
    embedding = embedding.to(dtype).repeat(2, 1, 1)
    positions, _ = select_batch(embedding, 40, target)
    for position in positions.tolist():
        twin = (position + 40) % 80
        before = positions.tolist()[: positions.tolist().index(position)]
        assert position < 40 or twin in before


@pytest.mark.parametrize(
    "block", [0, 1, *(pytest.param(i, marks=pytest.mark.slow) for i in (2, 3))]
)
def test_few_distinct_rows_end_with_ties_to_the_first(block: int) -> None:
    for seed in range(25 * block, 25 * (block + 1)):
        rng = np.random.default_rng(seed)
        n, r, k = rng.integers(1, [60, 4, 6])
        kinds = rng.integers(-1, 2, size=(rng.integers(1, 9), r, k)) * rng.integers(2)
        embedding = torch.as_tensor(kinds[rng.integers(len(kinds), size=n)]).double()
        n_instances, target = int(rng.integers(1, min(n, 10) + 1)), fisher(embedding)
        options: dict[str, Any] = {
            "oversample": rng.choice([1.0, 1.5]),
            "regularization": rng.choice([0.25, 1.0]),
        } | (labeled(k) if rng.integers(2) else {})
        expected, _ = oracles.select_batch_oracle(embedding, n_instances, target, **options)
        for dtype in (torch.float64, torch.float32):
            found, _ = select_batch(embedding.to(dtype), n_instances, target, **options)
            assert found.tolist() == expected, (seed, dtype)


def test_a_sample_without_which_nearly_nothing_is_known_may_be_dropped() -> None:
    # I - A of the two picked is near zero, and tr A near -2.
    embedding = torch.zeros(8, 2, 4, dtype=torch.float64)
    embedding[4] = torch.tensor([[-1, 1, 1, 0], [-1, 0, 0, -1]])
    embedding[0] = torch.tensor([[0, 1, -2, -2], [-1, 1, 2, -2]])
    embedding[3] = torch.tensor([[1, 1, 1, 1], [-1, 0, -1, 1]])
    target, options = fisher(embedding), {"regularization": 1 / 64, "oversample": 1.5}
    expected = oracles.select_batch_oracle(embedding, 1, target, **options)
    assert_same(select_batch(embedding, 1, target, **options), expected)


def test_zero_embeddings_are_taken_in_order() -> None:
    positions, gains = select_batch(torch.zeros(9, 2, 3), 9, torch.eye(3), oversample=2.0)
    assert positions.tolist() == list(range(9))
    assert not gains.any()


def test_fisher_labeled_without_labelled_samples_has_no_weight() -> None:
    embedding, target = problem(30, 2, 8)
    found = select_batch(embedding, 5, target, fisher_labeled=target, n_labeled=0)
    for one, other in zip(found, select_batch(embedding, 5, target), strict=True):
        assert torch.equal(one, other)


def test_preselected_come_first_and_stay(any_device: str) -> None:
    embedding, target = problem(60, 3, 20)
    options = {"preselected": [41, 7, 30], "oversample": 2.0}
    expected = oracles.select_batch_oracle(embedding, 10, target, **options)
    found = select_batch(embedding.to(any_device), 10, target, **options)
    assert found[0][:3].tolist() == [41, 7, 30]
    assert_same(found, expected)


def test_everything_preselected() -> None:
    embedding, target = problem(60, 3, 20)
    chosen = list(range(50, 0, -1))
    positions, gains = select_batch(embedding, 50, target, preselected=np.array(chosen))
    assert positions.tolist() == chosen
    assert (gains > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_input_is_not_changed(dtype: torch.dtype) -> None:
    embedding, target = problem(30, 3, 8)
    # Neither contiguous nor detached.
    embedding = embedding.to(dtype).mT.contiguous().mT.requires_grad_()
    tensors = [embedding, target, labeled(8)["fisher_labeled"]]
    before = [tensor.detach().clone() for tensor in tensors]
    _, gains = select_batch(
        embedding, 10, target, fisher_labeled=tensors[2], n_labeled=3, oversample=2
    )
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
    assert not gains.requires_grad


@pytest.mark.parametrize("fetched", [False, True])
def test_progress_counts_the_samples_taken(fetched: bool) -> None:
    embedding, target = problem(60, 3, 20)
    told: list[int] = []
    with ScratchEmbedding(embedding.shape, embedding.dtype, "cpu") as scratch:
        scratch.write(0, embedding)
        where = scratch if fetched else embedding
        options = {"preselected": [3, 1], "oversample": 1.5}
        select_batch(where, 20, target, **options, on_pick=told.append)
    assert sum(told) == 30
    assert len(told) > 3


def test_long_pools_are_read_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    embedding, target = problem(100, 3, 20)
    whole = select_batch(embedding.half(), 30, target)
    monkeypatch.setattr("skfishermask.selection.storage._CHUNK_BYTES", 7 * 3 * 20 * 4)
    monkeypatch.setattr("skfishermask.selection.storage._MIN_CHUNK_VECTORS", 1)
    monkeypatch.setattr("skfishermask.selection.storage._CUDA_CHUNK_FACTOR", 1)
    parts = select_batch(embedding.half(), 30, target)
    assert torch.equal(whole[0], parts[0])
    torch.testing.assert_close(whole[1], parts[1], rtol=1e-12, atol=0)
