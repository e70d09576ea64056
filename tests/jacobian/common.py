"""What several tests of this folder share."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn

from skfishermask import ParameterMask, fisher_diagonal, fisher_embedding
from skfishermask.fisher.likelihood import categorical_factor
from skfishermask.jacobian.graph import Graph, Use
from tests import networks, oracles
from tests.networks import Net, weight

# Samples of `pooled`.
N_POOLED = 9


def mask_of(module: nn.Module, names: list[str] | None = None) -> ParameterMask:
    """Every entry of some parameters, of all if none are named."""
    shapes = {name: p.shape for name, p in module.named_parameters()}
    kept = {name: torch.arange(shapes[name].numel()) for name in names or shapes}
    return ParameterMask(kept, shapes)


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert float((found - expected).norm() / expected.norm()) < 1e-10


def diagonal_and_embedding(
    module: nn.Module, batches: list[networks.Batch]
) -> tuple[Tensor, Tensor]:
    """Diagonal (P,) and embedding (n, r, P) of all parameters, float64."""
    module = copy.deepcopy(module).requires_grad_()
    diagonal = fisher_diagonal(module, batches)
    V = fisher_embedding(module, batches, mask_of(module), dtype=torch.float64)
    return torch.cat([d.flatten() for d in diagonal.values()]), V


def with_parameters(run: Callable[..., Tensor], *shapes: tuple[int, ...]) -> Net:
    """Return a float64 network `run(x, *parameters)` with random parameters p0, p1 ..."""
    parts = {f"p{i}": weight(*shape) for i, shape in enumerate(shapes)}
    net = Net(lambda net, x: run(x, *(getattr(net, name) for name in parts)), **parts)
    return net.double()


def graph_of(module: nn.Module, x: Tensor) -> tuple[Tensor, Graph]:
    outputs = module(x)
    return outputs, Graph(outputs, dict(module.named_parameters()))


def only_use(module: nn.Module, x: Tensor, name: str = "p0") -> tuple[Tensor, Use]:
    """Return the outputs, and the single use of a parameter."""
    outputs, graph = graph_of(module, x)
    [use] = [use for use in graph.uses() if use.name == name]
    return outputs, use


def gradients_by_sample(module: nn.Module, x: Tensor, row: Tensor) -> dict[str, Tensor]:
    """Gradients of `row` times the outputs, a loop over samples: name -> (n, *shape)."""
    parameters = dict(module.named_parameters())
    gradients = [
        torch.autograd.grad((module(sample)[0] * row[s]).sum(), [*parameters.values()])
        for s, sample in enumerate(x.split(1))
    ]
    return {name: torch.stack([g[i] for g in gradients]) for i, name in enumerate(parameters)}


@cache
def pooled(name: str) -> tuple[nn.Module, networks.Batch, Tensor, Tensor]:
    """Return a network, nine samples, and the diagonal and embedding that the oracle finds."""
    make, sample = networks.NETWORKS[name]
    torch.manual_seed(1)
    module, x = make().double(), oracles.cast(sample(N_POOLED))
    g, p = oracles.scores(module, x)
    return module, x, oracles.diagonal(g, p), categorical_factor(p) @ g
