from __future__ import annotations

import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from skfishermask import ParameterMask
from skfishermask.fisher.mask import MASK_STRATEGIES, mask_size

OUTPUT = ["output.weight", "output.bias"]


def diagonal(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "conv.weight": (6, 3, 3, 3),
        "conv.bias": (6,),
        "norm.weight": (6,),
        "hidden.weight": (20, 30),
        "output.weight": (3, 8),
        "output.bias": (3,),
    }
    return {k: torch.rand(s, generator=generator) ** 8 for k, s in shapes.items()}


def flat(d: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([v.flatten() for v in d.values()])


def positions(mask: ParameterMask) -> set[int]:
    found, start = set(), 0
    for name, shape in mask.shapes.items():
        index = mask.indices.get(name, torch.empty(0, dtype=torch.int64))
        found |= {start + int(i) for i in index}
        start += shape.numel()
    return found


N_PARAMETERS = 6 * 27 + 6 + 6 + 600 + 24 + 3
N_OUTPUT = 27


@pytest.mark.parametrize("strategy", ["global", "per_layer", "random"])
@pytest.mark.parametrize("size", [28, 100, 0.2, 0.5, 1.0, "auto"])
def test_size_and_whole_output_layer(strategy: str, size: float | int | str) -> None:
    mask = ParameterMask.from_diagonal(
        diagonal(), strategy, size, output_layer=OUTPUT, random_state=0
    )
    assert len(mask) == mask_size(size, N_PARAMETERS, N_OUTPUT)
    for name in OUTPUT:
        assert len(mask.indices[name]) == mask.shapes[name].numel()


def test_global_takes_the_largest_of_the_rest() -> None:
    d = diagonal()
    mask = ParameterMask.from_diagonal(d, "global", 100, output_layer=OUTPUT)
    rest = flat(d)[:-N_OUTPUT]
    expected = set(rest.argsort(descending=True)[: 100 - N_OUTPUT].tolist())
    assert positions(mask) == expected | set(range(N_PARAMETERS - N_OUTPUT, N_PARAMETERS))


def test_an_output_layer_that_is_too_large_competes() -> None:
    d = diagonal()
    mask = ParameterMask.from_diagonal(d, "global", N_OUTPUT, output_layer=OUTPUT)
    assert positions(mask) == set(flat(d).argsort(descending=True)[:N_OUTPUT].tolist())


def test_per_layer_takes_the_largest_of_each_tensor_in_proportion() -> None:
    d = diagonal()
    mask = ParameterMask.from_diagonal(d, "per_layer", 0.25, output_layer=OUTPUT)
    left, total = len(mask) - N_OUTPUT, N_PARAMETERS - N_OUTPUT
    for name in ("conv.weight", "conv.bias", "norm.weight", "hidden.weight"):
        index = mask.indices[name]
        assert abs(len(index) - left * d[name].numel() / total) < 1
        best = d[name].flatten().argsort(descending=True)[: len(index)]
        assert index.tolist() == sorted(best.tolist())


def test_relative_keeps_what_stands_out_in_its_tensor() -> None:
    d = diagonal()
    everything = ParameterMask.from_diagonal(d, "relative", 1.0, output_layer=OUTPUT)
    for name in ("conv.weight", "conv.bias", "norm.weight", "hidden.weight"):
        values = d[name].flatten()
        limit = math.ceil(0.025 * len(values))
        best = values.argsort(descending=True)[:limit]
        expected = [i for i in sorted(best.tolist()) if values[i] > 2 * values.mean()]
        assert everything.indices.get(name, torch.empty(0)).tolist() == expected
    # A smaller size keeps those that stand out most.
    few = ParameterMask.from_diagonal(d, "relative", N_OUTPUT + 4, output_layer=OUTPUT)
    ratios = torch.cat([v.flatten() / v.mean() for v in d.values()])
    candidates = [i for i in positions(everything) if i < N_PARAMETERS - N_OUTPUT]
    candidates.sort(key=lambda i: -ratios[i])
    assert positions(few) - set(range(N_PARAMETERS - N_OUTPUT, N_PARAMETERS)) == set(candidates[:4])


def test_output_layer_and_all_do_not_look_at_size() -> None:
    output = ParameterMask.from_diagonal(diagonal(), "output_layer", 1, output_layer=OUTPUT)
    assert list(output.indices) == OUTPUT
    assert len(output) == N_OUTPUT
    assert len(ParameterMask.from_diagonal(diagonal(), "all", 1, output_layer=OUTPUT)) == (
        N_PARAMETERS
    )


def test_random_is_reproducible_and_depends_on_the_seed() -> None:
    masks = [
        ParameterMask.from_diagonal(
            diagonal(), "random", 100, output_layer=OUTPUT, random_state=seed
        )
        for seed in (0, 0, 1)
    ]
    assert masks[0] == masks[1]
    assert masks[0] != masks[2]


@given(
    values=st.lists(st.sampled_from([0.0, 1.0, 2.0]), min_size=4, max_size=30), k=st.integers(1, 4)
)
def test_ties_break_towards_the_lower_index(values: list[float], k: int) -> None:
    d = {"a": torch.tensor(values[:2]), "b": torch.tensor(values[2:])}
    mask = ParameterMask.from_diagonal(d, "global", k, output_layer=[])
    expected = sorted(range(len(values)), key=lambda i: (-values[i], i))[:k]
    assert positions(mask) == set(expected)


def test_auto_size() -> None:
    # The authors' small ResNet: their fraction decides.
    assert mask_size("auto", 701_466, 650) == math.ceil(0.002 * 701_466)
    # A small network does not degenerate to its output layer.
    assert mask_size("auto", 2_410, 330) == 660
    # A large one stays affordable, and a tiny one has no more than it has.
    assert mask_size("auto", 25_000_000, 51_300) == 2000
    assert mask_size("auto", 15, 15) == 15
    assert mask_size(0.002, 500, 1) == 1


@pytest.mark.parametrize("size", [0, -1, 0.0, 1.5, 1000, True, "half", float("nan"), None])
def test_wrong_size(size: object) -> None:
    with pytest.raises(ValueError, match=r"mask size must be"):
        mask_size(size, 100, 10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strategy": "best"}, "strategy must be one of"),
        ({"output_layer": ["fc.weight"]}, "'fc.weight', expected names"),
        ({"strategy": "output_layer", "output_layer": []}, "at least one name"),
        ({"diagonal": {}}, "no parameters"),
        ({"diagonal": {"a": torch.tensor([1.0, float("nan")])}, "output_layer": []}, "finite"),
        ({"diagonal": {"a": torch.tensor([1.0, -1.0])}, "output_layer": []}, "not negative"),
    ],
)
def test_errors(change: dict[str, object], message: str) -> None:
    arguments = {"diagonal": diagonal(), "strategy": "global", "size": 50, "output_layer": OUTPUT}
    with pytest.raises(ValueError, match=message):
        ParameterMask.from_diagonal(**(arguments | change))


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ({}, "at least one parameter"),
        ({"a": torch.tensor([1, 0])}, "increasing"),
        ({"a": torch.tensor([0, 0])}, "increasing"),
        ({"a": torch.tensor([0, 4])}, "between 0 and 3"),
        ({"a": torch.tensor([-1])}, "between 0 and 3"),
        ({"b": torch.tensor([0])}, "'b' are given but no shape"),
    ],
)
def test_a_mask_checks_its_indices(indices: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ParameterMask(indices, {"a": torch.Size([2, 2])})


def test_a_mask_is_a_value() -> None:
    mask = ParameterMask.from_diagonal(diagonal(), "global", 100, output_layer=OUTPUT)
    assert pickle.loads(pickle.dumps(mask)) == mask
    assert repr(mask) == f"ParameterMask(100 of {N_PARAMETERS} parameters, in 5 of 6 tensors)"
    assert mask != ParameterMask.from_diagonal(diagonal(), "global", 99, output_layer=OUTPUT)
    assert mask != 100
    with pytest.raises(TypeError):
        mask.indices["conv.bias"] = torch.tensor([0])
    with pytest.raises(AttributeError):
        mask.indices = {}
    assert list(mask.indices) == [name for name in mask.shapes if name in mask.indices]


def test_a_diagonal_of_zeros_is_allowed() -> None:
    zeros = {name: torch.zeros_like(d) for name, d in diagonal().items()}
    for strategy in MASK_STRATEGIES:
        mask = ParameterMask.from_diagonal(zeros, strategy, 50, output_layer=OUTPUT, random_state=0)
        assert len(mask) >= N_OUTPUT
