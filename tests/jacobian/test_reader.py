"""Reading a network: in any batches, in any order, and what it is refused for or costs."""

from __future__ import annotations

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
