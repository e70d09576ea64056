from __future__ import annotations

import pytest
import torch

from skfishermask.fisher.directions import (
    check_n_directions,
    kept_trace,
    random_signs,
    squared_norms,
)
from skfishermask.fisher.likelihood import categorical_factor


def test_signs_are_fair_and_independent() -> None:
    signs = random_signs(0, 0, torch.device("cpu"), (50, 20, 30))
    assert signs.unique().tolist() == [-1, 1]
    others = [
        random_signs(0, 1, signs.device, signs.shape),
        random_signs(1, 0, signs.device, signs.shape),
        signs.roll(1, 1),
        signs.roll(1, 2),
    ]
    for values in [signs, *(signs * other for other in others)]:
        # Four standard errors.
        assert abs(float(values.mean())) < 4 / values.numel() ** 0.5
    # One sample's are those of the same number in another batch, and of a longer one.
    one = random_signs(3, 0, signs.device, (1, 20, 40))
    assert torch.equal(one[..., :30], signs[3:4])


def test_kept_trace() -> None:
    p = (1.5 * torch.randn(7, 5).double()).softmax(1)
    kept = kept_trace(squared_norms(categorical_factor(p)))
    for r in range(1, 5):
        share = categorical_factor(p, r).square().sum() / (1 - p.square().sum(1)).sum()
        assert kept[r - 1] == pytest.approx(float(share))
    certain = categorical_factor(torch.eye(3).double())
    assert kept_trace(squared_norms(certain)).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("wrong", [0, -1, 0.0, 1.0, 1.5, True, "all", float("nan")])
def test_wrong_n_directions(wrong: object) -> None:
    with pytest.raises(ValueError, match=r"n_directions must be .* got"):
        check_n_directions(wrong)


@pytest.mark.parametrize("right", [None, 1, 7, 0.5])
def test_right_n_directions(right: object) -> None:
    check_n_directions(right)
