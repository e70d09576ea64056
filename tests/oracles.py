"""Slow, obvious float64 oracles that the fast code is judged against."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.common.dense import batch_information, first_near, objective, select_batch_oracle

__all__ = ["batch_information", "first_near", "objective", "select_batch_oracle"]


Batch = Tensor | dict[str, Tensor]


def rows(batch: Batch, index: slice | Tensor) -> Batch:
    """Return some samples of a tensor, or of a dict of keyword arguments."""
    if isinstance(batch, Tensor):
        return batch[index]
    return {name: values[index] for name, values in batch.items()}


def n_samples(batch: Batch) -> int:
    return len(batch if isinstance(batch, Tensor) else next(iter(batch.values())))


def cast(batch: Batch, *, device: str = "cpu", dtype: torch.dtype = torch.float64) -> Batch:
    """Move a batch; floating-point numbers to a dtype."""
    if isinstance(batch, Tensor):
        return batch.to(device, dtype if batch.is_floating_point() else None)
    return {name: cast(values, device=device, dtype=dtype) for name, values in batch.items()}


def trainable(module: nn.Module) -> dict[str, Tensor]:
    """Every entry of the parameters that training changes; where all are frozen, of all."""
    parameters = dict(module.named_parameters())
    found = {name: p for name, p in parameters.items() if p.requires_grad} or parameters
    return {name: torch.arange(p.numel()) for name, p in found.items()}


def scores(
    module: nn.Module, x: Batch, to_logits: Callable[[Any], Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """g_c(x) of every parameter, (n, C, P), and p_c(x), (n, C): sample by sample, class by class.

    In evaluation mode and float64, one `autograd.grad` of one log-probability at a time.
    """
    module = copy.deepcopy(module).double().eval().requires_grad_()
    parameters = [p for _, p in module.named_parameters()]
    g, p = [], []
    with sdpa_kernel(SDPBackend.MATH):
        for i in range(n_samples(x)):
            sample = cast(rows(x, slice(i, i + 1)))
            output = module(sample) if isinstance(sample, Tensor) else module(**sample)
            output = output[0] if isinstance(output, tuple) else output
            logits = to_logits(output) if to_logits else output
            log_p = logits.log_softmax(1)[0]
            for one in log_p:
                grads = torch.autograd.grad(one, parameters, retain_graph=True, allow_unused=True)
                flat = [
                    torch.zeros(q.numel()).double() if d is None else d.to_dense().flatten()
                    for q, d in zip(parameters, grads, strict=True)
                ]
                g.append(torch.cat(flat))
            p.append(log_p.detach().exp())
    return torch.stack(g).unflatten(0, (n_samples(x), -1)), torch.stack(p)


def diagonal(g: Tensor, p: Tensor) -> Tensor:
    """Mean over x of sum_c p_c g_c^2, (P,)."""
    return (p[:, :, None] * g.square()).sum(1).mean(0)


def information(g: Tensor, p: Tensor) -> Tensor:
    """I(x) = sum_c p_c g_c g_c^T, (n, P, P)."""
    return torch.einsum("nc,nci,ncj->nij", p, g, g)


def columns(module: nn.Module, indices: Mapping[str, Tensor]) -> Tensor:
    """Number, in the concatenation of all parameters, each kept entry in mask order."""
    start, found = 0, []
    for name, parameter in module.named_parameters():
        if name in indices:
            found.append(start + indices[name])
        start += parameter.numel()
    return torch.cat(found)


def left_uncovered(
    pool: Tensor, known: Tensor, weights: Tensor, noise: float = 0.02, radius: float = 1.0
) -> float:
    """Weighted sum of the pool's posterior variances, given samples of a Gaussian process."""

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return torch.exp(-(a[:, None].double() - b.double()).square().sum(2) / radius**2)

    cross = kernel(pool, known)
    own = kernel(known, known) + noise * torch.eye(len(known)).double()
    explained = (cross * torch.linalg.solve(own, cross.T).T).sum(1)
    return float(weights.double() @ (1 - explained))


def select_by_coverage(
    pool: Tensor,
    labeled: Tensor,
    weights: Tensor,
    n_instances: int,
    noise: float = 0.02,
    target: Tensor | None = None,
) -> list[int]:
    """Greedy posterior variance: each pick is the first of the candidates that leave least.

    A sample i takes c(j, i)^2 / (c(i, i) + noise) from the variance of j, with c the covariance
    given the samples before it.
    """
    others = pool[:0] if target is None else target
    every = nn.functional.normalize(torch.cat([others, labeled, pool]).double())
    covariance = torch.exp(-(every[:, None] - every).square().sum(2))
    weights = weights.cpu().double()
    zeros = torch.zeros(len(every) - len(weights), dtype=torch.float64)
    weights = torch.cat([zeros, weights] if target is None else [weights, zeros])
    known = range(len(others), len(others) + len(labeled))
    picks = [*known]
    excluded = [*range(len(others)), *known]
    for step in range(len(labeled) + n_instances):
        if step >= len(labeled):
            gain = covariance.square() @ weights / (covariance.diagonal() + noise)
            gain[excluded + picks] = -math.inf
            picks.append(first_near(gain, gain.max(), scale=float(weights.sum())))
        row = covariance[picks[step]]
        covariance = covariance - torch.outer(row, row) / (row[picks[step]] + noise)
    return [pick - len(others) - len(labeled) for pick in picks[len(labeled) :]]


def herd(
    pool: Tensor, labeled: Tensor, weights: Tensor, n_instances: int, radius: float
) -> list[int]:
    """Greedy weighted coverage: each pick is the first of the candidates that cover most."""

    def similar(a: Tensor, b: Tensor) -> Tensor:
        return torch.exp(-(a[:, None].double() - b.double()).square().sum(2) / radius**2)

    weights, each = weights.double(), similar(pool, pool)
    covered = torch.cat([similar(labeled, pool), torch.zeros(1, len(pool))]).amax(0)
    picks: list[int] = []
    for _ in range(n_instances):
        gain = (torch.maximum(each, covered) - covered) @ weights
        gain[picks] = -math.inf
        picks.append(first_near(gain, gain.max(), scale=float(weights.sum())))
        covered = torch.maximum(covered, each[picks[-1]])
    return picks


def jacobian(module: nn.Module, x: Batch) -> tuple[Tensor, Tensor]:
    """J of every output by every parameter, (n, outputs, P), and the outputs (n, ...).

    In evaluation mode and float64, one `autograd.grad` of one output of one sample at a time.
    """
    module = copy.deepcopy(module).double().eval().requires_grad_()
    parameters = [p for _, p in module.named_parameters()]
    J, outputs = [], []
    with sdpa_kernel(SDPBackend.MATH):
        for i in range(n_samples(x)):
            sample = cast(rows(x, slice(i, i + 1)))
            output = module(sample) if isinstance(sample, Tensor) else module(**sample)
            output = output[0] if isinstance(output, tuple) else output
            for one in output.flatten():
                grads = torch.autograd.grad(one, parameters, retain_graph=True, allow_unused=True)
                J += [
                    torch.zeros(q.numel()).double() if d is None else d.to_dense().flatten()
                    for q, d in zip(parameters, grads, strict=True)
                ]
            outputs.append(output.detach())
    flat = torch.cat(J).view(n_samples(x), outputs[0].numel(), -1)
    return flat, torch.cat(outputs)


def information_of_loss(J: Tensor, outputs: Tensor, expected_loss: Callable[..., Tensor]) -> Tensor:
    """J^T H J, (n, P, P), with H the second derivative of an expected loss by a sample's outputs.

    `expected_loss(f, f0)` is the loss of outputs f in the mean over labels of the distribution
    that the outputs f0 stand for; both are one sample's, (1, ...).
    """
    found = []
    for j, f0 in zip(J, outputs, strict=True):
        f0 = f0[None]

        def loss(f: Tensor, f0: Tensor = f0) -> Tensor:
            return expected_loss(f.view_as(f0), f0)

        H = torch.autograd.functional.hessian(loss, f0.flatten())
        found.append(j.T @ H @ j)
    return torch.stack(found)
