"""How often the host waits for a device, and how much the device is asked to do, without a device.

It is counted on a pretended one, so it runs in seconds and says nothing about time. Run from the
root of the repository::

    python -m benchmarks.speed.waits
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import harness
from benchmarks.common.pretended import Pretended, moved, on_host, pretending
from skfishermask import ParameterMask, fisher_diagonal, fisher_embedding, select_batch

# Samples in a batch of the network, and batches after the first one.
N_SAMPLES, N_BATCHES = 16, 3


class Encoder(nn.Module):
    """A small Transformer over tokens."""

    def __init__(self, n_tokens: int = 30, width: int = 16, n_classes: int = 4) -> None:
        super().__init__()
        self.table = nn.Embedding(n_tokens, width)
        layer = nn.TransformerEncoderLayer(width, 2, 2 * width, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.output = nn.Linear(width, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.layers(self.table(x)).mean(1))


def conv_net(n_classes: int = 5) -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, n_classes)),
    )


def selection(n: int, r: int, k: int, n_picks: int) -> dict[str, Any]:
    """Count what a pick costs, and what the start does."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.rand(n, 1, 1, generator=generator) / torch.arange(1, k + 1)
    V = sizes * torch.randn(n, r, k, generator=generator)
    fisher = torch.einsum("nrk,nrl->kl", V, V).double() / n
    with pretending() as start:
        select_batch(Pretended(V), 1, Pretended(fisher))
    with pretending() as all_picks:
        positions, _ = select_batch(Pretended(V), n_picks, Pretended(fisher))
    return {
        "sizes": {"N": n, "r": r, "k": k, "K": n_picks},
        "same_picks": torch.equal(on_host(positions), select_batch(V, n_picks, fisher)[0]),
        "waits": all_picks.waits.total(),
        "picks a wait": n_picks / all_picks.waits.total(),
        "operations a pick": (all_picks.operations - start.operations).total() / (n_picks - 1),
        "lines that wait": dict(all_picks.lines.most_common()),
    }


def network(module: nn.Module, x: Tensor, **options: Any) -> dict[str, Any]:
    """Count what batches of a network cost, the first one and those that follow."""
    module.eval()
    batches = x.split(N_SAMPLES)
    diagonal = fisher_diagonal(module, batches)
    mask = ParameterMask.from_diagonal(diagonal, "global", 100, output_layer=[])
    embedding = fisher_embedding(module, batches, mask)
    with pretending():
        there = moved(module)
    works: dict[str, Callable[[Sequence[Tensor]], Any]] = {
        "diagonal": lambda some: fisher_diagonal(there, some),
        "embedding": lambda some: fisher_embedding(there, some, mask),
    }
    found: dict[str, Any] = {}
    for name, work in works.items():
        with pretending() as first:
            work(batches[:1])
        with pretending() as whole:
            result = work(batches)
        same = (
            torch.allclose(on_host(result), embedding, atol=1e-5)
            if name == "embedding"
            else all(torch.allclose(on_host(result[p]), diagonal[p]) for p in diagonal)
        )
        found[name] = {
            "same": same,
            "waits of the first batch": first.waits.total(),
            "waits a batch": (whole.waits - first.waits).total() / N_BATCHES,
            "operations of the first batch": first.operations.total(),
            "operations a batch": (whole.operations - first.operations).total() / N_BATCHES,
            "lines that wait": dict((whole.lines - first.lines).most_common()),
        }
    return found


def at_most(what: str, found: float, limit: float) -> dict[str, Any]:
    return harness.target(what, found, f"at most {limit:g}", found <= limit)


def measure(given: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(0)
    n, n_picks = (200, 20) if given.quick else (2000, 100)
    picks = selection(n, 3, 60, n_picks)
    n_samples = N_SAMPLES * (1 + N_BATCHES)
    networks: Mapping[str, dict[str, Any]] = {
        "a small convolutional network": network(conv_net(), torch.randn(n_samples, 3, 8, 8)),
        "a small Transformer": network(Encoder(), torch.randint(30, (n_samples, 7))),
    }
    targets = [
        at_most(f"waits of {n_picks} picks of {n:,}", picks["waits"], n_picks / 4),
        at_most("operations a pick", picks["operations a pick"], 120),
    ]
    for name, works in networks.items():
        targets += [
            at_most(f"{name}: {work}, waits a batch after the first", each["waits a batch"], 3)
            for work, each in works.items()
        ]
    return {
        **harness.surroundings(given),
        "selection": picks,
        "networks": networks,
        "targets": targets,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    given = harness.options(__doc__ or "", "waits").parse_args(arguments)
    result = measure(given)
    for target in result["targets"]:
        print(f"{target['what']}: {target['found']:g} ({target['wanted']})")
    harness.write(given.out, "waits", result)


if __name__ == "__main__":
    main()
