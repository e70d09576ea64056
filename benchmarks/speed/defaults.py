"""What a query costs with default parameters: seconds, memory, and passes of prediction.

Run from the root of the repository::

    python -m benchmarks.speed.defaults

Each case is one query in a process of its own, so that its memory is its own, beside one
``predict_proba`` of the same pool: of several rounds the one of median seconds, and the most
memory.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from skorch import NeuralNetClassifier
from torch import nn

from benchmarks.common import harness
from benchmarks.common.memory import private, watching_memory
from benchmarks.common.networks import CifarResNet18
from skfishermask import FisherMaskSampler

N_LABELED = 500


def two_layers(n_inputs: int, n_classes: int) -> nn.Module:
    return nn.Sequential(
        *(nn.Linear(n_inputs, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU()),
        nn.Linear(64, n_classes),
    )


def images(shape: tuple[int, ...], n_classes: int) -> nn.Module:
    return CifarResNet18(n_classes=n_classes)


# Name in words: samples, shape of one, classes, picks, network, and whether from a memory map.
Case = tuple[int, tuple[int, ...], int, int, Callable[..., nn.Module], bool]
CASES: dict[str, Case] = {
    "10,000 x 20, MLP, 100 picks": (10_000, (20,), 10, 100, two_layers, False),
    "200,000 x 50, MLP, 500 picks": (200_000, (50,), 10, 500, two_layers, False),
    "1,000,000 x 50 from a memory map, MLP, 500 picks": (
        *(1_000_000, (50,), 10, 500),
        *(two_layers, True),
    ),
    "2,000 x 1,280, linear head, 20 picks": (2_000, (1280,), 10, 20, nn.Linear, False),
    "50,000 x 512, linear head of 1,000 classes, 100 picks": (
        *(50_000, (512,), 1000, 100),
        *(nn.Linear, False),
    ),
    "2,000 images of 32 x 32, ResNet-18, 100 picks": (
        *(2_000, (3, 32, 32), 10, 100),
        *(images, False),
    ),
}


def clusters(n: int, shape: tuple[int, ...], n_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw samples around a few centres for each class."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(3 * n_classes, int(np.prod(shape)))).astype("float32")
    kinds = rng.integers(len(centres), size=n)
    X = centres[kinds]
    for start in range(0, n, 10_000):
        part = X[start : start + 10_000]
        part += 2 * rng.standard_normal(part.shape, dtype="float32")
    return X.reshape(n, *shape), (kinds % n_classes).astype("int64")


def measure(case: Case, folder: str, device: str) -> dict[str, Any]:
    """Time one query and one prediction of the pool, in this process."""
    n, shape, n_classes, n_picks, make, is_mapped = case
    X, y = clusters(n + N_LABELED, shape, n_classes)
    torch.manual_seed(0)
    net = NeuralNetClassifier(
        make(shape if len(shape) > 1 else shape[0], n_classes),
        criterion=nn.CrossEntropyLoss,
        optimizer=torch.optim.Adam,
        lr=0.01,
        max_epochs=5,
        batch_size=256,
        train_split=None,
        device=device,
        verbose=0,
    ).fit(X[:N_LABELED], y[:N_LABELED])
    labeled, pool = X[:N_LABELED].copy(), X[N_LABELED:]
    if is_mapped:
        np.save(f"{folder}/pool.npy", pool)
        del X, pool
        pool = np.load(f"{folder}/pool.npy", mmap_mode="r")
    sampler = FisherMaskSampler(random_state=0)
    sampler(net, pool[: 4 * n_picks], 1, X_labeled=labeled)  # imports, and threads, once
    predicting = harness.seconds(lambda: net.predict_proba(pool), device)
    before, cpu = private(), time.process_time()
    with watching_memory() as seen:
        took = harness.seconds(lambda: sampler(net, pool, n_picks, X_labeled=labeled), device)
    info = sampler.query_info_
    return {
        "seconds": took,
        "cpu_seconds": time.process_time() - cpu,
        "predicting": predicting,
        "passes": took / predicting,
        "bytes": seen["peak_private_bytes"] - before,
        "n_candidates": info["n_candidates"],
        "coverage_share": info["coverage_share"],
        "steps": info["seconds"],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    given = harness.options(__doc__ or "", "defaults", repeats=3).parse_args(arguments)
    cases: dict[str, dict[str, Any]] = {}
    context = multiprocessing.get_context("spawn")
    for name, (n, shape, n_classes, n_picks, make, is_mapped) in CASES.items():
        if given.quick:
            n, n_classes, n_picks = 300, min(n_classes, 20), 3
        case = n, shape, n_classes, n_picks, make, is_mapped
        rounds = []
        for _ in range(given.repeats):
            with tempfile.TemporaryDirectory() as folder, context.Pool(1) as process:
                rounds.append(process.apply(measure, (case, folder, given.device)))
        rounds.sort(key=lambda one: one["seconds"])
        found = cases[name] = rounds[len(rounds) // 2] | {
            # A process that has freed memory before uses that again, and seems to need less.
            "bytes": max(one["bytes"] for one in rounds),
            "seconds of all rounds": [one["seconds"] for one in rounds],
        }
        print(
            f"{name}: {found['seconds']:.1f} s, {found['passes']:.1f} passes of prediction, "
            f"{found['bytes'] / 1e9:.2f} GB",
            flush=True,
        )
    harness.write(given.out, "defaults", harness.surroundings(given) | {"cases": cases})


if __name__ == "__main__":
    main()
