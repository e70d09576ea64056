from __future__ import annotations

import re
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


@pytest.mark.parametrize("n_labeled", [3, 40])
def test_a_regularization_below_rounding_is_named_with_one_that_works(n_labeled: int) -> None:
    # Of rank 6 in 12 dimensions, summed in float32.
    rows = torch.randn(6, 12, generator=torch.Generator().manual_seed(0))
    labeled = (rows.T @ rows).double()
    labeled = (labeled + labeled.T) / 2
    assert torch.linalg.eigvalsh(labeled)[0] < 0

    def start(regularization: float) -> None:
        SelectionProblem(5, torch.eye(12).double(), labeled, n_labeled, regularization).start()

    message = "regularization=1e-12 is too small .* labelled samples"
    with pytest.raises(ValueError, match=message) as caught:
        start(1e-12)
    [least] = re.findall(r"Set regularization to (\S+) or more", str(caught.value))
    start(float(least))
    assert float(least) < 1e-4


def test_an_indefinite_matrix_is_told_by_its_eigenvalues() -> None:
    indefinite = torch.diag(torch.tensor([1.0, 3.0, -2.0])).double()
    given = SelectionProblem(5, torch.eye(3).double(), 2 * indefinite, 5)
    with pytest.raises(ValueError, match=r"fisher_labeled .*eigenvalues down to -2 .* 3\."):
        given.start()
