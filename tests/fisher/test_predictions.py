"""Batches read in halves where memory runs out, and bad samples named by their row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from skfishermask import fisher_diagonal, fisher_embedding
from skfishermask.fisher import (
    predicted_means,
)
from tests import networks
from tests.fisher.common import Tagger, mask_of_all, tokens
from tests.jacobian.common import mask_of


class _Full(torch.autograd.Function):
    """The identity, with a backward pass with room for a number of samples."""

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


@pytest.mark.parametrize("read", [READS["diagonal"], READS["embedding"]])
@pytest.mark.parametrize("width", [8, 2**15])
def test_a_large_batch_is_read_in_equal_parts(read: Any, width: int) -> None:
    torch.manual_seed(0)
    module, x = Cramped(200), torch.randn(150, 5)
    module.net = nn.Sequential(nn.Linear(5, width), nn.ReLU(), nn.Linear(width, 2))
    expected = read(module, list(x.split(15)))
    module.sizes = []
    torch.testing.assert_close(read(module, [x]), expected)
    # The first part shows how large a sample's tensors are: of the wide network 128 kB.
    few = width > 8 and torch.get_num_threads() <= 2
    parts = [50, *[25] * 4] if few else [50, 100]
    assert [size for size in module.sizes if size > 4] == parts


def test_no_room_for_a_single_sample() -> None:
    module = Cramped(0)
    with pytest.raises(torch.OutOfMemoryError, match=r"single sample.*mask_fraction.*no room"):
        fisher_diagonal(module, [torch.randn(5, 5)])


def test_a_share_of_the_trace_needs_an_order() -> None:
    x = tokens(3)
    with pytest.raises(ValueError, match="share of the trace"):
        fisher_embedding(Tagger(), [x], mask_of_all(Tagger()), n_directions=0.5)
    V = fisher_embedding(
        nn.Linear(4, 3),
        [torch.randn(5, 4)],
        mask_of_all(nn.Linear(4, 3)),
        likelihood="bernoulli",
        n_directions=0.99,
    )
    assert 1 < V.shape[1] <= 3
