"""What one reader has found out serves the others of a query, and the network's next query."""

from __future__ import annotations

import gc
import pickle
import warnings
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from skfishermask import ParameterMask, fisher_diagonal, fisher_embedding
from skfishermask.jacobian import graph_facts, reader, share_facts
from skfishermask.jacobian.located_uses import LayoutProbe, probe_layouts
from tests import networks, oracles
from tests.jacobian.common import mask_of
from tests.jacobian.test_hidden_gradients import Recomputed
from tests.jacobian.test_hidden_gradients import net as hiding
from tests.networks import Batch, Net

# Samples of the labelled set and of the pool, in batches.
SIZES = [6, 5], [7, 7, 3]


def some_of(module: nn.Module) -> ParameterMask:
    """Half of the entries of every second parameter, and of the last one."""
    names = [name for name, p in module.named_parameters() if p.requires_grad]
    mask = mask_of(module, [*names[1::2], names[-1]])
    return ParameterMask({name: index[::2] for name, index in mask.indices.items()}, mask.shapes)


def query(module: nn.Module, x: Batch) -> tuple[list[Tensor], list[str]]:
    """Read diagonals and embeddings of two sets of samples; return them, and what was warned of."""
    sets, start = [], 0
    for sizes in SIZES:
        ends = torch.tensor(sizes).cumsum(0) + start
        starts = ends - torch.tensor(sizes)
        rows = [torch.arange(a, b) for a, b in zip(starts, ends, strict=True)]
        sets.append([oracles.rows(x, one) for one in rows])
        start = int(ends[-1])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = [d for batches in sets for d in fisher_diagonal(module, batches).values()]
        mask = some_of(module)
        found += [fisher_embedding(module, batches, mask) for batches in sets]
    return found, [str(warning.message) for warning in caught]


@pytest.fixture
def probes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of samples of the graphs that are probed."""
    lengths: list[int] = []

    def counting(outputs: Tensor, *arguments: Any) -> LayoutProbe:
        lengths.append(len(outputs))
        return probe_layouts(outputs, *arguments)

    monkeypatch.setattr(reader, "probe_layouts", counting)
    return lengths


def made(name: str) -> tuple[nn.Module, Batch]:
    torch.manual_seed(0)
    if name == "reversible":
        return hiding(name), torch.randn(28, 6)
    make, sample = networks.NETWORKS[name]
    return make(), sample(28)


# What is probed in a query, and in the network's next one: four samples, where shapes alone decide.
# Without some weights the attention of `encoder` computes other operations.
EVERY_BATCH = [*SIZES[0], *SIZES[1]]
PROBED: dict[str, tuple[list[int], list[int]]] = {
    "mobilenet": ([4], []),
    "encoder_sequence_first": ([4], []),
    "encoder": ([4, 4], []),
    "text_gru": ([4], []),
    "bag_sum": ([4], []),
    "functional": ([4], []),
    "routed": (EVERY_BATCH * 2, EVERY_BATCH * 2),
    "own_function": ([4, *EVERY_BATCH] * 2, [4, *EVERY_BATCH] * 2),
    "reversible": ([], []),
}


@pytest.mark.parametrize("name", PROBED)
def test_each_graph_is_probed_once_and_nothing_that_is_read_differs(
    name: str, probes: list[int]
) -> None:
    module, x = made(name)
    alone = query(module, x)
    for expected in PROBED[name]:
        share_facts(module, module)
        probes.clear()
        values, warned = query(module, x)
        assert probes == expected
        assert all(map(torch.equal, values, alone[0]))
        assert warned == alone[1]


def test_more_parameters_than_before(probes: list[int]) -> None:
    module, x = made("mobilenet")
    share_facts(module, module)
    names = [name for name, _ in module.named_parameters()]
    for some, expected in (
        (names[-3:], [4]),
        (names[-1:], [4]),
        (names, [4, 4]),
        (names[:5], [4, 4]),
    ):
        fisher_embedding(module, [x], mask_of(module, some))
        assert probes == expected


def test_a_limited_number_of_lengths_is_kept(
    probes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph_facts, "_MOST_KEPT", 2)
    module = Net(lambda net, x: net.output(x).mean(1), output=nn.Linear(3, 2))
    for expected in ([4] * 3, [4]):
        share_facts(module, module)
        probes.clear()
        for length in (2, 3, 4):
            fisher_diagonal(module, [torch.randn(5, length, 3)])
            fisher_diagonal(module, [torch.randn(6, length, 3)])
        assert probes == expected


# --------------------------------------------------------------------------------------
# Networks that change between two queries
# --------------------------------------------------------------------------------------


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))


def train(module: nn.Sequential) -> None:
    with torch.no_grad():
        module[0].weight.mul_(-2)


def replace_parameter(module: nn.Sequential) -> None:
    module[2].weight = nn.Parameter(torch.randn(4, 5))


def freeze(module: nn.Sequential) -> None:
    module[0].requires_grad_(False)


def replace_activation(module: nn.Sequential) -> None:
    module[1] = nn.ReLU()


def insert_layer(module: nn.Sequential) -> None:
    module.insert(1, nn.LayerNorm(5))


def widen(module: nn.Sequential) -> None:
    module[0], module[2] = nn.Linear(6, 7), nn.Linear(7, 4)


def patch_forward(module: nn.Sequential) -> None:
    module.forward = lambda x: module[2](torch.tanh(module[0](x)).flip(1))


CHANGES: dict[Callable[[nn.Sequential], None], list[int]] = {
    train: [],
    replace_parameter: [],
    freeze: [],
    replace_activation: [4],
    insert_layer: [4],
    widen: [4],
    patch_forward: [4],
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_network_that_has_changed(
    change: Callable[[nn.Sequential], None], probes: list[int]
) -> None:
    module, x = mlp(), torch.randn(28, 6)
    share_facts(module, module)
    query(module, x)
    change(module)
    share_facts(module, module)
    probes.clear()
    values, _ = query(module, x)
    assert probes == CHANGES[change]
    assert all(map(torch.equal, values, query(nn.Sequential(module), x)[0]))


def test_another_dtype_is_probed_again(probes: list[int]) -> None:
    module, x = mlp(), torch.randn(28, 6)
    for _ in range(2):
        share_facts(module, module)
        query(module, x)
        module, x = module.double(), x.double()
    assert probes == [4, 4]


def test_samples_that_are_mixed_since_the_last_query() -> None:
    module, x = mlp(), torch.randn(28, 6)
    share_facts(module, module)
    query(module, x)
    module.register_forward_pre_hook(lambda _, inputs: (inputs[0] - inputs[0].mean(0),))
    share_facts(module, module)
    with pytest.raises(ValueError, match="must not depend on the other samples"):
        query(module, x)


class Sometimes(torch.autograd.Function):
    """Hides the gradients of a block, or has none of them."""

    forward = Recomputed.forward

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor | None]:
        if ctx.block.hides:
            return Recomputed.backward(ctx, gradient)
        (x,) = ctx.saved_tensors
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            return None, torch.autograd.grad(ctx.block(x), x, gradient)[0]


def test_gradients_that_are_hidden_since_the_last_query() -> None:
    module, x = mlp(), torch.randn(28, 6)
    block = module[1] = nn.Linear(5, 5)
    module.forward = lambda x: module[2](Sometimes.apply(block, module[0](x)))
    diagonals = []
    for hides in (False, True):
        block.hides = hides
        share_facts(module, module)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            diagonals.append(fisher_diagonal(module, [x])["1.weight"])
    assert [bool(d.any()) for d in diagonals] == [False, True]


# --------------------------------------------------------------------------------------
# The network stays as it was
# --------------------------------------------------------------------------------------


def test_nothing_is_put_on_the_network_or_holds_it() -> None:
    module, x = mlp(), torch.randn(28, 6)
    before = vars(module).keys(), len(pickle.dumps(module))
    share_facts(module, module)
    query(module, x)
    assert (vars(module).keys(), len(pickle.dumps(module))) == before
    gone = weakref.ref(module)
    del module
    gc.collect()
    assert gone() is None


def test_queries_of_one_network_in_threads() -> None:
    network, x = made("text_gru")
    expected, _ = query(nn.Sequential(network), x)

    def run(_: int) -> list[Tensor]:
        module = nn.Sequential(network)
        share_facts(module, network)
        return query(module, x)[0]

    with ThreadPoolExecutor(3) as threads:
        for values in threads.map(run, range(6)):
            for value, one in zip(values, expected, strict=True):
                torch.testing.assert_close(value, one)
