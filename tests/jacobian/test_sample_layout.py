"""Which rows belong to which sample, from gradients with coded weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from skfishermask import fisher_embedding
from skfishermask.fisher.likelihood import categorical_factor
from skfishermask.jacobian.sample_layout import (
    SHARED,
    SampleLayout,
    coded_weights,
    find_layout,
    radix,
    sample_of_row,
)
from tests import networks, oracles
from tests.jacobian.common import assert_close, diagonal_and_embedding, mask_of

N = 5
DIGITS = 4  # So that numbers of five samples have two digits.


def passes_of(weight_of_row: Tensor, features: int = 3) -> list[Tensor]:
    """Gradients of rows that are the given combinations (rows, n) of the samples' weights."""
    base = torch.rand(N, 1, dtype=torch.float64) + 0.5
    direction = torch.randn(len(weight_of_row), features, dtype=torch.float64)
    return [weight_of_row @ weights * direction for weights in (base, *coded_weights(base, DIGITS))]


def of_samples(samples: list[int]) -> Tensor:
    return torch.eye(N, dtype=torch.float64)[samples]


@pytest.mark.parametrize("n_digits", [4, 8, 128, 512])
def test_coded_weights_are_exact_multiples_that_differ_by_sample(n_digits: int) -> None:
    base = torch.rand(300, 2, 2, dtype=torch.float64) + 0.5
    codes = torch.stack([w / base for w in coded_weights(base, n_digits)], 1)
    # Powers of two, the same for all outputs of a sample.
    assert bool((codes.frexp().mantissa == 0.5).all())
    assert bool((codes == codes[:, :, :1, :1]).all())
    assert len(codes[:, :, 0, 0].unique(dim=0)) == 300


def test_radix_is_the_smallest_of_the_types() -> None:
    assert radix({torch.float64}) > radix({torch.float64, torch.float32})
    assert radix({torch.float32}) > radix({torch.float32, torch.float16})


def test_sample_of_row() -> None:
    samples = [3, 0, 0, 4, 1, 2]
    passes = passes_of(of_samples(samples))
    assert sample_of_row(passes, N, DIGITS).tolist() == samples
    mixed = passes_of(torch.cat([of_samples([2]), of_samples([1]) + of_samples([4])]))
    assert sample_of_row(mixed, N, DIGITS).tolist() == [2, SHARED]
    dead, tiny, large, bad = (
        int(sample_of_row([scale * g for g in passes], N, DIGITS)[0])
        for scale in (0, 1e-317, torch.inf, torch.nan)
    )
    assert large == bad == tiny
    assert dead < 0
    assert tiny < 0
    assert len({dead, tiny, SHARED}) == 3


LAYOUTS = {
    "samples": ([0, 0, 1, 1, 2, 2, 3, 3, 4, 4], "samples"),
    "positions": ([0, 1, 2, 3, 4, 0, 1, 2, 3, 4], "positions"),
    "one row each": ([0, 1, 2, 3, 4], "samples"),
    "reversed": ([4, 3, 2, 1, 0], "index"),
    "some have fewer": ([2, 0, 2, 4, 3, 3, 3], "index"),
}


def rows(g: Tensor, axis: int) -> Tensor:
    return g.movedim(axis, 0)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("axis", [0, 1])
def test_find_layout(name: str, axis: int) -> None:
    samples, order = LAYOUTS[name]
    passes = [g.movedim(0, axis) for g in passes_of(of_samples(samples))]
    layout = find_layout(rows, [axis], passes, N, DIGITS)
    assert layout is not None
    assert (layout.order, layout.axis) == (order, axis)
    # Other batches may have rows of other samples where an index is needed.
    assert layout.reusable == (order != "index")
    t = passes[0]
    by_sample = layout(t)
    for sample in range(N):
        own = [t.select(axis, row) for row, s in enumerate(samples) if s == sample]
        found = by_sample[sample]
        torch.testing.assert_close(found[: len(own)], torch.stack(own) if own else found[:0])
        assert not found[len(own) :].any()


def test_rows_of_several_samples_have_no_layout() -> None:
    passes = passes_of(torch.ones(2, N, dtype=torch.float64))
    assert find_layout(rows, [0], passes, N, DIGITS) is None


def test_an_axis_whose_rows_all_samples_share_is_not_taken() -> None:
    g = [t[None].expand(2, N, 3) for t in passes_of(of_samples([0, 1, 2, 3, 4]))]
    layout = find_layout(rows, [0, 1], g, N, DIGITS)
    assert layout == SampleLayout(N, 1, "samples")


def test_rows_without_a_gradient_leave_the_order_open() -> None:
    weights = of_samples([0, 0, 1, 1, 2, 2, 3, 3, 4, 4])
    weights[1:] = 0
    layout = find_layout(rows, [0], passes_of(weights), N, DIGITS)
    assert layout is not None
    assert not layout.reusable


def test_tokens_as_many_as_samples() -> None:
    """Shapes alone cannot tell the axes apart."""
    torch.manual_seed(1)
    module, x = networks.TimeFirst().double(), networks.tokens(5)
    assert x.shape == (5, 5)
    g, p = oracles.scores(module, x)
    diagonal, V = diagonal_and_embedding(module, [x])
    assert_close(diagonal, oracles.diagonal(g, p))
    assert_close(V, categorical_factor(p) @ g)


class ReversedRows(nn.Module):
    """Its first layer has the samples' rows in reversed order, and a dead unit is dead for all."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(2, 4, bias=False)
        self.output = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.hidden(x.flip(0)).flip(0).relu())


def test_a_single_living_row_says_nothing_of_the_others() -> None:
    torch.manual_seed(0)
    module = ReversedRows().double()
    with torch.no_grad():
        module.hidden.weight.abs_()
    # The row in the middle is where it would be in any order.
    x = torch.tensor([[-1.0, -2], [1, 2], [-2, -1], [1, 3], [2, 1], [3, 4]]).double()
    g, p = oracles.scores(module, x)
    diagonal, V = diagonal_and_embedding(module, [x[:3], x[3:]])
    assert_close(diagonal, oracles.diagonal(g, p))
    assert_close(V, categorical_factor(p) @ g)


@pytest.mark.filterwarnings("error:Reading sample by sample")
@pytest.mark.parametrize(
    ("dtype", "n", "tolerance"),
    # More samples than there are powers of two to tell them apart.
    [(torch.float64, 520, 1e-10), (torch.float32, 140, 1e-5), (torch.float16, 70, 2e-2)],
)
def test_more_samples_than_powers_of_two(dtype: torch.dtype, n: int, tolerance: float) -> None:
    torch.manual_seed(0)
    module = networks.TimeFirst().to(dtype)
    x = networks.tokens(n)
    mask = mask_of(module, ["output.weight", *[n for n, _ in module.named_parameters()][:1]])
    together = fisher_embedding(module, [x], mask, dtype=torch.float64)
    alone = fisher_embedding(module, x.split(1), mask, dtype=torch.float64)
    assert float((together - alone).norm() / alone.norm()) < tolerance


@pytest.mark.filterwarnings("error:Reading sample by sample")
def test_large_gradients_in_16_bits() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    with torch.no_grad():
        # Gradients at the hidden units are near the largest number there is, 65,504.
        module[0].weight.mul_(1e-4)
        module[0].bias.zero_()
        module[2].weight.mul_(2e4)
    x = torch.randn(6, 3, 4)
    module = networks.Net(lambda net, x: net.inner(x.transpose(0, 1)).mean(0), inner=module).half()
    mask = mask_of(module, ["inner.0.weight"])
    together = fisher_embedding(module, [x.half()], mask)
    alone = fisher_embedding(module, x.half().split(1), mask)
    assert float((together - alone).norm() / alone.norm()) < 2e-2
