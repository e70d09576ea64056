from __future__ import annotations

import pytest
import torch

from skfishermask.fisher import FisherSum, fisher_matrix
from tests.fisher.common import error


@pytest.mark.parametrize("n", [23, 9_001])  # The second is summed in several parts.
@pytest.mark.parametrize("k", [1, 5, 48])
def test_fisher_matrix(n: int, k: int) -> None:
    V = torch.randn(n, 3, k)
    expected = (V.double().mT @ V.double()).mean(0)
    for dtype, tolerance in [(torch.float64, 1e-13), (torch.float32, 5e-6), (torch.bfloat16, 2e-2)]:
        found = fisher_matrix(V.to(dtype))
        assert found.dtype == torch.float64
        assert torch.equal(found, found.T)
        assert error(found, expected) < tolerance
        assert error(found, (V.to(dtype).double().mT @ V.to(dtype).double()).mean(0)) < 2e-5


def test_a_sum_goes_on_after_a_mean_and_in_another_dtype() -> None:
    V = torch.randn(50, 3, 11).double()
    total = FisherSum(11, V.device)
    for n, part in ((20, V[:20]), (21, V[20:21]), (50, V[21:].float())):
        total.add(part)
        assert error(total.mean(), (V[:n].mT @ V[:n]).mean(0)) < 1e-6
