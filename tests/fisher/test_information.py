from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from skfishermask import ParameterMask, fisher_diagonal, fisher_embedding
from skfishermask.fisher import directions_for_share, predicted_means
from skfishermask.fisher.likelihood import UnweightedCategorical, categorical_factor
from tests import networks, oracles
from tests.fisher.common import error, flat, in_one_process

# Relative errors against the float64 oracle.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
# A network that computes in bfloat16 has three digits; one in float64 is left alone by autocast.
BFLOAT16 = ["autocast"]


def tolerance(name: str, dtype: torch.dtype) -> float:
    return 3e-2 if name in BFLOAT16 and dtype == torch.float32 else TOLERANCE[dtype]


def random_mask(module: nn.Module, size: int) -> ParameterMask:
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    zeros = {name: torch.zeros_like(p) for name, p in parameters.items()}
    k = min(size, sum(p.numel() for p in parameters.values()))
    return ParameterMask.from_diagonal(zeros, "random", k, output_layer=[], random_state=0)


def masked(mask: ParameterMask) -> list[str]:
    return [name for name, index in mask.indices.items() if len(index)]


@contextmanager
def slow_parameters(expected: Collection[str], module: nn.Module) -> Iterator[None]:
    """See one warning name these parameters and no others; none where there are none."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    texts = [str(w.message) for w in caught if str(w.message).startswith("Reading")]
    assert len(texts) == bool(expected), texts
    words = {word.strip(".") for text in texts for word in re.findall(r"[\w.]+", text)}
    assert words & {name for name, _ in module.named_parameters()} == set(expected)


@cache
def case(name: str) -> tuple[nn.Module, networks.Batch, Tensor, Tensor]:
    """Return a network, five samples, and the oracle's scores and class probabilities."""
    make, sample = networks.NETWORKS[name]
    torch.manual_seed(1)
    module, x = make(), sample(5)
    return module, x, *oracles.scores(module, x)


@pytest.fixture(autouse=True, scope="module")
def forget_cases() -> Iterator[None]:
    """Scores of large networks are gigabytes."""
    yield
    case.cache_clear()


# In float32 too: every fifth network, and where float32 is computed otherwise.
IN_FLOAT32 = {*list(networks.NETWORKS)[::5], *BFLOAT16}


def networks_and_dtypes() -> Iterator[Any]:
    """Every network in float64, some in float32; the rest is slow."""
    for name in networks.NETWORKS:
        for dtype in TOLERANCE:
            # Its 11 million parameters take the oracle 15 seconds.
            is_slow = name == "torchvision_resnet18" or (
                dtype == torch.float32 and name not in IN_FLOAT32
            )
            marks = [in_one_process(name), *([pytest.mark.slow] if is_slow else [])]
            yield pytest.param(name, dtype, marks=marks)


@pytest.mark.parametrize(("name", "dtype"), [*networks_and_dtypes()])
def test_diagonal_and_embedding_against_the_oracle(
    name: str, dtype: torch.dtype, device: str
) -> None:
    module, x, g, p = case(name)
    module = copy.deepcopy(module).to(device, dtype)
    x = oracles.cast(x, device=device, dtype=dtype)
    batches = [oracles.rows(x, slice(3)), oracles.rows(x, slice(3, None))]
    slow, enough = networks.SLOW.get(name, []), tolerance(name, dtype)

    trainable = oracles.trainable(module)
    with slow_parameters({*slow} & {*trainable}, module):
        diagonal = fisher_diagonal(module, batches)
    assert [*diagonal] == [*trainable]
    for key in trainable:
        assert diagonal[key].shape == module.get_parameter(key).shape
        assert diagonal[key].device == module.get_parameter(key).device
    expected = oracles.diagonal(g, p)[oracles.columns(module, trainable)]
    assert error(flat(diagonal), expected) < 2 * enough  # Squares.

    mask = random_mask(module, 400)
    with slow_parameters({*slow} & {*masked(mask)}, module):
        V = fisher_embedding(module, batches, mask, dtype=dtype)
    scores = g[:, :, oracles.columns(module, mask.indices)]
    assert V.shape == (5, p.shape[1] - 1, len(mask))
    assert V.dtype == dtype
    assert error(V, categorical_factor(p) @ scores) < enough
    # The same without trusting the directions; a product has twice the relative error.
    assert error(V.double().mT @ V.double(), oracles.information(scores, p)) < 2 * enough


def is_small(make: Callable[[], nn.Module]) -> bool:
    return sum(p.numel() for p in make().parameters()) < 1000


def small_networks_and_shares() -> Iterator[Any]:
    """Every small network with one of the shares; the other is slow."""
    small = [name for name, (make, _) in networks.NETWORKS.items() if is_small(make)]
    for i, name in enumerate(small):
        for j, share in enumerate((0.1, 1.0)):
            marks = [in_one_process(name), *([pytest.mark.slow] if (i + j) % 2 else [])]
            yield pytest.param(name, share, marks=marks)


@pytest.mark.parametrize(("name", "share"), [*small_networks_and_shares()])
def test_a_small_share_of_the_mask_and_the_mask_of_everything(name: str, share: float) -> None:
    module, x, g, p = case(name)
    module, x = copy.deepcopy(module).double(), oracles.cast(x)
    mask = random_mask(module, max(1, int(share * g.shape[2])))
    slow = {*networks.SLOW.get(name, [])} & {*masked(mask)}
    with slow_parameters(slow, module):
        V = fisher_embedding(module, [x], mask, dtype=torch.float64)
    assert len(mask) == max(1, int(share * g.shape[2]))
    scores = g[:, :, oracles.columns(module, mask.indices)]
    assert error(V, categorical_factor(p) @ scores) < TOLERANCE[torch.float64]
    assert error(V.mT @ V, oracles.information(scores, p)) < 2 * TOLERANCE[torch.float64]


@pytest.mark.parametrize("n_directions", [None, 1, 2])
@pytest.mark.parametrize("weighting", ["probability", "none"])
def test_rows_are_the_directions_times_the_jacobian(
    n_directions: int | None, weighting: str
) -> None:
    module, x, g, p = case("conv_norm")
    module, x = copy.deepcopy(module).double(), oracles.cast(x)
    mask = random_mask(module, 50)
    V = fisher_embedding(
        module,
        [x],
        mask,
        dtype=torch.float64,
        n_directions=n_directions,
        weighting=weighting,
    )
    # R J = R (scores), since the rows of R sum to zero where J's common part is left out.
    rows = categorical_factor(p, n_directions)
    if weighting == "none":
        rows = UnweightedCategorical().directions(p.log(), n_directions)
    expected = rows @ g[:, :, oracles.columns(module, mask.indices)]
    assert error(V, expected) < TOLERANCE[torch.float64]


def test_unweighted_rows_are_the_scores() -> None:
    module, x, g, p = case("mlp")
    module, x = copy.deepcopy(module).double(), oracles.cast(x)
    mask = random_mask(module, 30)
    V = fisher_embedding(module, [x], mask, dtype=torch.float64, weighting="none")
    order = p.argsort(1, descending=True)[:, :, None]
    scores = g[:, :, oracles.columns(module, mask.indices)]
    assert error(V, scores.gather(1, order.expand_as(scores))) < TOLERANCE[torch.float64]


def test_truncated_directions_lose_what_the_oracle_says() -> None:
    module, x, *_ = case("mlp")
    module, x = copy.deepcopy(module).double(), oracles.cast(x)
    full = fisher_embedding(module, [x], random_mask(module, 40), dtype=torch.float64)
    cut = fisher_embedding(
        module, [x], random_mask(module, 40), dtype=torch.float64, n_directions=2
    )
    torch.testing.assert_close(cut, full[:, :2])
    lost = full.square().sum() - cut.square().sum()
    torch.testing.assert_close(lost, full[:, 2:].square().sum())


def test_share_of_the_trace() -> None:
    module, x, _, p = case("cifar_resnet18")
    module, x = copy.deepcopy(module).double(), oracles.cast(x)
    kept = torch.stack([categorical_factor(p, r).square().sum() for r in range(1, 10)])
    kept = kept / (1 - p.square().sum(1)).sum()
    for share in (0.2, 0.5, 0.9):
        r = 1 + int((kept < share).sum())
        assert directions_for_share(module, [x[:2], x[2:]], share) == r
        V = fisher_embedding(module, [x], random_mask(module, 20), n_directions=share)
        assert V.shape[1] == r
    with pytest.raises(TypeError, match="reads batches twice"):
        fisher_embedding(module, iter([x]), random_mask(module, 20), n_directions=0.5)
    for bad in (0.5, 1.0, 0):
        with pytest.raises(ValueError, match=f"None or an int of at least 1, got {bad}"):
            fisher_diagonal(module, [x], n_directions=bad)


def test_to_logits_and_keyword_inputs() -> None:
    class TwoInputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(2, 4)

        def forward(self, left: Tensor, right: Tensor) -> dict[str, Tensor]:
            return {"scores": self.a(left) * torch.tanh(self.b(right))}

    module = TwoInputs().double()
    left, right = torch.randn(6, 3).double(), torch.randn(6, 2).double()
    batches = [{"left": left[:4], "right": right[:4]}, {"left": left[4:], "right": right[4:]}]

    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x[:, :3], x[:, 3:])["scores"]

    g, p = oracles.scores(Joined(), torch.cat([left, right], 1))
    diagonal = fisher_diagonal(module, batches, to_logits=lambda out: out["scores"])
    assert error(flat(diagonal), oracles.diagonal(g, p)) < 1e-10
    mask = random_mask(module, 11)
    V = fisher_embedding(
        module, batches, mask, dtype=torch.float64, to_logits=lambda out: out["scores"]
    )
    expected = oracles.information(g[:, :, oracles.columns(module, mask.indices)], p)
    assert error(V.mT @ V, expected) < 1e-10
    probabilities = predicted_means(module, batches, to_logits=lambda out: out["scores"])
    torch.testing.assert_close(probabilities, p)


def test_one_sample_at_a_time() -> None:
    module, x, *_ = case("conv_norm")
    mask = random_mask(module, 60)
    together = fisher_embedding(module, [x], mask)
    alone = fisher_embedding(module, x.split(1), mask)
    # Two float32 results, each with the error that it may have.
    assert error(alone, together.double()) < 2 * TOLERANCE[torch.float32]


class _Mixing(nn.Module):
    """Its output for a sample depends on the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 6)
        self.norm = nn.BatchNorm1d(6, track_running_stats=False)
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)))


class _Constant(nn.Module):
    def __init__(self, output: object) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.output = output

    def forward(self, x: Tensor) -> object:
        if isinstance(self.output, Tensor):
            return self.output.expand(len(x), *self.output.shape[1:]) * self.weight
        return self.output


class _Sick(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) / (x[:, :1] != 7)


@pytest.mark.parametrize(
    ("module", "batches", "kind", "message"),
    [
        (_Mixing(), [torch.randn(4, 5)], ValueError, "must not depend on the other samples"),
        (networks.mlp(), [], ValueError, "at least one sample"),
        (nn.ReLU(), [torch.randn(4, 5)], ValueError, "found no parameters"),
        (_Constant(torch.ones(1, 1)), [torch.randn(4, 5)], ValueError, r"found \(4, 1\)"),
        (_Constant(torch.ones(1, 1, 3)), [torch.randn(4, 5)], ValueError, r"found \(4, 1, 3\)"),
        (_Constant("hello"), [torch.randn(4, 5)], TypeError, "found str"),
        (networks.mlp(), ["hello"], TypeError, "found str"),
        (
            _Sick(),
            [torch.ones(4, 5), torch.tensor([[1.0] * 5, [7.0] * 5])],
            ValueError,
            "NaN or infinite for sample 5",
        ),
    ],
)
def test_errors(module: nn.Module, batches: list, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        fisher_diagonal(module, batches)


def test_a_mask_of_another_network() -> None:
    mask = random_mask(networks.mlp(), 10)
    with pytest.raises(ValueError, match=r"made for parameters 0.weight \(7, 5\).*has weight"):
        fisher_embedding(nn.Linear(5, 3), [torch.randn(4, 5)], mask)


def test_an_input_overwritten_in_place_is_an_error() -> None:
    class Overwriting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = x * 1
            h = self.a(x)
            with torch.no_grad():
                x.data.add_(1)
                x.add_(1)
            return self.b(torch.tanh(h))

    with pytest.raises(RuntimeError, match=r"in ?place"):
        fisher_diagonal(Overwriting(), [torch.randn(4, 5)])
