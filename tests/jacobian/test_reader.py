"""Reading a network: in any batches, in any order, and what it is refused for or costs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from skfishermask import ParameterMask, fisher_diagonal, fisher_embedding
from skfishermask.fisher import predicted_means
from skfishermask.fisher.likelihood import categorical_factor
from tests import forked, networks, oracles
from tests.networks import Net


def mask_of(module: nn.Module, names: list[str] | None = None) -> ParameterMask:
    """Every entry of some parameters, of all if none are named."""
    shapes = {name: p.shape for name, p in module.named_parameters()}
    kept = {name: torch.arange(shapes[name].numel()) for name in names or shapes}
    return ParameterMask(kept, shapes)


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert float((found - expected).norm() / expected.norm()) < 1e-10


def read(module: nn.Module, batches: list[networks.Batch]) -> tuple[Tensor, Tensor]:
    """Diagonal (P,) and embedding (n, r, P) of all parameters, float64."""
    diagonal = fisher_diagonal(module, batches)
    V = fisher_embedding(module, batches, mask_of(module), dtype=torch.float64)
    return torch.cat([d.flatten() for d in diagonal.values()]), V


# --------------------------------------------------------------------------------------
# The cut into batches and the order of the pool change nothing
# --------------------------------------------------------------------------------------

N = 9
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


@cache
def pooled(name: str) -> tuple[nn.Module, networks.Batch, Tensor, Tensor]:
    """Give a network, nine samples, and the diagonal and embedding that the oracle finds."""
    make, sample = networks.NETWORKS[name]
    torch.manual_seed(1)
    module, x = make().double(), oracles.cast(sample(N))
    g, p = oracles.scores(module, x)
    return module, x, oracles.diagonal(g, p), categorical_factor(p) @ g


def cut(order: list[int], cuts: list[bool], x: networks.Batch) -> list[networks.Batch]:
    """Put samples in an order and cut it; `cuts` says after which of the first eight."""
    ends = [i + 1 for i, after in enumerate(cuts) if after] + [N]
    starts = [0, *ends[:-1]]
    return [oracles.rows(x, torch.tensor(order[a:b])) for a, b in zip(starts, ends, strict=True)]


IN_ORDER = [*range(N)]
BACKWARDS = IN_ORDER[::-1]


@pytest.mark.parametrize("name", POOLED)
@settings(max_examples=5)
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
    found_diagonal, found_V = read(module, cut(order, cuts, x))
    assert_close(found_diagonal, diagonal)
    assert_close(found_V, V[order])


@pytest.mark.parametrize("name", ["routed", "routed_tokens", "sometimes_twice"])
def test_a_pool_sorted_by_what_decides_the_way(name: str) -> None:
    module, x, diagonal, V = pooled(name)
    order = x.flatten(1)[:, 0].argsort().tolist()
    for cuts in ([False, False, True] * 3, [False, False, False, False, True, False, False, False]):
        for one in (order, order[::-1]):
            found_diagonal, found_V = read(module, cut(one, cuts[: N - 1], x))
            assert_close(found_diagonal, diagonal)
            assert_close(found_V, V[one])


@pytest.mark.parametrize(
    "name",
    ["conv_norm", "norms", "prelu", "rms_norm", "layer_scale", "tied", "text_gru", "masked_text",
     "windows", "swin", "vit", "encoder", "decoder", "convnext", "autocast", "lora_merged"],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:Reading sample by sample")
def test_what_is_not_held_is_made_anew(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in batches whose operands are too large to be held, in the last backward pass too."""
    monkeypatch.setattr("skfishermask.jacobian.batch_jacobian.TENSOR_CACHE_BYTES", 0)
    module, x, diagonal, V = pooled(name)
    found_diagonal, found_V = read(module, [x])
    assert_close(found_diagonal, diagonal)
    assert_close(found_V, V)


def test_tokens_as_many_as_samples() -> None:
    """Shapes alone cannot tell the axes apart."""
    torch.manual_seed(1)
    module, x = networks.TimeFirst().double(), networks.tokens(5)
    assert x.shape == (5, 5)
    g, p = oracles.scores(module, x)
    diagonal, V = read(module, [x])
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
    diagonal, V = read(module, [x[:3], x[3:]])
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


@pytest.mark.parametrize("size", [1, 4])
def test_a_parameter_that_is_not_used(size: int) -> None:
    module = Net(
        lambda net, x: net.output(x), output=nn.Linear(5, 3), spare=nn.Linear(2, 2)
    ).double()
    x = torch.randn(4, 5).double()
    g, p = oracles.scores(module, x)
    diagonal, V = read(module, list(x.split(size)))
    assert_close(diagonal, oracles.diagonal(g, p))
    assert_close(V, categorical_factor(p) @ g)


def test_one_sample_of_a_network_whose_gradients_are_taken_in_parts() -> None:
    # More numbers in two parameters than are asked for together.
    module = nn.Sequential(nn.Linear(5, 3000), nn.Tanh(), nn.Linear(3000, 3000), nn.Linear(3000, 3))
    x = torch.randn(2, 5)
    shapes = {name: p.shape for name, p in module.named_parameters()}
    mask = ParameterMask({name: torch.arange(3) for name in shapes}, shapes)
    alone = fisher_embedding(module, x.split(1), mask)
    torch.testing.assert_close(alone, fisher_embedding(module, [x], mask))


def test_a_network_that_does_not_use_its_parameters() -> None:
    module = Net(lambda net, x: 2 * x, unused=nn.Linear(3, 3))
    for x in (torch.randn(1, 3), torch.randn(4, 3)):
        diagonal, V = read(module, [x])
        assert not diagonal.any()
        assert V.shape == (len(x), 2, 12)
        assert not V.any()


# --------------------------------------------------------------------------------------
# Out of memory
# --------------------------------------------------------------------------------------


class _Full(torch.autograd.Function):
    """The identity, with a backward pass that has room for so many samples."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, owner: Cramped) -> Tensor:
        ctx.owner = owner
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        ctx.owner.take(len(g))
        return g, None


class Cramped(nn.Module):
    """A device with room for `limit` samples, in the forward pass or in the backward pass."""

    def __init__(self, limit: int, *, backward: bool = False) -> None:
        super().__init__()
        self.net = networks.mlp()
        self.limit, self.backward = limit, backward
        self.sizes: list[int] = []
        self.refused: list[int] = []

    def take(self, n: int) -> None:
        if n > self.limit:
            self.refused.append(n)
            raise torch.OutOfMemoryError("no room")

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        if self.backward:
            return _Full.apply(self.net(x), self)
        self.take(len(x))
        return self.net(x)


READS = {
    "diagonal": lambda module, batches: fisher_diagonal(module, batches)["net.0.weight"],
    "embedding": lambda module, batches: fisher_embedding(module, batches, mask_of(module)),
    "probabilities": predicted_means,
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
@pytest.mark.parametrize("sizes", [[8], [8, 8, 8], [5, 8, 3, 1, 8]])
def test_a_halved_size_is_remembered(read: Any, sizes: list[int]) -> None:
    module, x = Cramped(100), torch.randn(sum(sizes), 5)
    expected = read(module, list(x.split(sizes)))
    module.limit, module.sizes = 2, []
    torch.testing.assert_close(read(module, list(x.split(sizes))), expected)
    # Halves until it fits, and none of the later batches is tried whole.
    assert module.refused == ([8, 4] if sizes[0] == 8 else [5, 3])
    assert module.sizes[:2] == module.refused
    assert max(module.sizes[2:]) == 2
    # The next call starts anew: there may be more room by then.
    module.sizes, module.limit = [], 100
    torch.testing.assert_close(read(module, list(x.split(sizes))), expected)
    assert max(module.sizes) == 8


@pytest.mark.parametrize("limit", [100, 2])
def test_a_bad_sample_has_its_number_in_the_pool(limit: int) -> None:
    module, x = Cramped(limit), torch.randn(16, 5)
    x[13] = torch.nan
    with pytest.raises(ValueError, match="infinite for sample 13"):
        fisher_diagonal(module, x.split(8))


@pytest.mark.parametrize("backward", [False, True])
def test_memory_runs_out_in_the_middle(backward: bool) -> None:
    x = torch.randn(24, 5)
    module = Cramped(100, backward=backward)
    expected = fisher_embedding(module, x.split(8), mask_of(module))

    def batches() -> Iterator[Tensor]:
        yield x[:8]
        module.limit = 3
        yield from x[8:].split(8)

    found = fisher_embedding(module, batches(), mask_of(module))
    torch.testing.assert_close(found, expected)
    assert module.refused == [8, 4]


def test_no_room_for_a_single_sample() -> None:
    module = Cramped(0)
    with pytest.raises(torch.OutOfMemoryError, match=r"single sample.*mask_fraction.*no room"):
        fisher_diagonal(module, [torch.randn(5, 5)])


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


class _OwnLookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.shape = table.shape
        return F.embedding(index, table)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return g.new_zeros(ctx.shape).index_add(0, index.flatten(), g.flatten(0, -2)), None


def look_up(n_rows: int) -> nn.Module:
    """A table of 100 columns behind a function that no rule covers."""

    def run(net: Net, x: Tensor) -> Tensor:
        return net.output(torch.tanh(_OwnLookup.apply(net.table, x)).mean(1))

    return Net(run, table=networks.weight(n_rows, 100), output=nn.Linear(100, 6))


def peak() -> float:
    """Give the most memory that this process has had, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def memory_of_ten_entries() -> float:
    """Say how far the embedding lies above a pass of its network, forward and backward."""

    def embed(module: nn.Module) -> Tensor:
        shapes = {name: p.shape for name, p in module.named_parameters()}
        return fisher_embedding(module, [x], ParameterMask({"table": torch.arange(10)}, shapes))

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    x = torch.randint(0, 10, (16, 3))
    # A small network first brings in what is imported late.
    embed(look_up(20))
    module = look_up(110_000)
    torch.autograd.grad(module(x).sum(), [*module.parameters()])
    before = peak()
    assert embed(module).any()
    return peak() - before


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's peak of memory")
@pytest.mark.xdist_group("processes")
def test_ten_entries_of_a_large_table_without_a_rule() -> None:
    # A process remembers its own peak.
    status, found = forked.run(memory_of_ten_entries)
    assert status == 0
    # MB; a gradient of the table by itself has 44.
    assert found < 50


def test_a_view_in_which_entries_overlap_is_read_sample_by_sample() -> None:
    module = Net(
        lambda net, x: net.output(torch.tanh(x @ net.band.unfold(0, 4, 1))),
        band=nn.Parameter(torch.randn(8)),
        output=nn.Linear(4, 3),
    ).double()
    x = torch.randn(6, 5).double()
    g, p = oracles.scores(module, x)
    with pytest.warns(UserWarning, match=r"^Reading .*band \(Unfold\)"):
        found = fisher_diagonal(module, [x])
    flat = torch.cat([found[name].flatten() for name, _ in module.named_parameters()])
    torch.testing.assert_close(flat, oracles.diagonal(g, p))


def test_squares_of_a_convolution_too_large_for_the_cache() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(180, 1400, 3, groups=2, bias=False),
        nn.Tanh(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(1400, 3),
    ).double()
    x = torch.randn(3, 180, 4, 4).double()
    g, p = oracles.scores(module, x)
    found = torch.cat([values.flatten() for values in fisher_diagonal(module, [x]).values()])
    assert_close(found, oracles.diagonal(g, p))
