"""Does coverage of pixels help? What decided how large inputs ``coverage_share="auto"`` covers.

Run from the root of the repository, with the files of ``benchmarks.study.data``::

    python -m benchmarks.study.pixels --images cifar10.npz --data-dir output/data

Images of CIFAR-10, balanced and 50:1, batches of 20: for a small convolutional network from
scratch, and for a head on what a pretrained network makes of the images. That head is given the
images and their features together and looks at the features alone, as a network does that has its
frozen backbone inside: coverage is measured on what the network is given. Resumable, as
``benchmarks.study.run``; ``benchmarks.study.report`` reads the results.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from benchmarks.common.networks import NETWORKS, Linear, SmallMLP
from benchmarks.study.data import N_TEST, N_TRAIN, some_of_each
from benchmarks.study.results import OF_PIXELS, PUBLISHED
from benchmarks.study.run import run
from benchmarks.study.strategies import STRATEGIES, coverage_at_first

RESULTS = Path("benchmarks/results/label_efficiency_pixels")
COMPARED = ["random", "UHerding, radius 1", PUBLISHED, OF_PIXELS]
N_PIXELS = 3 * 32 * 32
# Features are this much smaller than they were, so that coverage sees the pixels alone.
SHRUNK = 1e-4


class BehindPixels(nn.Module):
    """A head on the features that come after the pixels."""

    head: type[nn.Module]

    def __init__(self, shape: tuple[int, ...], n_classes: int) -> None:
        super().__init__()
        self.output = self.head((shape[0] - N_PIXELS,), n_classes)

    def forward(self, X: Tensor) -> Tensor:
        return self.output(X[:, N_PIXELS:] / SHRUNK)


class MLPBehindPixels(BehindPixels):
    head = SmallMLP


class LinearBehindPixels(BehindPixels):
    head = Linear


# By the file of features.
HEADS = {"cifar10-features": "mlp16 behind pixels", "cifar10-components": "linear behind pixels"}


def with_pixels(name: str, images: Path, data_dir: Path) -> Path:
    """Write the standardized pixels and, after them, the features of a file into another one."""
    file = data_dir / f"pixels-{name}.npz"
    if file.exists():
        return file
    pictures, features = np.load(images), np.load(data_dir / f"{name}.npz")
    rng, arrays = np.random.default_rng(0), {}
    for part, n in (("train", N_TRAIN), ("test", N_TEST)):
        rows = some_of_each(pictures[f"y_{part}"].astype("int64"), n, rng)  # those of the features
        y = arrays[f"y_{part}"] = features[f"y_{part}"]
        assert np.array_equal(pictures[f"y_{part}"][rows], y)
        pixels = pictures[f"X_{part}"][rows].reshape(len(rows), -1).astype("float32")
        if part == "train":
            mean, std = pixels.mean(), pixels.std()
        parts = [(pixels - mean) / std, SHRUNK * features[f"X_{part}"]]
        arrays[f"X_{part}"] = np.concatenate(parts, axis=1, dtype="float32")
    np.savez(file, **arrays)
    return file


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--images", type=Path, required=True, help="CIFAR-10 as a file .npz")
    add("--data-dir", type=Path, default=Path("output/data"))
    add("--first-seed", type=int, default=1000)
    add("--seeds", type=int, default=12)
    add("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    STRATEGIES[OF_PIXELS] = coverage_at_first
    NETWORKS.update(zip(HEADS.values(), (MLPBehindPixels, LinearBehindPixels), strict=True))
    cases = [(options.images, "cnn")]
    for name, network in HEADS.items():
        cases.append((with_pixels(name, options.images, options.data_dir), network))
    common = {
        "initial": "stratified",
        "n_initial": 20,
        "n_instances": 20,
        "n_queries": 4,
        "trainings": 1,
    }
    common |= {"pool_size": 2000, "test_size": 2600, "device": "cpu", "download": False}
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        for file, network in cases:
            for imbalance in (1, 50):
                setting = {"dataset": str(file), "network": network, "imbalance": imbalance}
                given = vars(options) | common | setting | {"strategies": COMPARED}
                run(argparse.Namespace(**given), seed)


if __name__ == "__main__":
    main()
