"""The bounds of rounding errors hold, and each of their terms is needed.

Every case makes one source of error as large as it gets; the bound holds, and does not without the
term that is there for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from skfishermask.selection import Pick, rounding, stored
from skfishermask.selection.candidates import GainState
from skfishermask.selection.greedy import InverseFisher, force_picks, greedy_select
from skfishermask.selection.linalg import trace_gains
from skfishermask.selection.local_pool import LocalCandidatePool
from tests.problems import problem


def products(kind: str, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return errors of float32 products, and the norms of the factors and of the product."""
    draw = torch.rand if kind == "adding" else torch.randn
    v, u = draw(400, k), draw(k, 18)
    exact = v.double() @ u.double()
    factors = v.double().norm(dim=1)[:, None] * u.double().norm(dim=0)
    return ((v @ u) - exact).abs(), factors, exact.abs()


@pytest.mark.parametrize("k", [1, 30, 500, 2000])
@pytest.mark.parametrize("kind", ["cancelling", "adding"])
def test_products(kind: str, k: int) -> None:
    off, factors, product = products(kind, k)
    assert (off <= rounding.product_error(factors, product, k, torch.float32)).all()


def test_where_terms_cancel_errors_are_relative_to_the_factors() -> None:
    off, factors, product = products("cancelling", 2000)
    assert (off > rounding.product_error(0 * factors, product, 2000, torch.float32)).any()


def test_where_terms_add_up_errors_grow_with_their_number() -> None:
    off, factors, product = products("adding", 500)
    assert (off > rounding.product_error(factors, 0 * product, 500, torch.float32)).any()
    assert (off > rounding.product_error(0 * factors, product, 1, torch.float32)).any()


CASES: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    # Errors of A: a large q, and a gain that is large beside them. Errors of B: a large t.
    "of A": lambda noise: (noise, 0 * noise),
    "of B": lambda noise: (0 * noise, noise),
}


@pytest.mark.parametrize("which", CASES)
@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0])
def test_errors_of_a_and_b_reach_the_gain(which: str, size: float) -> None:
    v = size * torch.randn(500, 3, 5).double()
    a, b = v @ v.mT, v @ torch.diag(torch.arange(1.0, 6.0)).double() @ v.mT
    noise = torch.randn(500, 3, 3).double()
    noise = 1e-7 * (noise + noise.mT)
    in_a, in_b = CASES[which](noise)
    eye = torch.eye(3).double()

    def gains(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        inverse = torch.linalg.inv(eye + a)
        return (inverse * b).sum((1, 2)), inverse.diagonal(dim1=1, dim2=2).amax(1)

    exact, _ = gains(a, b)
    found, inverse_size = gains(a + in_a, b + in_b)
    sizes = torch.stack([x.norm(dim=(1, 2)) for x in (in_a, in_b)], 1)
    # As large as the largest eigenvalue of the inverse, which its diagonal is not always.
    slack = 3.0
    bounds = rounding.gain_error(found, sizes, slack * inverse_size, a, torch.float64)
    off = (found - exact).abs()
    assert (off <= bounds + 1e-14 * exact.abs()).all()
    for column in (0, 1):
        less = sizes.clone()
        less[:, column] = 0
        bounds = rounding.gain_error(found, less, slack * inverse_size, a, torch.float64)
        holds = bool((off <= bounds + 1e-14 * exact.abs()).all())
        assert holds == (column != ["of A", "of B"].index(which))


@pytest.mark.parametrize("r", [1, 9, 40])
def test_steps(r: int) -> None:
    k = 60
    v, u, t = torch.randn(300, r, k), torch.randn(k, r), torch.randn(k, r)
    q, w = v @ u, v @ t
    exact_q, exact_w = v.double() @ u.double(), v.double() @ t.double()
    off_a = (q @ q.mT - exact_q @ exact_q.mT).norm(dim=(1, 2))
    exact_b = exact_q @ exact_w.mT + exact_w @ exact_q.mT
    off_b = (q @ w.mT + w @ q.mT - exact_b).norm(dim=(1, 2))
    sizes = torch.stack([q.norm(dim=(1, 2)), w.norm(dim=(1, 2))], 1).double()
    factors = torch.stack([v.norm(dim=(1, 2)) * x.norm() for x in (u, t)], 1).double()
    bound = rounding.update_error(factors, sizes, k, r, torch.float32)
    assert (off_a <= bound[:, 0]).all()
    assert (off_b <= bound[:, 1]).all()


def test_a_step_is_off_by_the_rounding_of_its_square_too() -> None:
    # q is exact, and its square is not: nothing but the small product is off.
    v = torch.full((1, 1), 1 + 2.0**-12)
    q = v @ torch.ones(1, 1)
    off = ((q @ q.T).double() - (q.double() @ q.double().T)).abs()
    size = q.double().expand(1, 2)
    assert off <= rounding.update_error(0 * size, size, 0, 1, torch.float32)[0, 0]
    assert off > rounding.update_error(0 * size, size, 0, 0, torch.float32)[0, 0]


def test_a_square_of_many_terms_is_off_by_more() -> None:
    # Sums of equal terms, each sum rounded the same way all along.
    r = 400
    q = torch.arange(1.0, r + 1)[None, :, None] * torch.full((r,), 2047.0)
    off = ((q @ q.mT).double() - q.double() @ q.double().mT).norm()
    size = q.double().norm().expand(1, 2)
    assert off <= rounding.update_error(0 * size, size, 0, r, torch.float32)[0, 0]
    assert off > rounding.update_error(0 * size, size, 0, 1, torch.float32)[0, 0]


def test_what_a_step_is_off_by_counts_for_q_and_t() -> None:
    factors = torch.tensor([[1.0, 0.0]]).double()
    sizes = torch.tensor([[1.0, 2.0]]).double()
    only_q = rounding.update_error(factors, sizes, 0, 0, torch.float32)
    # q is off and meets t; t is off and meets q.
    assert only_q[0, 1] == 2 * 2 * 2.0**-23
    only_t = rounding.update_error(factors.flip(1), sizes, 0, 0, torch.float32)
    assert only_t[0].tolist() == [0, 2 * 2.0**-23]


@pytest.mark.parametrize("scale", [1e-5, 1e3])
def test_a_gain_is_off_by_the_inverse_of_i_plus_a(scale: float) -> None:
    # A and B are exact, and only the inverse is computed in float32; where A is small it is as far
    # off as I is, where A is large as that is.
    v, w = torch.randn(2, 100, 40, 40, dtype=torch.float64)
    a, b = scale * v @ v.mT, w @ w.mT
    exact, _ = trace_gains(a, b)
    gains, size = trace_gains(a, b, torch.float32)
    none = a.new_zeros(100, 2)
    off = (gains - exact).abs()
    assert (off <= rounding.gain_error(gains, none, size, a, torch.float32)).all()
    # Without the term for I, and without the one for A.
    less = (
        -rounding.INVERSE_ERROR_FACTOR
        * rounding.unit_roundoff(torch.float32)
        * torch.eye(2)[0].double()
    )
    without = [
        rounding.gain_error(gains, less.expand(100, 2), size, a, torch.float32),
        rounding.gain_error(gains, none, size, 0 * a, torch.float32),
    ]
    assert (off > without[0 if scale < 1 else 1]).any()


def exactly(x: Tensor) -> Any:
    """Return numbers that are computed with without rounding."""
    return np.vectorize(Fraction, otypes=[object])(x.numpy())


def error_of(found: Tensor, exact: Any) -> Tensor:
    return torch.tensor((exactly(found) - exact).astype(float)).norm(dim=(-2, -1))


def vanishing(k: int) -> tuple[Tensor, Tensor]:
    """Return a direction, and a symmetric matrix of norm 1 that nearly maps it to zero."""
    u = torch.randn(k).double()
    u /= u.norm()
    return u, torch.eye(k).double() - (1 - 1e-4) * torch.outer(u, u)


@pytest.mark.parametrize("which", ["inverse", "fisher"])
@pytest.mark.parametrize("at", ["initial state", "exact gains"])
def test_float64_products_have_rounding_errors_too(at: str, which: str) -> None:
    # What one of the matrices all but maps to zero loses digits in the product with that.
    u, matrix = vanishing(12)
    eye = torch.eye(12).double()
    inverse, target = (matrix if which == name else eye for name in ("inverse", "fisher"))
    v = u + 1e-6 * torch.randn(40, 1, 12).double()
    V, x = exactly(v), exactly(v) @ exactly(inverse)
    if at == "exact gains":
        computed = InverseFisher(inverse, target).exact_gains(v)
        a, b, bounds = computed.a, computed.b, computed.update_error
        size = 1 / (1 + a[:, 0, 0])
        expected = rounding.gain_error(computed.gains, bounds, size, a, torch.float64)
        torch.testing.assert_close(computed.gain_error, expected)
        exact_b = x @ exactly(target) @ x.swapaxes(1, 2)
    else:
        candidates = LocalCandidatePool(stored(v), 1).candidates
        candidates.initialize(inverse, target)
        a, b = candidates._blocks[0, :, ::2], 2 * candidates._blocks[0, :, 1::2]
        bounds = candidates._update_error[0]
        exact_b = V @ exactly(target) @ V.swapaxes(1, 2)
    assert (error_of(a, x @ V.swapaxes(1, 2)) <= bounds[:, 0]).all()
    assert (error_of(b, exact_b) <= bounds[:, 1]).all()


@pytest.mark.parametrize("decay", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize(("r", "k"), [(1, 100), (4, 60), (9, 200)])
def test_gain_error_bounds_hold_through_a_selection(
    r: int, k: int, width: int, decay: float
) -> None:
    V, target = problem(120, r, k, decay=decay, scale=10.0)
    V, eye = V.float(), torch.eye(k, dtype=torch.float64)
    v, information = V.double(), eye.clone()

    class Judged(LocalCandidatePool):
        def commit(self, picks: list[Pick], shortlist: GainState) -> None:
            nonlocal information
            super().commit(picks, shortlist)
            judged.append(len(picks))
            if len(picks) > self._n_attempted:
                return
            for pick in picks:
                rows = v[pick.position]
                information = information + rows.T @ rows
            inverse = torch.linalg.inv(information)
            a, b = v @ inverse @ v.mT, v @ inverse @ target @ inverse @ v.mT
            exact = torch.linalg.solve(torch.eye(r).double() + a, b)
            exact = exact.diagonal(dim1=1, dim2=2).sum(1)
            left = ~self.candidates.taken
            off = (self.candidates.gains - exact).abs()[left]
            # The judge is no better than float64 either.
            assert (off <= self.candidates.gain_error[left] + 1e-9 * exact.max()).all()

    judged: list[int] = []
    pool = Judged(stored(V), width)
    pool.candidates.initialize(1.0, target)
    greedy_select(pool, InverseFisher(1.0, target), 30, r, picks_per_round=width)
    assert sum(judged) == 30


def test_gain_error_bounds_hold_where_many_picks_are_applied() -> None:
    # Gains fall by orders of magnitude in picks that are applied in float32.
    V, _ = problem(120, 4, 60, decay=0.0, scale=10.0)
    V, eye = V.float(), torch.eye(60, dtype=torch.float64)
    pool, inverse_fisher = LocalCandidatePool(stored(V), 1), InverseFisher(1.0, eye)
    pool.candidates.initialize(1.0, eye)
    pool.apply(force_picks(pool, inverse_fisher, range(40)))
    found = pool.candidates
    exact = gains_after(V, 40)[found.positions][~found.taken]
    off = (found.gains[~found.taken] - exact).abs()
    assert (off <= found.gain_error[~found.taken]).all()


def gains_after(V: Tensor, n_taken: int) -> Tensor:
    """Return all gains after the first samples were taken, from M = I and with F = I."""
    V = V.double()
    rows = V[:n_taken].flatten(0, 1)
    x = V @ torch.linalg.inv(torch.eye(V.shape[2], dtype=V.dtype) + rows.T @ rows)
    eye = torch.eye(V.shape[1], dtype=V.dtype)
    return torch.linalg.solve(eye + x @ V.mT, x @ x.mT).diagonal(dim1=1, dim2=2).sum(1)


@pytest.mark.skipif(
    not hasattr(torch.backends.mkldnn, "matmul"),
    reason="precisions of single backends are newer than this torch",
)
@pytest.mark.parametrize(
    ("modes", "expected"),
    [
        ({"cuda": "tf32", "mkldnn": "none"}, 2.0**-10),
        ({"cuda": "ieee", "mkldnn": "bf16"}, 2.0**-7),
        ({"cuda": "ieee", "mkldnn": "ieee"}, 2.0**-23),
    ],
    ids=str,
)
def test_reduced_precision_of_single_backends(
    modes: dict[str, str], expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> str:
        raise RuntimeError("a mix of the legacy and new APIs")

    monkeypatch.setattr(torch, "get_float32_matmul_precision", refuse)
    for backend, mode in modes.items():
        here = getattr(torch.backends, backend)
        monkeypatch.setattr(here, "matmul", type("Mode", (), {"fp32_precision": mode}))
    assert rounding.unit_roundoff(torch.float32) == expected
    assert rounding.unit_roundoff(torch.float64) == 2.0**-50
    assert math.isfinite(expected)
