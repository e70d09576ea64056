"""Sums over positions of products of features, against loops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from skfishermask.jacobian import contractions
from skfishermask.jacobian.contractions import (
    FeaturePairs,
    scatter_add_rows,
    squares_of_products,
    sums_of_pairs,
)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def test_pairs_of_flat_indices() -> None:
    groups, left, right = 2, 3, 4
    index = torch.tensor([0, 1, 7, 11, 12, 23])
    pairs = FeaturePairs.at(index, groups, left, right, torch.device("cpu"))
    operand = torch.arange(groups * left * right).view(groups, left, right)
    for flat, i, j in zip(index, pairs.left[pairs.i], pairs.right[pairs.j], strict=True):
        group = int(i) // left
        assert group == int(j) // right
        assert operand[group, int(i) % left, int(j) % right] == flat
    for features in (pairs.left, pairs.right):
        assert features.tolist() == sorted(set(features.tolist()))


# One position; many pairs, for which a product is made; few pairs, which are gathered in chunks.
@pytest.mark.parametrize(("length", "n_pairs", "chunk"), [(1, 6, 100), (3, 6, 100), (3, 2, 7)])
def test_sums_of_pairs(
    length: int, n_pairs: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contractions, "_CHUNK_NUMBERS", chunk)
    monkeypatch.setattr(contractions, "_PRODUCT_ADVANTAGE", 4)
    left, right = normal(2, 4, length), normal(2, 5, length)
    i, j = torch.randint(0, 4, (n_pairs,)), torch.randint(0, 5, (n_pairs,))
    pairs = FeaturePairs(torch.arange(4), torch.arange(5), i, j)
    expected = [
        [
            sum(left[s, a, t] * right[s, b, t] for t in range(length))
            for a, b in zip(i, j, strict=True)
        ]
        for s in range(2)
    ]
    torch.testing.assert_close(sums_of_pairs(left, right, pairs), torch.tensor(expected).double())


@pytest.mark.parametrize("length", [1, 4])
@pytest.mark.parametrize("large", [1, 1 << 16])
@pytest.mark.parametrize("cache", [8, 1 << 19])
def test_squares_of_products(
    length: int, large: int, cache: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contractions, "_LARGE_PRODUCT_NUMBERS", large)
    monkeypatch.setattr(contractions, "_CPU_CACHE_NUMBERS", cache)
    left, right = normal(5, 2, 3, length), normal(5, 2, length, 4)
    expected = torch.zeros(2, 3, 4, dtype=torch.float64)
    for x, y in zip(left, right, strict=True):
        expected += torch.stack([a @ b for a, b in zip(x, y, strict=True)]) ** 2
    torch.testing.assert_close(squares_of_products(left, right), expected)


def test_scatter_add_rows() -> None:
    index, rows = torch.tensor([3, 0, 3, 1]), normal(4, 2)
    expected = torch.zeros(5, 2, dtype=torch.float64)
    for position, row in zip(index, rows, strict=True):
        expected[position] += row
    torch.testing.assert_close(scatter_add_rows(5, index, rows), expected)
