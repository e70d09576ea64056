"""Embeddings kept as features and rows of R choose as those that are formed whole."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from skfishermask.fisher import FisherSum, fisher_matrix
from skfishermask.fisher.likelihood import categorical_factor
from skfishermask.selection import HeadEmbedding, SelectionProblem, select, stored
from skfishermask.selection.linalg import QuadraticForm, symmetric
from skfishermask.selection.rounding import product_error
from tests import oracles


def columns_of(d: int, n_outputs: int, kind: str) -> Tensor:
    """Output and feature of each column, in the order of a mask: weights, then biases."""
    weights = torch.cartesian_prod(torch.arange(n_outputs), torch.arange(d)).T
    biases = torch.stack([torch.arange(n_outputs), torch.full((n_outputs,), d)])
    if kind == "without bias":
        return weights
    every = torch.cat([weights, biases], 1)
    if kind == "all":
        return every
    # Some of them, none of the second output.
    generator = torch.Generator().manual_seed(1)
    some = torch.randperm(every.shape[1], generator=generator)[: every.shape[1] // 3].sort().values
    kept = every[:, some]
    return kept[:, kept[0] != 1]


def embeddings(
    n: int,
    d: int,
    n_outputs: int,
    r: int,
    kind: str = "all",
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
) -> tuple[HeadEmbedding, Tensor]:
    """Return an embedding at a head, of confident and unsure samples, and the same formed whole."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(n, d, generator=generator, dtype=torch.float64).relu()
    features[n // 2] *= 1e-3
    weight = torch.randn(d, n_outputs, generator=generator, dtype=torch.float64) * (4 / d**0.5)
    rows = categorical_factor((features @ weight).softmax(1), r)
    ones = torch.ones(n, 1, dtype=torch.float64)
    packed = torch.cat([features, ones, rows.flatten(1)], 1)[:, None].to(dtype)
    packed[-2:] = packed[:2]
    columns = columns_of(d, n_outputs, kind)
    head = HeadEmbedding(stored(torch.zeros_like(packed)), columns, rows.shape[1], n_outputs)
    head.write(5, packed[5:])
    head.write(0, packed[:5])
    exact = packed.double()
    rows = exact[:, 0, d + 1 :].unflatten(1, (-1, n_outputs))
    columns = columns[:, (columns[0] * (d + 1) + columns[1]).argsort()]
    return head, rows[:, :, columns[0]] * exact[..., columns[1]]


# Samples, features, outputs, rows of R.
SIZES = {
    "binary": (40, 12, 2, 1),
    "three": (40, 12, 3, 2),
    "few directions": (40, 12, 10, 3),
    "ten": (40, 7, 10, 9),
    "hundred": (20, 2, 100, 99),
}
CASES = pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
COLUMNS = pytest.mark.parametrize("kind", ["all", "without bias", "some"])


@CASES
@COLUMNS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_parts_are_those_of_the_whole(sizes: Any, kind: str, dtype: torch.dtype) -> None:
    head, V = embeddings(*sizes, kind, dtype)
    n, k = len(V), V.shape[2]
    assert head.shape == V.shape
    assert torch.equal(head.take(range(n)), V)
    assert torch.equal(torch.cat([v for _, v in head.chunks(torch.float64)]), V)
    assert torch.equal(head.columns(1, k - 1), V[..., 1 : k - 1])
    assert head.n_bytes == n * (sizes[1] + 1 + sizes[2] * V.shape[1]) * dtype.itemsize
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    for embedding in (head, stored(V)):
        total = FisherSum(k, V.device)
        for n_samples, products in embedding.information(5 * V.shape[1]):
            kept = [*products]
            assert {len(left) for _, _, left, _ in kept} <= set(range(1, 5 * V.shape[1] + 1))
            total.add_products(n_samples, kept)
        torch.testing.assert_close(total.mean(), fisher_matrix(V), rtol=tolerance, atol=tolerance)


@CASES
@COLUMNS
def test_bounds_of_errors_hold(sizes: Any, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("skfishermask.selection.storage._MIN_CHUNK_VECTORS", 7)
    monkeypatch.setattr("skfishermask.selection.storage._CHUNK_BYTES", 1)
    head, V = embeddings(*sizes, kind, torch.float32)
    k = V.shape[2]
    # Nearly 1 / lambda along directions that V has nothing of.
    inverse = symmetric(torch.linalg.inv(fisher_matrix(V) + 1e-6 * torch.eye(k).double()))
    forms = [QuadraticForm(inverse), QuadraticForm(0.3)]
    exact = V.numpy().astype(np.longdouble)
    wanted = exact @ inverse.numpy() @ exact.transpose(0, 2, 1)
    for chunk, norms, (form, multiple) in head.quadratic_forms(forms):
        torch.testing.assert_close(norms, torch.linalg.vector_norm(V[chunk], dim=(1, 2)))
        torch.testing.assert_close(multiple[0], 0.3 * V[chunk] @ V[chunk].mT)
        off = np.linalg.norm((form[0].numpy() - wanted[chunk]).astype(float), axis=(1, 2))
        assert (off <= form[1].numpy()).all()
        _, dense = forms[0](V[chunk], norms)
        assert (form[1] <= 10 * dense).all()
    for dtype in (torch.float32, torch.float64):
        factors = torch.randn(k, 2, generator=torch.Generator().manual_seed(3)).to(dtype)
        exact_products = exact @ factors.numpy().astype(np.longdouble)
        for chunk, products, lacking in head.products(factors):
            off = np.linalg.norm((products.numpy() - exact_products[chunk]).astype(float), axis=1)
            size = torch.linalg.vector_norm(V[chunk], dim=(1, 2))[:, None] * factors.norm(dim=0)
            bound = product_error(size + lacking.sqrt(), products.norm(dim=1), k, dtype)
            assert (off <= bound.numpy()).all()


@CASES
@COLUMNS
@pytest.mark.parametrize("with_labels", [False, True], ids=["alone", "labelled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_picks_are_those_of_the_whole(
    sizes: Any, kind: str, with_labels: bool, dtype: torch.dtype
) -> None:
    head, V = embeddings(*sizes, kind, dtype)
    options: dict[str, Any] = {"oversample": 1.5, "regularization": 1e-3}
    if with_labels:
        options |= {"fisher_labeled": fisher_matrix(V[:9]), "n_labeled": 9}
    fisher = fisher_matrix(V)
    problem = SelectionProblem(8, fisher, **options)
    found, whole = select(head, problem), select(stored(V.to(dtype)), problem)
    assert found.positions.tolist() == whole.positions.tolist()
    if dtype == torch.float64:
        torch.testing.assert_close(found.gains, whole.gains, rtol=1e-9, atol=0)
    torch.testing.assert_close(found.gains, whole.gains, rtol=1e-5, atol=0)
    expected, gains = oracles.select_batch_oracle(V, 8, fisher, **options)
    assert found.positions.tolist() == expected
    torch.testing.assert_close(found.gains.tolist(), gains, rtol=1e-7, atol=0)
