"""The benchmarks: that what they compare is the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("skactiveml")

from benchmarks.common import harness
from benchmarks.common.dense import batch_information, objective
from benchmarks.common.networks import CifarResNet18, MaskedText
from benchmarks.speed import (
    embedding,
    knobs,
    large,
    mask_size,
    selection,
)
from skfishermask import ParameterMask, fisher_diagonal, fisher_embedding
from skfishermask.fisher import fisher_matrix
from skfishermask.selection import select_batch
from tests.networks import images, masked_tokens

# The shared parts


@pytest.mark.parametrize("power", [0, 1, 2.5])
def test_exponent_of_a_power(power: float) -> None:
    sizes = [10, 30, 200]
    assert harness.exponent(sizes, [3 * size**power for size in sizes]) == pytest.approx(power)


def test_exponent_is_least_squares() -> None:
    # Symmetric deviations in the middle leave the slope as it is.
    assert harness.exponent([1, 10, 100, 1000], [1, 20, 50, 1000]) == pytest.approx(
        np.polyfit([0, 1, 2, 3], np.log10([1, 20, 50, 1000]), 1)[0]
    )


def test_sweep_fits_the_medians() -> None:
    found = harness.sweep("a", "N", [1, 10], {"a": [[9, 1, 2], [20, 30, 19]]}, {})
    line = found["lines"]["a"]
    assert line["seconds"][0] == {"median": 2, "min": 1, "max": 9}
    assert line["exponent"] == pytest.approx(1)
    assert harness.about_linear("", found)["met"]


def test_alternate_takes_turns() -> None:
    order: list[str] = []
    works = {name: (lambda name=name: order.append(name)) for name in "ab"}
    times = harness.alternate(works, 2, "cpu", "")
    assert "".join(order) == "ababab"
    assert {name: len(values) for name, values in times.items()} == {"a": 2, "b": 2}


def test_targets_are_judged_by_the_median() -> None:
    one = harness.ratio([1, 4, 9], [2, 2, 3])
    assert one == {"median": 2, "min": 0.5, "max": 3}
    assert harness.at_most("", one, 2)["met"]
    assert not harness.at_least("", one, 2.1)["met"]


# What is compared is the same


@pytest.fixture(scope="module")
def network() -> tuple[nn.Module, Tensor, ParameterMask]:
    torch.manual_seed(0)
    module = CifarResNet18(width=2, n_classes=4).double().eval()
    x = images(6).double()
    return module, x, embedding.make_mask(fisher_diagonal(module, [x]), 150)


def information(V: Tensor | np.ndarray) -> Tensor:
    V = torch.as_tensor(V).double()
    return V.mT @ V


def test_naive_embeddings_are_ours(network: Any) -> None:
    module, x, mask = network
    V = fisher_embedding(module, [x], mask, dtype=torch.float64)
    kept = embedding.kept_entries(module, mask)
    looped = embedding.looped_embedding(module, x, kept, 4)
    assert looped.shape == (4, 4, 150)
    assert torch.allclose(information(looped), information(V[:4]))
    assert np.allclose(embedding.one_by_one(module, x[:4], kept), looped)
    assert torch.allclose(embedding.jacobian_embedding(module, x, mask), V)
    assert torch.allclose(embedding.hooked_embedding(module, x, mask), V)
    assert embedding.hooks_read(module, x, mask)
    rows = selection.authors_rows(module, x.split(4), mask)
    # The embedding is kept in float32.
    assert torch.allclose(information(rows), information(V), rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_whole_jacobians_of_keyword_inputs_are_ours() -> None:
    module, x = MaskedText(9, 5, 4, 2, 1, 3).double().eval(), masked_tokens(4)
    mask = ParameterMask.from_diagonal(
        fisher_diagonal(module, [x]), "global", 50, output_layer=["output.weight", "output.bias"]
    )
    V = fisher_embedding(module, [x], mask, dtype=torch.float64)
    assert torch.allclose(embedding.jacobian_embedding(module, x, mask), V)
    # Its positions have no dimension for samples, which hooks on layers take for granted.
    assert not embedding.hooks_read(module, x, mask)


def test_naive_diagonal_is_ours(network: Any) -> None:
    module, x, _ = network
    ours = fisher_diagonal(module, [x])
    for expected, found in zip(
        ours.values(), embedding.looped_diagonal(module, x, len(x)), strict=True
    ):
        assert np.allclose(expected, found)


@pytest.mark.parametrize("gains", [selection.gains_as_published, selection.gains_with_two_products])
def test_naive_selection_is_ours(gains: selection.Gains) -> None:
    torch.manual_seed(0)
    V = torch.randn(230, 3, 20, dtype=torch.float64)
    fisher = fisher_matrix(V)
    ours, _ = select_batch(V, 12, fisher)
    assert selection.select_naively(V, 12, fisher, gains) == ours.tolist()


def test_a_batch_is_judged_without_large_matrices() -> None:
    torch.manual_seed(0)
    V, V_labeled = torch.randn(9, 2, 7), torch.randn(4, 2, 7)
    fisher = fisher_matrix(torch.cat([V, V_labeled]).double())
    start = {"fisher_labeled": fisher_matrix(V_labeled.double()), "n_labeled": 4}
    before, after = (
        objective(batch_information(V, chosen, 3, **start), fisher) for chosen in ([], [1, 5, 8])
    )
    found = mask_size.reduction(V, V_labeled, [1, 5, 8])
    assert found == pytest.approx(before - after, rel=1e-9)


def test_knobs_are_judged_by_the_exact_batch() -> None:
    given = harness.options("", "query", 1).parse_args(["--quick"])
    case = knobs.KnobCase(given, 0)
    assert case.compare(case.exact) == (1, 1)
    common, gain = case.compare([*case.exact[:-1], -1])
    assert common == pytest.approx(1 - 1 / len(case.exact))
    assert 0.5 < gain < 1


def test_large_pools_beside_each_other() -> None:
    def case(n: int, seconds: float) -> dict[str, Any]:
        return {"N": n, "K": 4, "seconds": {"selection": seconds}, "peak_private_bytes": 3e10}

    small, big = large.TENTHS[0]
    found = {
        "in memory": case(60_000, 50.0),
        small: case(100_000, 2.0),
        big: case(1_000_000, 24.0),
    }
    beside = large.compared(found)
    assert beside["growth from a tenth"] == {big: {"selection": 12.0}}
    # Too many bytes.
    assert [(t["found"], t["met"]) for t in beside["targets"]] == [(3e10, False)]
