"""Images are read with channels last in memory by a CPU, if a network takes them so."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from skfishermask import fisher_diagonal, fisher_embedding
from skfishermask.fisher.likelihood import categorical_factor
from skfishermask.jacobian import share_facts
from tests import oracles
from tests.jacobian.common import mask_of

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


def read(module: nn.Module, x: Tensor) -> tuple[Tensor, list[bool]]:
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
    embedding, formats = read(module, x)
    assert formats == [True]
    assert x.is_contiguous()
    assert_as_oracle(embedding, module, x)


@pytest.mark.parametrize("between", [viewed, strided, Doubled.apply])
def test_a_network_that_needs_channels_first_gets_them(
    between: Callable[[Tensor], Tensor],
) -> None:
    x = images()
    module = Convolutional(between)
    embedding, formats = read(module, x)
    # Once in vain, then as they came.
    assert (formats[0], formats[-1]) == (True, False)
    assert_as_oracle(embedding, module, x)


def test_float64_and_single_images_are_read_as_they_come() -> None:
    x = images()
    assert read(Convolutional().double(), x.double())[1] == [False]
    assert read(Convolutional(), x[:1])[1] == [False]


def test_errors_are_those_of_images_as_they_come() -> None:
    def mixed(h: Tensor) -> Tensor:
        return h - h.mean(0)

    with pytest.raises(ValueError, match="must not depend on the other"):
        read(Convolutional(mixed), images())

    def failing(h: Tensor) -> Tensor:
        raise RuntimeError(f"channels last: {not h.is_contiguous()}")

    with pytest.raises(RuntimeError, match="channels last: False"):
        read(Convolutional(failing), images())


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
