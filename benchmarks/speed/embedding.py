"""What the Fisher embedding and the diagonal cost, beside other ways to the same numbers.

Run from the root of the repository::

    python -m benchmarks.speed.embedding
    python -m benchmarks.speed.embedding --networks   # networks of the field, a quarter of an hour
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap
from tqdm.auto import tqdm

from benchmarks.common import harness
from benchmarks.common.harness import BATCH_SIZE
from benchmarks.common.networks import CifarResNet18, MaskedText, Recurrent, SequenceEncoder
from benchmarks.speed.hooks import HookedGradients
from skfishermask import ParameterMask, fisher_diagonal, fisher_embedding
from skfishermask.fisher.likelihood import categorical_factor
from skfishermask.jacobian import output_layer

OUTPUT = ["linear.weight", "linear.bias"]
# Samples in a batch of the authors' loader, for CIFAR-10.
AUTHORS_BATCH = 100
# Batches in a round of the table by network.
N_BATCHES = 8
# Numbers in the whole Jacobians of a batch that vmap(jacrev) is given, and in the whole gradients
# of one direction that hooks are: 512 MB.
JACOBIAN_NUMBERS = 1 << 27

# Masks that reach every layer.
OTHER_MASKS = {"per_layer": "embedding, per layer", "random": "embedding, random"}
ALONE = "embedding, one batch"
FUSED = "ordinary passes, fused"

# What a module's forward takes: a tensor or keyword arguments.
Batch = Tensor | dict[str, Tensor]


def called(module: nn.Module, batch: Batch) -> Tensor:
    return module(batch) if isinstance(batch, Tensor) else module(**batch)


def first_samples(batch: Batch, n: int) -> Batch:
    if isinstance(batch, Tensor):
        return batch[:n]
    return {name: values[:n] for name, values in batch.items()}


def looped_gradients(
    module: nn.Module, batch: Tensor, n: int
) -> Iterator[tuple[float, list[np.ndarray]]]:
    """Return p_c and the gradients of log p_c, for each of the first n samples and each class.

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
    """Compute the embedding (n, C, k) of n samples in float64, by sample and class."""
    rows = [
        np.sqrt(p) * np.concatenate([g[keep] for g, keep in zip(gradients, kept, strict=True)])
        for p, gradients in looped_gradients(module, batch, n)
    ]
    return np.asarray(rows, dtype=np.float64).reshape(n, -1, len(rows[0]))


def looped_diagonal(module: nn.Module, batch: Tensor, n: int) -> list[np.ndarray]:
    """Compute the mean diagonal over the first n samples by the same loop."""
    totals = [np.zeros(p.shape) for p in module.parameters()]
    for p, gradients in looped_gradients(module, batch, n):
        for total, gradient in zip(totals, gradients, strict=True):
            total += p * gradient**2 / n
    return totals


def one_by_one(module: nn.Module, batch: Tensor, kept: Sequence[np.ndarray]) -> np.ndarray:
    """Run the same loop with a graph for each sample: kinder than the authors' way."""
    return np.concatenate([looped_embedding(module, sample, kept, 1) for sample in batch.split(1)])


def kept_entries(module: nn.Module, mask: ParameterMask) -> list[np.ndarray]:
    """Return the mask as one boolean array for each parameter."""
    kept = []
    for name, parameter in module.named_parameters():
        keep = np.zeros(parameter.numel(), dtype=bool)
        if name in mask.indices:
            keep[mask.indices[name].numpy(force=True)] = True
        kept.append(keep.reshape(parameter.shape))
    return kept


def jacobian_embedding(module: nn.Module, batch: Batch, mask: ParameterMask) -> Tensor:
    """Compute whole Jacobians of every sample by torch.func, then gather the embedding."""
    parameters = {name: p.detach() for name, p in module.named_parameters()}

    def logits(given: dict[str, Tensor], sample: Batch) -> Tensor:
        if isinstance(sample, Tensor):
            return functional_call(module, given, (sample[None],))[0]
        alone = {name: values[None] for name, values in sample.items()}
        return functional_call(module, given, (), alone)[0]

    whole = vmap(jacrev(logits), (None, 0))(parameters, batch)
    gathered = [
        whole[name].flatten(2)[:, :, index.to(whole[name].device)]
        for name, index in mask.indices.items()
    ]
    joined = torch.cat(gathered, 2)
    with torch.no_grad():
        rows = categorical_factor(called(module, batch).double().softmax(1)).to(joined.dtype)
    return rows @ joined


def hooked_embedding(module: nn.Module, batch: Batch, mask: ParameterMask) -> Tensor:
    """Compute whole gradients of every sample by hooks, then gather the embedding."""
    hooked = HookedGradients(module)
    logits = hooked.forward(lambda: called(module, batch))
    rows = categorical_factor(logits.detach().double().softmax(1)).to(logits.dtype)
    embedding = []
    for i in range(rows.shape[1]):
        whole = hooked.backward(logits, rows[:, i])
        gathered = [whole[name].flatten(1)[:, index] for name, index in mask.indices.items()]
        embedding.append(torch.cat(gathered, 1))
    return torch.stack(embedding, 1)


def ordinary_passes(module: nn.Module, batches: Sequence[Batch]) -> None:
    """Run C backward passes of each summed batch: a gradient for each class, none a sample."""
    parameters = list(module.parameters())
    for batch in batches:
        logits = called(module, batch)
        for c in range(logits.shape[1]):
            torch.autograd.grad(logits[:, c].sum(), parameters, retain_graph=True)


def unfused_passes(module: nn.Module, batches: Sequence[Batch]) -> None:
    """Run the same without oneDNN."""
    with torch.backends.mkldnn.flags(enabled=False):
        ordinary_passes(module, batches)


def make_mask(diagonal: dict[str, Tensor], size: float | int = 0.002) -> ParameterMask:
    return ParameterMask.from_diagonal(diagonal, "global", size, output_layer=OUTPUT)


def peers(
    given: argparse.Namespace, module: nn.Module, pool: Tensor, mask: ParameterMask
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Measure seconds a sample for every way, and check the targets."""
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


def network_cases(quick: bool) -> dict[str, tuple[nn.Module, Batch, tuple[float, float]]]:
    """Return untrained networks, a batch, and the wanted ratios to C ordinary passes.

    The second ratio is that of masks that reach every layer.
    """
    n, n_classes, width, length = (2, 3, 16, 5) if quick else (32, 10, 64, 20)
    small, large = (8, 32) if quick else (32, 64)
    torch.manual_seed(0)
    tokens = torch.randint(1, 1000, (n, length))
    mask = torch.arange(length) < torch.randint(length // 2, length + 1, (n, 1))
    sequences = torch.randn(n, length, width)
    vision = torchvision.models.VisionTransformer(
        32, 4, 4, 4, width, 2 * width, num_classes=n_classes
    )
    # It starts at zero, which leaves nothing to read below.
    nn.init.normal_(vision.heads.head.weight, std=0.1)

    def encoder(batch_first: bool) -> nn.Module:
        return SequenceEncoder(width, 4, n_classes, batch_first)

    return {
        "ResNet-18 for CIFAR": (
            CifarResNet18(n_classes=n_classes),
            torch.randn(n, 3, small, small),
            (0.6, 0.8),
        ),
        "torchvision's ResNet-18, 64 pixels": (
            torchvision.models.resnet18(num_classes=n_classes),
            torch.randn(n, 3, large, large),
            (0.6, 0.8),
        ),
        "vision transformer": (vision, torch.randn(n, 3, 32, 32), (1.4, 1.4)),
        "encoder, samples first": (encoder(True), sequences, (1.4, 1.4)),
        "encoder, positions first": (encoder(False), sequences, (1.4, 1.4)),
        "text with padding, as BERT": (
            MaskedText(1000, length, width, 4, 4, n_classes),
            {"tokens": tokens * mask, "mask": mask},
            (1.4, 1.4),
        ),
        "GRU": (Recurrent("GRU", 1000, width, n_classes), tokens, (2, 2)),
        "LSTM": (Recurrent("LSTM", 1000, width, n_classes), tokens, (2, 2)),
    }


def vectorises(module: nn.Module, batch: Batch, mask: ParameterMask) -> bool:
    """Check whether vmap(jacrev) knows every operation of a network."""
    try:
        jacobian_embedding(module, first_samples(batch, 1), mask)
    except (RuntimeError, NotImplementedError):
        return False
    return True


def hooks_read(module: nn.Module, batch: Batch, mask: ParameterMask) -> bool:
    """Check whether hooks know every layer of a network, and find the same embedding."""
    part = first_samples(batch, 2)
    try:
        hooked = hooked_embedding(module, part, mask)
    except (NotImplementedError, RuntimeError):
        return False
    expected = fisher_embedding(module, [part], mask, dtype=hooked.dtype)
    return torch.allclose(hooked, expected, rtol=1e-3, atol=1e-5)


def ways(
    given: argparse.Namespace, module: nn.Module, batch: Any, masks: dict[str, ParameterMask]
) -> tuple[dict[str, harness.Work], dict[str, int]]:
    """Return the ways to the embedding that work for a network, and the samples each reads."""
    mask = masks["global"]
    n, n_classes = called(module, batch).shape
    n_parameters = sum(p.numel() for p in module.parameters())
    # As in a query: what is found out about a kind of graph is found out once.
    batches = [batch] * (2 if given.quick else N_BATCHES)
    works: dict[str, harness.Work] = {
        "embedding": lambda: fisher_embedding(module, batches, mask),
        "diagonal": lambda: fisher_diagonal(module, batches),
        "ordinary passes": lambda: ordinary_passes(module, batches),
    }
    for strategy, way in OTHER_MASKS.items():
        works[way] = lambda other=masks[strategy]: fisher_embedding(module, batches, other)
    if any(isinstance(part, nn.LSTM) for part in module.modules()):
        # oneDNN fuses an LSTM's steps, and its gradients at single steps cannot be read.
        works[FUSED] = works["ordinary passes"]
        works["ordinary passes"] = lambda: unfused_passes(module, batches)
    n_read = dict.fromkeys(works, n * len(batches))
    works[ALONE], n_read[ALONE] = lambda: fisher_embedding(module, [batch], mask), n
    if hooks_read(module, batch, mask):
        n_read["hooks on layers"] = min(n, max(1, JACOBIAN_NUMBERS // n_parameters))
        hooked = first_samples(batch, n_read["hooks on layers"])
        works["hooks on layers"] = lambda: hooked_embedding(module, hooked, mask)
    if vectorises(module, batch, mask):
        n_read["vmap(jacrev)"] = min(n, max(1, JACOBIAN_NUMBERS // (n_classes * n_parameters)))
        part = first_samples(batch, n_read["vmap(jacrev)"])
        works["vmap(jacrev)"] = lambda: jacobian_embedding(module, part, mask)
    return works, n_read


def over_networks(given: argparse.Namespace) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Measure ratios to C ordinary backward passes for networks, and check the targets."""
    found, targets = {}, []
    for name, (module, batch, (limit, limit_everywhere)) in network_cases(given.quick).items():
        module = module.to(given.device).eval()
        batch = (
            batch.to(given.device)
            if isinstance(batch, Tensor)
            else {key: values.to(given.device) for key, values in batch.items()}
        )
        n, n_classes = called(module, batch).shape
        diagonal = fisher_diagonal(module, [batch], n_directions=1)
        masks = {
            strategy: ParameterMask.from_diagonal(
                diagonal,
                strategy,
                200 if given.quick else 2000,
                output_layer=output_layer(module, first_samples(batch, 1)),
                random_state=0,
            )
            for strategy in ("global", *OTHER_MASKS)
        }
        with warnings.catch_warnings():
            # vmap says so where it loops over the samples: it is measured all the same.
            warnings.filterwarnings("ignore", message="There is a performance drop")
            works, n_read = ways(given, module, batch, masks)
            times = harness.alternate(works, given.repeats, given.device, name)
        times = {way: harness.scaled(values, n / n_read[way]) for way, values in times.items()}
        ratios = {
            way: harness.ratio(values, times["ordinary passes"]) for way, values in times.items()
        }
        found[name] = {
            "sizes": {
                "n_parameters": sum(p.numel() for p in module.parameters()),
                "C": n_classes,
                "batch": n,
                "batches": n_read["embedding"] // n,
                "k": len(masks["global"]),
            },
            "seconds a batch": {way: harness.spread(values) for way, values in times.items()},
            "ratio to C ordinary passes": ratios,
        }
        # Those that a user has: of an LSTM the fused ones.
        usual = times.get(FUSED, times["ordinary passes"])
        limits = {"embedding": limit} | dict.fromkeys(OTHER_MASKS.values(), limit_everywhere)
        for way, most in (limits | {ALONE: 3}).items():
            what = f"{name}: {way} over C ordinary backward passes"
            targets.append(harness.at_most(what, harness.ratio(times[way], usual), most))
        if "ResNet" in name:
            beside, of, most = ratios["diagonal"], "C ordinary backward passes", 1.5
        else:
            beside, of, most = harness.ratio(times["diagonal"], times["embedding"]), "embedding", 2
        targets.append(harness.at_most(f"{name}: diagonal over {of}", beside, most))
    return found, targets


def measure(given: argparse.Namespace) -> dict[str, Any]:
    n = 16 if given.quick else 512
    case = harness.ImageCase.make(given, n, 10)
    module, pool = case.net.module_, torch.as_tensor(case.pool, device=given.device)
    diagonal = fisher_diagonal(module, pool[:256].split(BATCH_SIZE))
    mask = make_mask(diagonal)
    beside, targets = peers(given, module, pool, mask)
    return {
        **harness.surroundings(given),
        "sizes": case.sizes | {"k": len(mask), "batch": BATCH_SIZE},
        "peers": beside,
        "targets": targets,
        "sweeps": [
            over_samples(given, module, pool, mask),
            over_mask(given, module, pool, diagonal),
            over_classes(given),
        ],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = harness.options(__doc__ or "", "embedding", repeats=5)
    parser.add_argument(
        "--networks", action="store_true", help="networks of the field instead (networks.json)"
    )
    given = parser.parse_args(arguments)
    if given.networks:
        found, targets = over_networks(given)
        result = {**harness.surroundings(given), "networks": found, "targets": targets}
        harness.write(given.out, "networks", result)
    else:
        harness.write(given.out, "embedding", measure(given))


if __name__ == "__main__":
    main()
