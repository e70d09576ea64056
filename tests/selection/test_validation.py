"""Errors of the arguments of `select_batch`, and what it takes besides."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from skfishermask.selection import select_batch
from skfishermask.selection.validation import check_count, check_fisher, check_preselected

GOOD: dict[str, Any] = {
    "embedding": torch.ones(4, 2, 3),
    "n_instances": 2,
    "fisher": torch.eye(3),
}


def spoiled(tensor: Tensor, index: tuple[int, ...], value: float) -> Tensor:
    tensor = tensor.clone()
    tensor[index] = value
    return tensor


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"embedding": np.ones((4, 2, 3))}, TypeError, "embedding must be a torch.Tensor.*ndarray"),
        ({"embedding": torch.ones(4, 2, 3).int()}, TypeError, "embedding .*floating.*torch.int32"),
        ({"embedding": torch.ones(4, 3)}, ValueError, r"embedding .*\(n, r, k\).*got \(4, 3\)"),
        ({"embedding": torch.ones(4, 0, 3)}, ValueError, r"embedding .*got \(4, 0, 3\)"),
        ({"embedding": torch.ones(4, 2, 5)}, ValueError, r"fisher .*\(5, 5\).*got \(3, 3\)"),
        (
            {"embedding": spoiled(torch.ones(4, 2, 3), (2, 1, 0), math.nan)},
            ValueError,
            "embedding must be finite, row 2",
        ),
        (
            {"embedding": spoiled(torch.ones(4, 2, 3).half(), (3, 1, 0), -math.inf)},
            ValueError,
            "embedding must be finite, row 3",
        ),
        ({"n_instances": 0}, ValueError, "n_instances .*from 1 to 4, got 0"),
        ({"n_instances": 5}, ValueError, "n_instances .*from 1 to 4, got 5"),
        ({"n_instances": 2.0}, ValueError, "n_instances .*an int.*got 2.0"),
        ({"n_instances": True}, ValueError, "n_instances .*an int.*got True"),
        ({"embedding": torch.ones(0, 2, 3)}, ValueError, r"embedding .*got \(0, 2, 3\)"),
        ({"embedding": torch.ones(4, 1, 2, 3)}, ValueError, r"embedding .*got \(4, 1, 2, 3\)"),
        ({"fisher": np.eye(3)}, TypeError, "fisher must be a torch.Tensor.*ndarray"),
        ({"fisher": torch.ones(3)}, ValueError, r"fisher .*\(3, 3\).*got \(3,\)"),
        ({"fisher": spoiled(torch.eye(3), (0, 2), 0.5)}, ValueError, "fisher .*symmetric.*0.5"),
        ({"fisher": spoiled(torch.eye(3), (1, 1), math.nan)}, ValueError, "fisher .*finite"),
        ({"fisher_labeled": torch.eye(2)}, ValueError, r"fisher_labeled .*got \(2, 2\)"),
        (
            {"fisher_labeled": -9 * torch.eye(3), "n_labeled": 5},
            ValueError,
            "fisher_labeled must be positive semi-definite",
        ),
        ({"n_labeled": -1}, ValueError, "n_labeled .*from 0 up, got -1"),
        ({"n_labeled": 1.5}, ValueError, "n_labeled .*an int.*got 1.5"),
        ({"regularization": 0}, ValueError, "regularization .*above 0.*got 0"),
        ({"regularization": math.nan}, ValueError, "regularization .*got nan"),
        ({"oversample": 0.9}, ValueError, "oversample .*at least 1.*got 0.9"),
        ({"oversample": math.inf}, ValueError, "oversample .*finite, got inf"),
        ({"preselected": [0, 1, 2]}, ValueError, "preselected .*n_instances=2.*got 3"),
        ({"preselected": [4]}, ValueError, "preselected.*from 0 to 3, got 4"),
        ({"preselected": [-1]}, ValueError, "preselected.*from 0 to 3, got -1"),
        ({"preselected": [1.0]}, ValueError, "preselected.*an int.*got 1.0"),
        ({"preselected": [1, 1]}, ValueError, r"preselected .*distinct.*\[1, 1\]"),
    ],
)
def test_arguments_of_select_batch(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        select_batch(**(GOOD | change))


def test_numpy_integers_are_counts_and_positions() -> None:
    count = check_count("n", np.int32(3), 1, 3)
    assert (type(count), count) == (int, 3)
    assert check_preselected(np.array([2, 0]), 2, 3) == [2, 0]
    assert check_preselected(None, 2, 3) == []


def test_a_float32_product_counts_as_symmetric() -> None:
    half = torch.randn(60, 8)
    product = half.T @ half
    product[0, 1] *= 1 + 1e-6
    checked = check_fisher("fisher", product, 8, torch.device("cpu"))
    assert checked.dtype == torch.float64
    assert torch.equal(checked, checked.T)
    torch.testing.assert_close(checked, product.double(), rtol=1e-5, atol=0)
