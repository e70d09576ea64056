from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from skfishermask.fisher.directions import check_n_directions, kept_trace, squared_norms
from skfishermask.fisher.likelihood import (
    Categorical,
    UnweightedCategorical,
    categorical_factor,
)


def probabilities(n: int, n_classes: int, temperature: float, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, n_classes, generator=generator, dtype=torch.float64)
    return (logits * temperature).softmax(1)


def covariance(p: torch.Tensor) -> torch.Tensor:
    return torch.diag_embed(p) - p[:, :, None] * p[:, None, :]


@given(n_classes=st.integers(2, 12), temperature=st.floats(0, 200), seed=st.integers(0, 2**32 - 1))
def test_rows_factorise_the_covariance(n_classes: int, temperature: float, seed: int) -> None:
    p = probabilities(3, n_classes, temperature, seed)
    R = categorical_factor(p)
    assert R.shape == (3, n_classes - 1, n_classes)
    assert torch.isfinite(R).all()
    torch.testing.assert_close(R.mT @ R, covariance(p), rtol=1e-12, atol=1e-15)


def test_a_small_tail_keeps_its_digits() -> None:
    # 1 - p_1 would lose all digits of this tail.
    p = torch.tensor([[1.0, 3e-30, 1e-30]], dtype=torch.float64)
    R = categorical_factor(p)[0]
    # The trace of diag(p) - p p^T is 2 (p_2 + p_3) to first order.
    assert R.square().sum() == pytest.approx(8e-30, rel=1e-12)


@pytest.mark.parametrize("certain", [[1.0, 0.0, 0.0], [0.0, 0.5, 0.5], [0.0, 0.0, 1.0]])
def test_zero_probabilities_give_finite_rows(certain: list[float]) -> None:
    p = torch.tensor([certain], dtype=torch.float64)
    R = categorical_factor(p)
    torch.testing.assert_close(R.mT @ R, covariance(p), rtol=0, atol=1e-16)


@pytest.mark.parametrize("r", [1, 2, 3, 5])
def test_truncation_has_the_residual_of_the_closed_form(r: int) -> None:
    p = probabilities(4, 6, 2.0)
    residual = covariance(p) - categorical_factor(p, r).mT @ categorical_factor(p, r)
    sorted_p = p.sort(1, descending=True).values
    dropped = torch.zeros(4, dtype=torch.float64)
    for i in range(r, 5):  # The dropped rows, by their formula.
        s = sorted_p[:, i + 1 :].sum(1)
        before = sorted_p[:, i:].sum(1)
        tail = sorted_p[:, i + 1 :].square().sum(1)
        dropped += sorted_p[:, i] * s / before * (1 + tail / s.square())
    torch.testing.assert_close(residual.diagonal(dim1=1, dim2=2).sum(1), dropped)
    assert torch.linalg.eigvalsh(residual).min() > -1e-15  # What is dropped is information.


def test_the_first_row_is_the_binary_view() -> None:
    p = probabilities(5, 4, 1.0)
    q = p.max(1).values
    row = categorical_factor(p, 1)[:, 0]
    # The event "the predicted class or another": its score has variance q (1 - q).
    best = row.gather(1, p.argmax(1, keepdim=True))[:, 0]
    torch.testing.assert_close(best, (q * (1 - q)).sqrt())


def test_unweighted_rows_are_the_scores_in_logit_space() -> None:
    p = probabilities(3, 5, 1.0)
    order = p.argsort(1, descending=True)
    expected = torch.eye(5).double()[order] - p[:, None, :]
    unweighted = UnweightedCategorical()
    torch.testing.assert_close(unweighted.factor(p.log()), expected)
    torch.testing.assert_close(unweighted.directions(p.log(), 2), expected[:, :2])
    assert unweighted.rank(p) == 5
    assert Categorical().rank(p) == 4


def test_kept_trace() -> None:
    p = probabilities(7, 5, 1.5)
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
