from __future__ import annotations

import pytest
import torch

from skfishermask.selection.updates import (
    N_FLOAT64_PICKS,
    ExactGains,
    Pick,
    concatenate_factors,
    split_picks,
)


def picks(n: int, k: int = 5, r: int = 2) -> list[Pick]:
    factors = torch.randn(n, k, 2 * r, dtype=torch.float64)
    numbers = torch.arange(n)
    return [Pick(numbers[i], numbers[i].double(), numbers[i] >= 0, factors[i]) for i in range(n)]


@pytest.mark.parametrize("n_before", [0, 3, 6, 40])
@pytest.mark.parametrize("n", [0, 1, 6, 7, 100])
def test_picks_are_split_in_order_and_by_precision(n: int, n_before: int) -> None:
    some = picks(n)
    runs = list(split_picks(some, n_before))
    assert [pick for _, run in runs for pick in run] == some
    starts = [start for start, _ in runs]
    assert starts == [n_before + sum(len(run) for _, run in runs[:i]) for i in range(len(runs))]
    for start, run in runs:
        assert 0 < len(run) <= 32
        # A run is in one precision.
        assert start + len(run) <= N_FLOAT64_PICKS or start >= N_FLOAT64_PICKS


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("n", [1, 4])
def test_factors_are_side_by_side(n: int, dtype: torch.dtype) -> None:
    some = picks(n, k=7, r=3)
    factors, norms = concatenate_factors(some, dtype)
    assert (factors.shape, factors.dtype) == ((7, n * 6), dtype)
    for i, pick in enumerate(some):
        assert torch.equal(factors[:, 6 * i : 6 * i + 6], pick.factors.to(dtype))
        # Column after column, or a product with few of them takes several times as long.
        assert factors.T.is_contiguous()
        for half, norm in zip(pick.factors.split(3, dim=1), norms[i], strict=True):
            assert norm == pytest.approx(float(half.norm()), rel=1e-14)


def test_a_pick_keeps_its_gain_in_float64() -> None:
    (pick,) = picks(1)
    moved = pick.to("cpu", torch.float32)
    assert (moved.gain.dtype, moved.factors.dtype) == (torch.float64, torch.float32)
    assert (moved.position, moved.gain, moved.is_verified) == (0, 0, True)


def test_exact_gains_are_concatenated() -> None:
    shapes = [(2, 12), (2, 2), (2, 2), (2,), (), ()]
    one, other = (ExactGains(*(torch.randn(n, *shape) for shape in shapes)) for n in (3, 1))
    both = ExactGains.concatenate([one, other])
    assert torch.equal(both.products, torch.cat([one.products, other.products]))
    assert torch.equal(both.gain_error, torch.cat([one.gain_error, other.gain_error]))
    assert ExactGains.concatenate([one]) is one
