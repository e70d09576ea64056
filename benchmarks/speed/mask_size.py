"""What the number of masked parameters costs, and what it changes in the choice and in accuracy.

The limit of ``mask_fraction="auto"`` was chosen by it. Run from the root of the repository::

    python -m benchmarks.speed.mask_size
    python -m benchmarks.speed.mask_size --images cifar10.npz   # as the study takes files
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from skorch import NeuralNetClassifier
from torch import Tensor, nn
from tqdm.auto import tqdm

from benchmarks.common import harness
from benchmarks.common.memory import private, watching_memory
from benchmarks.common.networks import make_net
from benchmarks.study.run import load as load_data
from benchmarks.study.run import make_split
from benchmarks.study.strategies import fisher
from skfishermask import PUBLISHED, FisherMaskSampler, active_learning_curve, fisher_embedding

SIZES = [1000, 2000, 4000, 6000, 10_000]
N_POOL, N_LABELED, K = 1200, 100, 50
# Of the 4,890 parameters of the digits' CNN: "auto", and more.
DIGITS_SIZES = [660, 1000, 2000, 3000]


class VisionTransformer(torchvision.models.VisionTransformer):
    """4.8 million parameters, for images of 32 x 32 pixels."""

    def __init__(self, n_classes: int) -> None:
        super().__init__(32, 16, 6, 8, 256, 1024, num_classes=n_classes)
        # It starts at zero, which leaves nothing to learn below in a short training.
        nn.init.normal_(self.heads.head.weight, std=0.02)


class ResNet18(nn.Module):
    """torchvision's, with 11.2 million parameters."""

    def __init__(self, n_classes: int) -> None:
        super().__init__()
        self.network = torchvision.models.resnet18(num_classes=n_classes)

    def forward(self, X: Tensor) -> Tensor:
        return self.network(X)


NETWORKS = {"torchvision's ResNet-18": ResNet18, "vision transformer": VisionTransformer}


def load(given: argparse.Namespace) -> tuple[np.ndarray, np.ndarray, str]:
    """Return images of 32 x 32 pixels."""
    n = 60 if given.quick else N_POOL + N_LABELED
    if given.images is None:
        return *harness.noisy_images(n, 10, 32), "synthetic images"
    X, y, _ = load_data(str(given.images), given.images.parent, download=False)
    rows = np.random.default_rng(0).permutation(len(X))[:n]
    return X[rows], y[rows], given.images.stem


def reduction(V: Tensor, V_labeled: Tensor, positions: Sequence[int]) -> float:
    """Compute the decrease of tr(M^-1 F) by a batch, in float64, without a (k, k) matrix.

    With M = I + W^T W, tr(M^-1 F) = tr(F) - tr((I + W W^T)^-1 W F W^T).
    """
    n, n_labeled, n_batch = len(V), len(V_labeled), len(positions)
    everything = torch.cat([V, V_labeled]).flatten(0, 1).double()
    # n_L / (n_L + K) F_L and K / (n_L + K) V^T V, where F_L is a mean.
    labeled = V_labeled.flatten(0, 1).double() / (n_labeled + n_batch) ** 0.5
    scale = (n_batch / (n_labeled + n_batch)) ** 0.5
    batch = scale * V[list(positions)].flatten(0, 1).double()

    def covered(rows: Tensor) -> float:
        seen = rows @ everything.T
        gram = torch.eye(len(rows), dtype=rows.dtype) + rows @ rows.T
        return float(torch.linalg.solve(gram, seen).mul(seen).sum()) / (n + n_labeled)

    return covered(torch.cat([labeled, batch])) - covered(labeled)


def untrained(given: argparse.Namespace, name: str) -> NeuralNetClassifier:
    return NeuralNetClassifier(
        NETWORKS[name],
        module__n_classes=10,
        criterion=nn.CrossEntropyLoss,
        optimizer=torch.optim.Adam,
        lr=0.001,
        max_epochs=1 if given.quick else 8,
        train_split=None,
        batch_size=64,
        device=given.device,
        verbose=0,
    )


def one_network(
    given: argparse.Namespace, name: str, X: np.ndarray, y: np.ndarray, sizes: Sequence[int]
) -> dict[str, Any]:
    """Measure queries of one network, with masks of all sizes."""
    torch.manual_seed(0)
    net = untrained(given, name)
    n_labeled, n_batch = (20, 3) if given.quick else (N_LABELED, K)
    labeled, pool = X[:n_labeled], X[n_labeled:]
    net.fit(labeled, y[:n_labeled])
    found: dict[int, dict[str, Any]] = {}
    batches: dict[int, list[int]] = {}
    for size in tqdm(sizes, desc=name):
        sampler = FisherMaskSampler(
            mask_fraction=size,
            **PUBLISHED | {"n_mask_samples": 8 if given.quick else 256},
            batch_size=harness.BATCH_SIZE,
            random_state=0,
        )
        before = private()
        with watching_memory() as seen:
            indices, _ = sampler(net, pool, n_batch, X_labeled=labeled)
        batches[size] = indices.tolist()
        found[size] = {
            "seconds": sampler.query_info_["seconds"],
            "dimensions": sampler.query_info_["dimensions"],
            "bytes": seen["peak_private_bytes"] - before,
        }
    # All are judged by the last and largest mask, which holds the others.
    module = net.module_.eval()
    V, V_labeled = (
        fisher_embedding(
            module,
            torch.as_tensor(part, device=given.device).split(harness.BATCH_SIZE),
            sampler.mask_,
        ).cpu()
        for part in (pool, labeled)
    )
    batches[0] = np.random.default_rng(0).permutation(len(pool))[:n_batch].tolist()
    gains = {size: reduction(V, V_labeled, batch) for size, batch in batches.items()}
    for size, case in found.items():
        case["common"] = len(set(batches[size]) & set(batches[sizes[-1]])) / n_batch
        case["gain"] = gains[size] / gains[sizes[-1]]
    return {
        "n_parameters": sum(p.numel() for p in module.parameters()),
        "N": len(pool),
        "n_labeled": n_labeled,
        "K": n_batch,
        "r": V.shape[1],
        "mean_confidence": harness.confidence(net, pool[:256]),
        "sizes": {str(size): case for size, case in found.items()},
        "random batch": {
            "common": len(set(batches[0]) & set(batches[sizes[-1]])) / n_batch,
            "gain": gains[0] / gains[sizes[-1]],
        },
    }


def accuracy(given: argparse.Namespace) -> dict[str, Any]:
    """Compute mean accuracy over learning curves on digits, and differences to "auto"."""
    X, y, n_train = load_data("digits", Path(), download=False)
    n_pool, n_seeds, n_queries = (200, 1, 1) if given.quick else (1000, 4, 5)
    sizes = DIGITS_SIZES[::3] if given.quick else DIGITS_SIZES
    found: dict[str, Mapping[str, Any]] = {}
    for imbalance in (1, 50):
        splits = [
            make_split(y, n_train, seed, n_pool, 500, imbalance)
            for seed in range(100, 100 + n_seeds)
        ]
        net = make_net("cnn", X.shape[1:], 10, given.device)
        means = {}
        for size in tqdm(sizes, desc=f"digits, {imbalance} to 1"):
            result = active_learning_curve(
                net,
                X,
                y,
                query_strategy=fisher(mask_fraction=size, random_state=0),
                n_initial=20,
                n_instances=20,
                n_queries=n_queries,
                cv=splits,
                random_state=0,
            )
            means[size] = result["test_score"].mean(axis=1)
        off = {size: mean - means[sizes[0]] for size, mean in means.items()}
        found["balanced" if imbalance == 1 else f"{imbalance}:1"] = {
            str(size): {
                "accuracy": float(mean.mean()),
                "difference": float(off[size].mean()),
                "standard_error": float(off[size].std(ddof=1) / n_seeds**0.5) if n_seeds > 1 else 0,
            }
            for size, mean in means.items()
        }
    return {"n_seeds": n_seeds, "settings": found}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = harness.options(__doc__ or "", "mask_size")
    parser.add_argument("--images", type=Path, help="file .npz with X_train, y_train, ...")
    given = parser.parse_args(arguments)
    X, y, data = load(given)
    sizes = [200, 400] if given.quick else SIZES
    result = {
        **harness.surroundings(given),
        "data": data,
        "networks": {name: one_network(given, name, X, y, sizes) for name in NETWORKS},
        "digits": accuracy(given),
    }
    harness.write(given.out, "mask_size", result)


if __name__ == "__main__":
    main()
