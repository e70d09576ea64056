from __future__ import annotations

from typing import Any

import pytest
import torch

from skfishermask.selection import SelectionProblem
from tests import oracles
from tests.problems import labeled, problem


@pytest.mark.parametrize("regularization", [0.01, 1.0, 50.0])
@pytest.mark.parametrize("with_labeled", [False, True])
def test_the_start_is_that_of_the_oracle(with_labeled: bool, regularization: float) -> None:
    V, target = problem(9, 2, 6)
    options: dict[str, Any] = labeled(6) if with_labeled else {}
    chosen = SelectionProblem(4, target, regularization=regularization, **options)
    inverse, product = chosen.start()
    options["regularization"] = regularization
    oracle = torch.linalg.inv(oracles.batch_information(V, [], 4, **options))
    # M is divided by the scale, so that V need not be multiplied by its root.
    oracle = oracle * chosen.scale
    dense = inverse if isinstance(inverse, torch.Tensor) else inverse * torch.eye(6).double()
    torch.testing.assert_close(dense, oracle)
    torch.testing.assert_close(product, oracle @ target @ oracle)
    assert torch.equal(product, product.T)
    assert isinstance(inverse, torch.Tensor) == with_labeled


def test_labelled_samples_count_by_their_number() -> None:
    _, target = problem(9, 2, 6)
    alone = SelectionProblem(4, target)
    assert (alone.scale, alone.shift, alone.weighted_labeled) == (1, 1, None)
    beside = SelectionProblem(4, target, **(labeled(6) | {"n_labeled": 12}))
    assert (beside.scale, beside.shift) == (0.25, 4)
    assert beside.weighted_labeled is not None
    torch.testing.assert_close(beside.weighted_labeled, 3 * labeled(6)["fisher_labeled"])
    assert SelectionProblem(4, target, target, n_labeled=0).weighted_labeled is None
