"""What the Fisher embedding and the diagonal cost, beside other ways to the same numbers.

Run from the root of the repository::

    python -m benchmarks.bench_embedding
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap
from tqdm.auto import tqdm

from benchmarks import harness
from benchmarks.harness import BATCH_SIZE
from skfishermask import ParameterMask, fisher_diagonal, fisher_embedding
from skfishermask.fisher.directions import directions

OUTPUT = ["linear.weight", "linear.bias"]
# Samples in a batch of the authors' loader, for CIFAR-10.
AUTHORS_BATCH = 100


def looped_gradients(
    module: nn.Module, batch: Tensor, n: int
) -> Iterator[tuple[float, list[np.ndarray]]]:
    """p_c and the gradients of log p_c, for each of the first n samples and each class.

    A backward pass for each, through the graph of the whole batch, copied to NumPy.
    """
    log_p = module(batch).log_softmax(1)
    parameters = list(module.parameters())
    for sample in log_p[:n]:
        for one in sample:
            gradients = torch.autograd.grad(one, parameters, retain_graph=True)
            yield float(one.detach().exp()), [g.numpy(force=True) for g in gradients]


def looped_embedding(
    module: nn.Module, batch: Tensor, kept: Sequence[np.ndarray], n: int
) -> np.ndarray:
    """Embedding (n, C, k), float64, of the first n samples, by a loop over samples and classes."""
    rows = [
        np.sqrt(p) * np.concatenate([g[keep] for g, keep in zip(gradients, kept, strict=True)])
        for p, gradients in looped_gradients(module, batch, n)
    ]
    return np.asarray(rows, dtype=np.float64).reshape(n, -1, len(rows[0]))


def looped_diagonal(module: nn.Module, batch: Tensor, n: int) -> list[np.ndarray]:
    """Mean diagonal over the first n samples, by the same loop."""
    totals = [np.zeros(p.shape) for p in module.parameters()]
    for p, gradients in looped_gradients(module, batch, n):
        for total, gradient in zip(totals, gradients, strict=True):
            total += p * gradient**2 / n
    return totals


def one_by_one(module: nn.Module, batch: Tensor, kept: Sequence[np.ndarray]) -> np.ndarray:
    """The same loop where each sample has a graph of its own: kinder than the authors' way."""
    return np.concatenate([looped_embedding(module, sample, kept, 1) for sample in batch.split(1)])


def kept_entries(module: nn.Module, mask: ParameterMask) -> list[np.ndarray]:
    """The mask as one boolean array for each parameter."""
    kept = []
    for name, parameter in module.named_parameters():
        keep = np.zeros(parameter.numel(), dtype=bool)
        if name in mask.indices:
            keep[mask.indices[name].numpy(force=True)] = True
        kept.append(keep.reshape(parameter.shape))
    return kept


def jacobian_embedding(module: nn.Module, batch: Tensor, mask: ParameterMask) -> Tensor:
    """Embedding from the whole Jacobian of every sample, by torch.func, then gathered."""
    parameters = {name: p.detach() for name, p in module.named_parameters()}

    def logits(given: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(module, given, (x[None],))[0]

    whole = vmap(jacrev(logits), (None, 0))(parameters, batch)
    gathered = [
        whole[name].flatten(2)[:, :, index.to(batch.device)] for name, index in mask.indices.items()
    ]
    with torch.no_grad():
        rows = directions(module(batch).double().softmax(1)).to(batch.dtype)
    return rows @ torch.cat(gathered, 2)


def ordinary_passes(module: nn.Module, batches: Sequence[Tensor]) -> None:
    """C backward passes of each summed batch: a gradient for each class, none for a sample."""
    parameters = list(module.parameters())
    for batch in batches:
        logits = module(batch)
        for c in range(logits.shape[1]):
            torch.autograd.grad(logits[:, c].sum(), parameters, retain_graph=True)


def make_mask(diagonal: dict[str, Tensor], size: float | int = 0.002) -> ParameterMask:
    return ParameterMask.from_diagonal(diagonal, "global", size, output_layer=OUTPUT)


def peers(
    given: argparse.Namespace, module: nn.Module, pool: Tensor, mask: ParameterMask
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Seconds a sample for every way, and the targets that follow."""
    n_ours, n_vmap, n_single, n_authors = (
        (8, 2, 2, 1) if given.quick else (4 * BATCH_SIZE, 16, 8, 2)
    )
    batches = pool[:n_ours].split(BATCH_SIZE)
    authors = pool[: 8 if given.quick else AUTHORS_BATCH]
    kept = kept_entries(module, mask)
    ways = {
        "embedding": (n_ours, lambda: fisher_embedding(module, batches, mask)),
        "diagonal": (n_ours, lambda: fisher_diagonal(module, batches)),
        "ordinary passes": (n_ours, lambda: ordinary_passes(module, batches)),
        "vmap(jacrev)": (n_vmap, lambda: jacobian_embedding(module, pool[:n_vmap], mask)),
        "loop, own graph": (n_single, lambda: one_by_one(module, pool[:n_single], kept)),
        "loop, authors": (
            n_authors,
            lambda: looped_embedding(module, authors, kept, n_authors),
        ),
        "diagonal loop, authors": (n_authors, lambda: looped_diagonal(module, authors, n_authors)),
    }
    times = harness.alternate(
        {name: work for name, (_, work) in ways.items()}, given.repeats, given.device, "peers"
    )
    a_sample = {name: harness.scaled(times[name], 1 / n) for name, (n, _) in ways.items()}
    return {
        "seconds a sample": {name: harness.spread(values) for name, values in a_sample.items()},
        "samples measured": {name: n for name, (n, _) in ways.items()},
        "ratio to the embedding": {
            name: harness.ratio(values, a_sample["embedding"]) for name, values in a_sample.items()
        },
        "graph of the authors' loop": len(authors),
    }, [
        harness.at_most(
            f"{name} over C ordinary backward passes",
            harness.ratio(a_sample[name], a_sample["ordinary passes"]),
            limit,
        )
        for name, limit in (("embedding", 0.8), ("diagonal", 1.5))
    ]


def over_samples(
    given: argparse.Namespace, module: nn.Module, pool: Tensor, mask: ParameterMask
) -> dict[str, Any]:
    sizes = (4, 8) if given.quick else (64, 128, 256, 512)
    works = {
        f"N = {n}": (lambda n=n: fisher_embedding(module, pool[:n].split(BATCH_SIZE), mask))
        for n in sizes
    }
    times = harness.alternate(works, given.repeats, given.device, "embedding over N")
    return harness.sweep(
        "embedding",
        "N",
        sizes,
        {"embedding": [*times.values()]},
        {"k": len(mask), "C": 10},
    )


def over_mask(
    given: argparse.Namespace, module: nn.Module, pool: Tensor, diagonal: dict[str, Tensor]
) -> dict[str, Any]:
    n = 8 if given.quick else BATCH_SIZE
    sizes = (1300, 1400) if given.quick else (1500, 3000, 6000, 12000, 24000)
    masks = {f"k = {k}": make_mask(diagonal, k) for k in sizes}
    works = {
        name: (lambda mask=mask: fisher_embedding(module, [pool[:n]], mask))
        for name, mask in masks.items()
    }
    times = harness.alternate(works, given.repeats, given.device, "embedding over k")
    return harness.sweep(
        "embedding",
        "k",
        sizes,
        {"embedding": [*times.values()]},
        {"N": n, "C": 10},
        "the backward passes are the same for any mask; only the entries read grow with k",
    )


def over_classes(given: argparse.Namespace) -> dict[str, Any]:
    sizes = (3, 5) if given.quick else (5, 10, 20, 40)
    n = 8 if given.quick else BATCH_SIZE
    works = {}
    for n_classes in tqdm(sizes, desc="networks of C classes"):
        case = harness.ImageCase.make(given, n, n_classes)
        x, module = torch.as_tensor(case.pool, device=given.device), case.net.module_
        mask = make_mask(fisher_diagonal(module, [x], n_directions=1), 0.02)
        works[f"embedding, C = {n_classes}"] = lambda module=module, x=x, mask=mask: (
            fisher_embedding(module, [x], mask)
        )
        works[f"passes, C = {n_classes}"] = lambda module=module, x=x: ordinary_passes(module, [x])
    times = [*harness.alternate(works, given.repeats, given.device, "embedding over C").values()]
    return harness.sweep(
        "embedding",
        "C",
        sizes,
        {"embedding": times[::2], "C ordinary backward passes": times[1::2]},
        {"N": n, "mask_fraction": 0.02},
    )


def measure(given: argparse.Namespace) -> dict[str, Any]:
    n = 16 if given.quick else 512
    case = harness.ImageCase.make(given, n, 10)
    module, pool = case.net.module_, torch.as_tensor(case.pool, device=given.device)
    diagonal = fisher_diagonal(module, pool[:256].split(BATCH_SIZE))
    mask = make_mask(diagonal)
    beside, targets = peers(given, module, pool, mask)
    return {
        **harness.surroundings(given),
        "sizes": case.facts | {"k": len(mask), "batch": BATCH_SIZE},
        "peers": beside,
        "targets": targets,
        "sweeps": [
            over_samples(given, module, pool, mask),
            over_mask(given, module, pool, diagonal),
            over_classes(given),
        ],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    given = harness.options(__doc__ or "", "embedding", repeats=5).parse_args(arguments)
    harness.write(given.out, "embedding", measure(given))


if __name__ == "__main__":
    main()
