"""Coverage of the inputs: the greedy choice, and how large its share of a batch is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from skfishermask import select_batch
from skfishermask.coverage import (
    KernelFeatures,
    coverage_problem,
)
from skfishermask.fisher import margin_uncertainty
from skfishermask.selection import select
from tests import oracles


def units(n: int, seed: int, d: int = 3) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(n, d, generator=rng, dtype=torch.float64))


def weights(n: int, seed: int) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.rand(n, generator=rng, dtype=torch.float64)


def selected(pool: Tensor, labeled: Tensor, w: Tensor, n_instances: int) -> list[int]:
    embedding, problem = coverage_problem(pool, labeled, w, n_instances, np.random.RandomState(0))
    return select(embedding, problem).positions.tolist()


@pytest.mark.parametrize("n_labeled", [0, 1, 5])
def test_each_pick_leaves_least_variance(n_labeled: int) -> None:
    pool, labeled, w = units(50, 0), units(n_labeled, 1), weights(50, 2)
    found = selected(pool, labeled, w, 12)
    assert found == oracles.select_by_coverage(pool, labeled, w, 12)
    assert found == selected(pool.float(), labeled.float(), w.float(), 12)
    assert found != selected(pool, labeled, torch.ones(50).double(), 12)


@pytest.mark.parametrize("radius", [1.0, 0.5])
def test_features_are_those_of_the_posterior_covariance(radius: float) -> None:
    pool, labeled, noise = units(40, 0), units(7, 1), 0.3
    features = KernelFeatures.at(pool, labeled, noise=noise, radius=radius)(pool)[:, 0]

    def prior(a: Tensor, b: Tensor) -> Tensor:
        return torch.exp(-torch.cdist(a, b).square() / radius**2)

    own = prior(labeled, labeled) + noise * torch.eye(7).double()
    cross = prior(labeled, pool)
    expected = prior(pool, pool) - cross.T @ torch.linalg.solve(own, cross)
    # Directions below the rounding of float32 are left out.
    torch.testing.assert_close(features @ features.T, expected, atol=1e-4, rtol=0)


def test_landmarks_of_a_large_pool_tell_nearly_as_much() -> None:
    """Clusters of a few dimensions, as features of a network are; against exact features."""
    rng = torch.Generator().manual_seed(0)
    centers = torch.randn(12, 6, generator=rng, dtype=torch.float64)
    rows = torch.randint(12, (900,), generator=rng)
    noise = torch.randn(900, 6, generator=rng, dtype=torch.float64)
    pool, labeled, w = normalize(centers[rows] + 0.5 * noise), units(10, 1, d=6), weights(900, 2)

    def left(picks: list[int]) -> float:
        return oracles.left_uncovered(pool, torch.cat([labeled, pool[picks]]), w)

    exact = features_of_all(pool, labeled, w, 20)
    some = selected(pool, labeled, w, 20)
    assert left([]) - left(some) > 0.97 * (left([]) - left(exact))


def features_of_all(pool: Tensor, labeled: Tensor, w: Tensor, n_instances: int) -> list[int]:
    embedding = KernelFeatures.at(pool, labeled)(pool)
    fisher = torch.einsum("nrk,n,nrl->kl", embedding, w, embedding)
    return select_batch(embedding, n_instances, fisher, regularization=0.02)[0].tolist()


def test_equal_candidates_are_taken_once_each() -> None:
    pool = units(1, 0).expand(9, 3)
    assert selected(pool, pool[:0], weights(9, 1), 9) == [*range(9)]


def test_equal_candidates_of_a_large_pool_tie() -> None:
    """With features in float32, and where equal directions have several lengths."""
    kinds = torch.arange(700) % 350
    pool = units(350, 0, d=20)[kinds] * torch.linspace(1, 3, 700)[:, None]
    embedding, problem = coverage_problem(
        pool, pool[:0], torch.ones(700), 60, np.random.RandomState(0)
    )
    assert embedding.dtype == torch.float32
    features = embedding.take(range(700))
    assert torch.equal(features[:350], features[350:])
    found = select(embedding, problem).positions.tolist()
    assert all(position < 350 or position - 350 in found for position in found)


def test_features_are_not_computed_in_a_mode_of_reduced_precision() -> None:
    pool, mode = units(600, 0).float(), torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        embedding, _ = coverage_problem(
            pool, pool[:0], pool[:, 0] ** 2, 3, np.random.RandomState(0)
        )
    finally:
        torch.set_float32_matmul_precision(mode)
    assert embedding.dtype == torch.float64


def few_distinct_rows(seed: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """A pool with many ties, labelled samples, weights, and a number of picks."""
    rng = np.random.default_rng(seed)
    d, n = rng.integers(1, 6), rng.integers(1, 90)
    kinds = normalize(torch.as_tensor(rng.integers(-1, 2, size=(rng.integers(1, 9), d))).float())
    pool = kinds[rng.integers(len(kinds), size=n)]
    labeled = kinds[rng.integers(len(kinds), size=rng.integers(0, 7))]
    levels = [np.ones(1), np.array([0, 0.5, 1]), rng.random(n)][rng.integers(3)]
    w = torch.as_tensor(rng.choice(levels, n)).float()
    return pool, labeled, w if w.any() else w + 1, int(rng.integers(1, min(n, 12) + 1))


@pytest.mark.parametrize(
    "block", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in (1, 2, 3))]
)
def test_few_distinct_rows_end_with_ties_to_the_first(block: int) -> None:
    for seed in range(50 * block, 50 * (block + 1)):
        pool, labeled, w, n = few_distinct_rows(seed)
        assert selected(pool, labeled, w, n) == oracles.select_by_coverage(pool, labeled, w, n)


def test_without_uncertainty_all_count_alike() -> None:
    pool, labeled = units(20, 0), units(2, 1)
    found = selected(pool, labeled, torch.zeros(20).double(), 20)
    assert found == selected(pool, labeled, torch.ones(20).double(), 20)


def test_many_labelled_samples_are_drawn_from() -> None:
    pool, labeled, w = units(30, 0), units(2_100, 1), weights(30, 2)
    assert len(set(selected(pool, labeled, w, 5))) == 5


def test_on_a_device(any_device: str) -> None:
    pool, labeled, w = units(300, 0).float(), units(5, 1).float(), weights(300, 2).float()
    there = [part.to(any_device) for part in (pool, labeled, w)]
    assert selected(*there, 8) == selected(pool, labeled, w, 8)


def test_the_margin_by_hand() -> None:
    p = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]])
    assert margin_uncertainty(p).tolist() == pytest.approx([0.8, 0.3])


@pytest.mark.parametrize("n_target", [40, 700])
def test_a_target_is_covered_in_place_of_the_pool(n_target: int) -> None:
    pool, labeled, target = units(50, 0), units(3, 1), units(n_target, 4)
    w = weights(n_target, 2)
    embedding, problem = coverage_problem(
        pool, labeled, w, 6, np.random.RandomState(0), target=target
    )
    found = select(embedding, problem).positions.tolist()
    assert found == oracles.select_by_coverage(pool, labeled, w, 6, target=target)
    assert found != oracles.select_by_coverage(pool, labeled, weights(50, 2), 6)
