"""
Fashion-MNIST with a small convolutional network
================================================

A comparison of query strategies in full size: random choice, entropy, BAIT and FisherMask on
Fashion-MNIST, each from the same initial labels and the same initial weights, for several seeds. It
is not run when this documentation is built. It needs torchvision, which downloads the data (30 MB)
at the first start, and modAL for entropy sampling:

.. code-block:: sh

    python examples/fashion_mnist.py --data-dir data --output output/fashion_mnist

It runs on a GPU if there is one. Every training and every query is kept in the output folder as
soon as it ends. A run that was stopped goes on where it was when it is started again with the same
options. The folder gets ``results.json`` and ``curves.png`` at the end.

For a first try on a laptop:

.. code-block:: sh

    python examples/fashion_mnist.py --data-dir data --output output/try \\
        --seeds 2 --pool 2000 --test 1000 --queries 2 --epochs 10
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from modAL.uncertainty import entropy_sampling
from skorch import NeuralNetClassifier
from torch import nn
from torchvision.datasets import FashionMNIST

from skfishermask import (
    PUBLISHED,
    ActiveLearningCurveDisplay,
    FisherMaskSampler,
    active_learning_curve,
)


class SmallConvNet(nn.Module):
    """Two convolutions with pooling, a hidden and an output layer: 55,338 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(32 * 7 * 7, 32),
            nn.ReLU(),
        )
        self.output = nn.Linear(32, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        # Stored as bytes, which takes a quarter of the memory.
        return self.output(self.features(images.float() / 255))


def load(folder: Path) -> tuple[np.ndarray, np.ndarray, int]:
    """All images (70000, 1, 28, 28), their labels, and how many are training images."""
    parts = [FashionMNIST(folder, train=train, download=True) for train in (True, False)]
    X = torch.cat([part.data for part in parts]).unsqueeze(1).numpy()
    y = torch.cat([part.targets for part in parts]).numpy()
    return X, y, len(parts[0])


def make_splits(n_train: int, n: int, options: argparse.Namespace):
    """For each seed a pool drawn from the training images, and test images."""
    splits = []
    for seed in range(options.seeds):
        rng = np.random.default_rng(seed)
        pool = rng.choice(n_train, min(options.pool, n_train), replace=False)
        test = n_train + rng.choice(n - n_train, min(options.test, n - n_train), replace=False)
        splits.append((pool, test))
    return splits


def make_strategies(options: argparse.Namespace):
    bait = {"mask": "output_layer", "oversample": 2.0}
    common = {"batch_size": options.batch_size, "max_candidates": options.max_candidates}
    strategies = {
        "random": "random",
        "entropy": entropy_sampling,
        "BAIT": FisherMaskSampler(**PUBLISHED | bait | common),
        "FisherMask": FisherMaskSampler(**common),
    }
    return {name: strategies[name] for name in options.strategies}


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Active learning on Fashion-MNIST.")
    add = parser.add_argument
    add("--data-dir", type=Path, default=Path("data"), help="where the data are or go")
    add("--output", type=Path, default=Path("output/fashion_mnist"), help="folder for results")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--seeds", type=int, default=5, help="number of repeats (default: 5)")
    add("--pool", type=int, default=10_000, help="images in the pool (default: 10000)")
    add("--test", type=int, default=10_000, help="test images (default: 10000)")
    add("--initial", type=int, default=100, help="labels at first (default: 100)")
    add("--instances", type=int, default=100, help="labels a query (default: 100)")
    add("--queries", type=int, default=9, help="number of queries (default: 9)")
    add("--epochs", type=int, default=60, help="epochs of each training (default: 60)")
    add("--batch-size", type=int, default=256, help="images a pass in a query (default: 256)")
    add("--max-candidates", type=int, help="images looked at in a query (default: all)")
    names = ["random", "entropy", "BAIT", "FisherMask"]
    add("--strategies", nargs="+", choices=names, default=names)
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    X, y, n_train = load(options.data_dir)
    net = NeuralNetClassifier(
        SmallConvNet,
        criterion=nn.CrossEntropyLoss,
        optimizer=torch.optim.Adam,
        lr=0.001,
        max_epochs=options.epochs,
        batch_size=32,
        iterator_valid__batch_size=1000,
        train_split=None,
        verbose=0,
        device=options.device,
    )
    results = {}
    for name, strategy in make_strategies(options).items():
        print(name)
        results[name] = active_learning_curve(
            net,
            X,
            y,
            query_strategy=strategy,
            n_initial=options.initial,
            n_instances=options.instances,
            n_queries=options.queries,
            cv=make_splits(n_train, len(X), options),
            random_state=0,
            checkpoint=options.output / name,
            verbose=1,
        )

    n_labeled = next(iter(results.values()))["n_labeled"]
    print("\nMean test accuracy, and seconds of a query")
    print("labels    " + "".join(f"{n:>7}" for n in n_labeled) + "  seconds")
    for name, result in results.items():
        scores = "".join(f"{score:7.3f}" for score in result["test_score"].mean(axis=0))
        print(f"{name:<10}{scores}{result['query_time'].mean():9.1f}")

    as_lists = {
        name: {key: values.tolist() for key, values in result.items()}
        for name, result in results.items()
    }
    (options.output / "results.json").write_text(json.dumps(as_lists), encoding="utf-8")
    plt.rcParams["axes.prop_cycle"] = plt.cycler(color=["0.4", "#d55e00", "#009e73", "#0072b2"])
    display = ActiveLearningCurveDisplay.from_results(
        results, band="sem", score_label="Test accuracy"
    )
    display.ax_.set_title("Fashion-MNIST, small convolutional network")
    display.ax_.grid(alpha=0.3)
    display.figure_.savefig(options.output / "curves.png", dpi=150)
    print(f"\nIn {options.output}: results.json and curves.png")


if __name__ == "__main__":
    main()
