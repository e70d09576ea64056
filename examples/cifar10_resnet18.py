"""
CIFAR-10 with ResNet-18 on a GPU
================================

Query strategies on CIFAR-10 with the network that the image literature uses: ResNet-18 with a first
layer for small images, trained with random crops and flips. It is not run when this documentation
is built, and is meant for a CUDA device. It needs torchvision, which downloads the data (170 MB) at
the first start, and modAL for entropy sampling:

.. code-block:: sh

    python examples/cifar10_resnet18.py --data-dir data --output output/cifar10

With ``--width 16`` the network has 0.7 million parameters instead of 11 million, about as many as
that of the FisherMask authors. Every training and every query is kept in the output folder as soon
as it ends. A run that was stopped goes on where it was when it is started again with the same
options. The folder gets ``results.json`` and ``curves.png`` at the end.

Crops and flips are part of the network here, in training mode only. A query reads the network in
evaluation mode, so it sees every image as it is.
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
from skorch.callbacks import LRScheduler
from torch import nn
from torchvision.datasets import CIFAR10

from skfishermask import (
    PUBLISHED,
    ActiveLearningCurveDisplay,
    FisherMaskSampler,
    active_learning_curve,
)

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


class BasicBlock(nn.Module):
    """Two convolutions and a shortcut around them."""

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(n_out)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(n_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or n_in != n_out:
            convolution = nn.Conv2d(n_in, n_out, 1, stride, bias=False)
            self.shortcut = nn.Sequential(convolution, nn.BatchNorm2d(n_out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(h)) + self.shortcut(x))


class ResNet18(nn.Module):
    """ResNet-18 for images of 32 by 32: 3 x 3 first convolution, no pooling after it.

    Takes images as bytes (n, 3, 32, 32), which need a quarter of the memory.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1))
        self.conv = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        blocks, n_in = [], width
        for stage in range(4):
            n_out = width * 2**stage
            blocks.append(BasicBlock(n_in, n_out, stride=1 if stage == 0 else 2))
            blocks.append(BasicBlock(n_out, n_out, stride=1))
            n_in = n_out
        self.blocks = nn.Sequential(*blocks)
        self.output = nn.Linear(n_in, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.training:
            images = crop_and_flip(images)
        h = (images.float() / 255 - self.mean) / self.std
        h = torch.relu(self.bn(self.conv(h)))
        return self.output(self.blocks(h).mean(dim=(2, 3)))


def crop_and_flip(images: torch.Tensor, margin: int = 4) -> torch.Tensor:
    """Move each image by up to `margin` pixels, and mirror half of them."""
    n, _, height, width = images.shape
    padded = nn.functional.pad(images, (margin,) * 4)
    every = torch.arange(n, device=images.device)[:, None, None]
    top, left = torch.randint(2 * margin + 1, (2, n, 1, 1), device=images.device)
    rows = top + torch.arange(height, device=images.device)[:, None]
    columns = left + torch.arange(width, device=images.device)
    moved = padded[every, :, rows, columns].permute(0, 3, 1, 2)
    mirrored = torch.rand(n, 1, 1, 1, device=images.device) < 0.5
    return torch.where(mirrored, moved.flip(3), moved)


def load(folder: Path) -> tuple[np.ndarray, np.ndarray, int]:
    """All images (60000, 3, 32, 32), their labels, and how many are training images."""
    parts = [CIFAR10(folder, train=train, download=True) for train in (True, False)]
    X = np.concatenate([part.data for part in parts]).transpose(0, 3, 1, 2)
    y = np.concatenate([part.targets for part in parts])
    return np.ascontiguousarray(X), y, len(parts[0].data)


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
        "FisherMask": FisherMaskSampler(mask_fraction=options.mask_size or "auto", **common),
    }
    return {name: strategies[name] for name in options.strategies}


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Active learning on CIFAR-10 with ResNet-18.")
    add = parser.add_argument
    add("--data-dir", type=Path, default=Path("data"), help="where the data are or go")
    add("--output", type=Path, default=Path("output/cifar10"), help="folder for results")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--seeds", type=int, default=3, help="number of repeats (default: 3)")
    add("--width", type=int, default=64, help="channels of the first layer (default: 64)")
    add("--pool", type=int, default=50_000, help="images in the pool (default: 50000)")
    add("--test", type=int, default=10_000, help="test images (default: 10000)")
    add("--initial", type=int, default=1000, help="labels at first (default: 1000)")
    add("--instances", type=int, default=1000, help="labels a query (default: 1000)")
    add("--queries", type=int, default=5, help="number of queries (default: 5)")
    add("--epochs", type=int, default=100, help="epochs of each training (default: 100)")
    add("--batch-size", type=int, default=250, help="images a pass in a query (default: 250)")
    add(
        "--max-candidates",
        type=int,
        default=10_000,
        help="images that BAIT and FisherMask look at in a query (default: 10000)",
    )
    add("--mask-size", type=int, help="parameters in the mask (default: as the sampler decides)")
    names = ["random", "entropy", "BAIT", "FisherMask"]
    add("--strategies", nargs="+", choices=names, default=names)
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    X, y, n_train = load(options.data_dir)
    net = NeuralNetClassifier(
        ResNet18,
        module__width=options.width,
        criterion=nn.CrossEntropyLoss,
        optimizer=torch.optim.SGD,
        optimizer__momentum=0.9,
        optimizer__weight_decay=5e-4,
        lr=0.05,
        max_epochs=options.epochs,
        batch_size=128,
        iterator_valid__batch_size=500,
        train_split=None,
        callbacks=[
            ("schedule", LRScheduler("CosineAnnealingLR", T_max=options.epochs)),
        ],
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
    display.ax_.set_title("CIFAR-10, ResNet-18")
    display.ax_.grid(alpha=0.3)
    display.figure_.savefig(options.output / "curves.png", dpi=150)
    print(f"\nIn {options.output}: results.json and curves.png")


if __name__ == "__main__":
    main()
