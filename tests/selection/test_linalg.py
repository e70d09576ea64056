from __future__ import annotations

import numpy as np
import pytest
import torch

from skfishermask.selection.linalg import (
    QuadraticForm,
    fingerprints,
    first_of_equals,
    is_duplicate,
    trace_gains,
)
from skfishermask.selection.rounding import INVERSE_ERROR_FACTOR, unit_roundoff
from tests.problems import problem


@pytest.mark.parametrize("n", [20, 100])
@pytest.mark.parametrize("r", [1, 9, 16, 17, 40])
def test_trace_gains(r: int, n: int, any_device: str) -> None:
    v = torch.randn(n, r, 2 * r, dtype=torch.float64, device=any_device)
    a, b = v @ v.mT, v @ v.mT @ v @ v.mT
    a[3] = a[7] = -2 * torch.eye(r)
    b[5] = torch.nan
    gains, size = trace_gains(a, b)
    inverse = torch.linalg.inv(torch.eye(r, device=any_device) + a)
    right = [i for i in range(n) if i not in (3, 5, 7)]
    expected = (inverse @ b).diagonal(dim1=1, dim2=2).sum(1)
    torch.testing.assert_close(gains[right], expected[right], rtol=1e-9, atol=0)
    largest = inverse.diagonal(dim1=1, dim2=2).amax(1)
    torch.testing.assert_close(size[right], largest[right], rtol=1e-6, atol=0)
    assert not gains[[3, 5, 7]].any()
    assert size[[3, 5, 7]].isinf().all()


@pytest.mark.parametrize("decay", [0.0, 2.0, 4.0])
@pytest.mark.parametrize("n", [20, 100])
@pytest.mark.parametrize("r", [1, 9, 40])
def test_float32_gains_are_off_as_if_a_were_by_a_few_roundings(
    r: int, n: int, decay: float, any_device: str
) -> None:
    # From nearly nothing to much more than I, and from round to flat.
    scale = torch.logspace(-3, 3, n, dtype=torch.float64)[:, None, None]
    widths = torch.arange(1, r + 1).double() ** -decay
    v, w = torch.randn(2, n, r, r, dtype=torch.float64)
    a, b = ((x @ (widths[:, None] * x.mT)).to(any_device) for x in (scale * v, w))
    b += 1e3 * (w - w.mT).to(any_device)
    exact, _ = trace_gains(a, b)
    gains, size = trace_gains(a, b, torch.float32)
    assert gains.dtype == size.dtype == torch.float64
    sure = size.isfinite()
    assert (sure | (a.diagonal(dim1=1, dim2=2).sum(1) > 1e5)).all()
    off = (
        INVERSE_ERROR_FACTOR
        * unit_roundoff(torch.float32)
        * (1 + a.diagonal(dim1=1, dim2=2).sum(1))
    )
    assert ((gains - exact).abs() <= off * exact * size)[sure].all()
    assert not torch.equal(gains, exact)


@pytest.mark.parametrize("k", [1, 5, 40])
def test_quadratic_form(k: int) -> None:
    v, matrix = torch.randn(6, 3, k).double(), problem(20, 3, k)[1]
    for q in (matrix, 0.3):
        norms = torch.linalg.vector_norm(v, dim=(1, 2))
        found, error = QuadraticForm(q)(v, norms)
        dense = q if isinstance(q, torch.Tensor) else q * torch.eye(k).double()
        torch.testing.assert_close(found, v @ dense @ v.mT)
        exact = v.numpy().astype(np.longdouble)
        exact = exact @ dense.numpy() @ exact.transpose(0, 2, 1)
        off = np.linalg.norm((found.numpy() - exact).astype(float), axis=(1, 2))
        assert (off <= error.numpy()).all()
        # Relative to |V| |Q| |V|.
        size = norms.square() * torch.linalg.matrix_norm(dense)
        assert (error <= (1 + k) * 2.0**-50 * size).all()


def test_fingerprints_are_equal_for_equal_samples() -> None:
    v = torch.randn(300, 2, 7)
    v[40], v[200], v[7] = v[3], v[3], v[100]
    v[50], v[60] = 0.0, -0.0
    # One bit of one entry.
    v[9] = v[8]
    v[9, 1, 6] = torch.nextafter(v[8, 1, 6], torch.tensor(9.0))
    again = torch.nonzero(is_duplicate(fingerprints(v))).flatten().tolist()
    assert again == [40, 60, 100, 200]


def test_first_of_equals(any_device: str) -> None:
    marks = torch.tensor([7, -3, 7, 5, -3, 7], device=any_device)
    first = first_of_equals(marks)
    assert first is not None
    assert first.tolist() == [0, 1, 0, 3, 1, 0]
    assert first_of_equals(marks[:2]) is None
