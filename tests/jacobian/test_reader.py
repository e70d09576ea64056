"""Reading a network: in any batches, in any order, and what it is refused for or costs."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from skfishermask import fisher_diagonal, fisher_embedding
from skfishermask.fisher.likelihood import categorical_factor
from skfishermask.jacobian import share_facts
from tests import networks, oracles
from tests.jacobian.common import (
    N_POOLED as N,
)
from tests.jacobian.common import assert_close, diagonal_and_embedding, mask_of, pooled
from tests.networks import Net, weight

# --------------------------------------------------------------------------------------
# The cut into batches and the order of the pool change nothing
# --------------------------------------------------------------------------------------

POOLED = [
    "mlp",
    "branching",
    "conv_norm",
    "encoder_sequence_first",
    "gru_packed",
    "loop_to_the_longest",
    "masked_text",
    "routed",
    "routed_tokens",
    "sequence_first",
    "sometimes_twice",
    "swin",
    "windows",
]


def cut(order: list[int], cuts: list[bool], x: networks.Batch) -> list[networks.Batch]:
    """Reorder samples and cut them into batches after those that `cuts` marks."""
    ends = [i + 1 for i, after in enumerate(cuts) if after] + [N]
    starts = [0, *ends[:-1]]
    return [oracles.rows(x, torch.tensor(order[a:b])) for a, b in zip(starts, ends, strict=True)]


IN_ORDER = [*range(N)]
BACKWARDS = IN_ORDER[::-1]


@pytest.mark.parametrize("name", POOLED)
@settings(max_examples=2)
@given(
    order=st.permutations(IN_ORDER), cuts=st.lists(st.booleans(), min_size=N - 1, max_size=N - 1)
)
@example(IN_ORDER, [False] * 8)
@example(IN_ORDER, [True] * 8)
@example(IN_ORDER, [True] + [False] * 7)  # One sample, then eight.
@example(IN_ORDER, [False] * 7 + [True])
@example(BACKWARDS, [True] + [False] * 7)
@example(BACKWARDS, [False] * 7 + [True])
@example(IN_ORDER, [False, False, True, False, False, True, False, False])
def test_any_cut_and_any_order(name: str, order: list[int], cuts: list[bool]) -> None:
    module, x, diagonal, V = pooled(name)
    found_diagonal, found_V = diagonal_and_embedding(module, cut(order, cuts, x))
    assert_close(found_diagonal, diagonal)
    assert_close(found_V, V[order])


def test_a_few_samples_show_the_layout_for_batches_of_any_length(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    grad, lengths = torch.autograd.grad, []

    def counting(outputs: Tensor, *arguments: Any, **options: Any) -> Any:
        lengths.append(len(outputs))
        return grad(outputs, *arguments, **options)

    monkeypatch.setattr(torch.autograd, "grad", counting)
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x = torch.randn(50, 3, dtype=torch.float64)
    V = fisher_embedding(module, x.split([20, 20, 10]), mask_of(module), dtype=torch.float64)
    # Two backward passes with coded weights; then one row of R for each batch.
    assert lengths == [4, 4, 20, 20, 10]
    assert_close(V, fisher_embedding(module, x.split(1), mask_of(module), dtype=torch.float64))


def other_way(net: Net, x: Tensor) -> Tensor:
    """Positions before samples, in batches of more than four."""
    x = x.transpose(0, 1).reshape(-1, 3) if len(x) > 4 else x.reshape(-1, 3)
    y = torch.tanh(x @ net.weight)
    y = y.view(2, -1, 4).transpose(0, 1) if len(y) > 8 else y.view(-1, 2, 4)
    return y.flatten(1) @ net.head


def test_few_samples_that_take_another_way_show_nothing() -> None:
    torch.manual_seed(0)
    module = Net(other_way, weight=weight(3, 4), head=weight(8, 3)).double()
    x = torch.randn(9, 2, 3, dtype=torch.float64)
    assert_close(
        fisher_embedding(module, [x], mask_of(module), dtype=torch.float64),
        fisher_embedding(module, x.split(1), mask_of(module), dtype=torch.float64),
    )


@pytest.mark.parametrize("name", ["routed", "routed_tokens", "sometimes_twice"])
def test_a_pool_sorted_by_what_decides_the_way(name: str) -> None:
    module, x, diagonal, V = pooled(name)
    order = x.flatten(1)[:, 0].argsort().tolist()
    for cuts in ([False, False, True] * 3, [False, False, False, False, True, False, False, False]):
        for one in (order, order[::-1]):
            found_diagonal, found_V = diagonal_and_embedding(module, cut(one, cuts[: N - 1], x))
            assert_close(found_diagonal, diagonal)
            assert_close(found_V, V[one])


# --------------------------------------------------------------------------------------
# Networks that mix samples
# --------------------------------------------------------------------------------------


def mixing(before: Any = None, middle: Any = None, after: Any = None) -> nn.Module:
    def run(net: Net, x: Tensor) -> Tensor:
        x = before(x) if before else x
        h = torch.tanh(net.hidden(x))
        h = middle(h) if middle else h
        logits = net.output(h)
        return after(logits) if after else logits

    return Net(run, hidden=nn.Linear(5, 6), output=nn.Linear(6, 3))


def norm_of_the_batch() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 5)),
        nn.Conv1d(1, 2, 2),
        nn.BatchNorm1d(2, track_running_stats=False),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(8, 3),
    )


def attention_over_the_batch() -> nn.Module:
    def run(net: Net, x: Tensor) -> Tensor:
        h = net.hidden(x)
        return net.output((h @ h.T).softmax(1) @ h)

    return Net(run, hidden=nn.Linear(5, 4), output=nn.Linear(4, 3))


def encoder_fed_batch_first() -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, 6)
    return Net(
        lambda net, x: net.output(net.layer(net.inner(x[:, :, None])).mean(1)),
        inner=nn.Linear(1, 4),
        layer=layer,
        output=nn.Linear(4, 3),
    )


def first_takes_from_the_others(x: Tensor) -> Tensor:
    return torch.cat([x[:1] + x.mean(0), x[1:]])


MIXING = {
    "inputs centred": partial(mixing, before=lambda x: x - x.mean(0)),
    "inputs summed up": partial(mixing, before=lambda x: x.cumsum(0)),
    "inputs shifted": partial(mixing, before=lambda x: x.roll(1, 0)),
    "first input": partial(mixing, before=first_takes_from_the_others),
    "scaled by all inputs": partial(mixing, before=lambda x: x / x.square().mean()),
    "features centred": partial(mixing, middle=lambda h: h - h.mean(0)),
    "softmax over the batch": partial(mixing, middle=lambda h: h.softmax(0)),
    "features summed up": partial(mixing, middle=lambda h: h.cumsum(0)),
    "features sorted": partial(mixing, middle=lambda h: h.sort(0).values),
    "first features": partial(mixing, middle=first_takes_from_the_others),
    "logits centred": partial(mixing, after=lambda z: z - z.mean(0)),
    "logits summed up": partial(mixing, after=lambda z: z.cumsum(0)),
    "logits over all": partial(mixing, after=lambda z: z / z.detach().abs().max()),
    "norm of the batch": norm_of_the_batch,
    "attention over the batch": attention_over_the_batch,
    "encoder fed batch first": encoder_fed_batch_first,
}


@pytest.mark.parametrize("make", MIXING.values(), ids=MIXING)
def test_a_network_that_mixes_samples(make: Callable[[], nn.Module]) -> None:
    module, x = make(), torch.randn(6, 5)
    refused = pytest.raises(ValueError, match="must not depend on the other samples")
    output = [name for name, _ in module.named_parameters()][-2:]
    for batches in ([x], [x[:1], x[1:]], [x[:2], x[2:]]):
        with refused:
            fisher_diagonal(module, batches)
        # The last layer alone is asked for: the mixing may be far from it.
        with refused:
            fisher_embedding(module, batches, mask_of(module, output))
    # Alone, no sample can meet another.
    for sample in x[:2].split(1):
        assert fisher_diagonal(module, [sample])


def test_a_norm_of_the_batch_that_cannot_read_one_sample() -> None:
    module = nn.Sequential(
        nn.Linear(5, 6), nn.BatchNorm1d(6, track_running_stats=False), nn.Linear(6, 3)
    )
    with pytest.raises(ValueError, match="must not depend on the other samples"):
        fisher_diagonal(module, [torch.randn(4, 5)])


# --------------------------------------------------------------------------------------
# What a parameter without a rule costs
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "own_function", "reshaped_by_values", "lora_merged"])
def test_one_forward_pass_a_batch_for_parameters_with_a_rule(name: str) -> None:
    make, sample = networks.NETWORKS[name]
    module, x = make(), sample(48)
    slow = networks.SLOW.get(name, [])
    mask = mask_of(module, [n for n, _ in module.named_parameters() if n not in slow])
    count = 0

    def add(*_: object) -> None:
        nonlocal count
        count += 1

    module.register_forward_hook(add)
    counts = []
    for n_batches in (4, 12):
        count = 0
        fisher_embedding(module, x[: 4 * n_batches].split(4), mask)
        counts.append(count)
    assert counts[1] - counts[0] == 8
    assert counts[0] <= 8  # Some more to check the network, not many.


def test_a_warning_says_what_and_why_once() -> None:
    make, sample = networks.NETWORKS["own_function"]
    module, x = make(), sample(12)
    with pytest.warns(UserWarning, match=r"^Reading .*own_scale.*OwnProduct") as caught:
        fisher_diagonal(module, x.split(3))
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Not asked for, not worth a word.
        fisher_embedding(module, x.split(3), mask_of(module, ["hidden.weight"]))


# --------------------------------------------------------------------------------------
# Images have channels last in memory on a CPU, if the network takes them so
# --------------------------------------------------------------------------------------

N_IMAGES = 7


class Convolutional(nn.Module):
    def __init__(self, between: Callable[[Tensor], Tensor] = lambda h: h) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.depthwise, self.second = nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 4, 2, stride=2)
        self.between = between
        self.out = nn.Linear(4 * 3 * 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm(self.first(x)))
        h = torch.relu(self.second(self.depthwise(self.between(h))))
        return self.out(h.flatten(1))


def viewed(h: Tensor) -> Tensor:
    return h.view(len(h), -1).view(h.shape)


def strided(h: Tensor) -> Tensor:
    """Read the memory as if channels came first; right for those alone."""
    _, c, height, width = h.shape
    return h.as_strided(h.shape, (c * height * width, height * width, width, 1)) * 1


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g.view(len(g), -1).view(g.shape)


def images() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(N_IMAGES, 3, 8, 8)


def read_images(module: nn.Module, x: Tensor) -> tuple[Tensor, list[bool]]:
    """Return the embedding of images, and whether they had channels last in each pass of all."""
    formats: list[bool] = []

    def note(layer: nn.Module, inputs: tuple[Tensor]) -> None:
        if len(inputs[0]) == len(x):
            formats.append(inputs[0].is_contiguous(memory_format=torch.channels_last))

    hook = module.get_submodule("first").register_forward_pre_hook(note)
    embedding = fisher_embedding(module, [x], mask_of(module))
    hook.remove()
    return embedding, formats


def assert_as_oracle(embedding: Tensor, module: nn.Module, x: Tensor) -> None:
    g, p = oracles.scores(module.double(), x.double())
    expected = categorical_factor(p) @ g
    assert float((embedding - expected).norm() / expected.norm()) < 1e-5


def test_images_are_read_with_channels_last() -> None:
    x = images()
    module = Convolutional()
    embedding, formats = read_images(module, x)
    assert formats == [True]
    assert x.is_contiguous()
    assert_as_oracle(embedding, module, x)


@pytest.mark.parametrize("between", [viewed, strided, Doubled.apply])
def test_a_network_that_needs_channels_first_gets_them(
    between: Callable[[Tensor], Tensor],
) -> None:
    x = images()
    module = Convolutional(between)
    embedding, formats = read_images(module, x)
    # Once in vain, then as they came.
    assert (formats[0], formats[-1]) == (True, False)
    assert_as_oracle(embedding, module, x)


def test_float64_and_single_images_are_read_as_they_come() -> None:
    x = images()
    assert read_images(Convolutional().double(), x.double())[1] == [False]
    assert read_images(Convolutional(), x[:1])[1] == [False]


def test_errors_are_those_of_images_as_they_come() -> None:
    def mixed(h: Tensor) -> Tensor:
        return h - h.mean(0)

    with pytest.raises(ValueError, match="must not depend on the other"):
        read_images(Convolutional(mixed), images())

    def failing(h: Tensor) -> Tensor:
        raise RuntimeError(f"channels last: {not h.is_contiguous()}")

    with pytest.raises(RuntimeError, match="channels last: False"):
        read_images(Convolutional(failing), images())


@pytest.mark.parametrize("between", [viewed, strided, Doubled.apply])
def test_queries_that_share_what_they_find_read_it_right(
    between: Callable[[Tensor], Tensor],
) -> None:
    x = images()
    module = Convolutional(between)
    for _ in range(2):
        shared = nn.Sequential(module)
        share_facts(shared, module)
        fisher_diagonal(shared, [x])
        embedding = fisher_embedding(shared, [x], mask_of(shared))
        assert_as_oracle(embedding, copy.deepcopy(module), x)
