"""What several tests of this folder share: likelihoods with their losses, and networks."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from skfishermask import ParameterMask
from skfishermask.fisher import Gaussian
from tests import networks, oracles
from tests.jacobian.common import mask_of

TOLERANCE = 1e-10


def in_one_process(network: str) -> pytest.MarkDecorator:
    """Keep the tests of a network together: its oracle is computed once in each process."""
    return pytest.mark.xdist_group(network)


def cross_entropy(f: Tensor, f0: Tensor) -> Tensor:
    return F.cross_entropy(f, f0.softmax(1), reduction="sum")


def binary_cross_entropy(f: Tensor, f0: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(f, f0.sigmoid(), reduction="sum")


def half_squares(f: Tensor, f0: Tensor) -> Tensor:
    return 0.5 * (f - f0).square().sum() / 0.3


def expected_poisson(f: Tensor, f0: Tensor) -> Tensor:
    return F.poisson_nll_loss(f, f0.exp(), reduction="sum")


class Poisson:
    """Counts: a user's own likelihood."""

    def check(self, outputs: Tensor) -> None:
        if outputs.dim() != 2:
            raise ValueError("two axes")

    def rank(self, outputs: Tensor) -> int:
        return outputs.shape[1]

    def factor(self, outputs: Tensor) -> Tensor:
        return torch.diag_embed(torch.exp(outputs / 2))


LIKELIHOODS = {
    "categorical": ("categorical", cross_entropy),
    "bernoulli": ("bernoulli", binary_cross_entropy),
    "gaussian": (Gaussian(0.3), half_squares),
    "own": (Poisson(), expected_poisson),
}


class Tagger(nn.Module):
    """A label for each token: logits (n, C, length)."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.cell = nn.Embedding(7, 3), nn.GRU(3, 3, batch_first=True)
        self.head = nn.Linear(3, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden, _ = self.cell(self.table(tokens))
        return self.head(hidden).transpose(1, 2)


def pixels() -> nn.Module:
    """A label for each pixel: logits (n, C, height, width)."""
    return nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.Conv2d(2, 3, 1))


def tokens(n: int) -> Tensor:
    return torch.randint(1, 7, (n, 4), generator=torch.Generator().manual_seed(3))


def images(n: int) -> Tensor:
    return torch.randn(n, 1, 3, 2, generator=torch.Generator().manual_seed(3))


POSITIONS = {"tokens": (Tagger, tokens), "pixels": (pixels, images)}


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double().cpu() - expected).norm() / expected.norm())


def flat(diagonal: dict[str, Tensor]) -> Tensor:
    return torch.cat([d.flatten() for d in diagonal.values()])


@cache
def case(name: str) -> tuple[nn.Module, networks.Batch, Tensor, Tensor]:
    """Return a float64 network, four samples, the oracle's Jacobian and the outputs."""
    make, sample = {**networks.NETWORKS, **POSITIONS}[name]
    torch.manual_seed(1)
    module, x = make().double(), oracles.cast(sample(4))
    return module, x, *oracles.jacobian(module, x)


def mask_of_all(module: nn.Module) -> ParameterMask:
    """Every entry of the trainable parameters."""
    return mask_of(module, [*oracles.trainable(module)])
