"""What the benchmarks share: the clock, the spread of repeats, growth, the machine, the images."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from skorch import NeuralNetClassifier
from torch.nn import functional as F
from tqdm.auto import tqdm

from benchmarks.common.networks import make_net

RESULTS = Path(__file__).parents[1] / "results"
PACKAGES = ["skfishermask", "torch", "numpy", "scikit-learn", "skorch", "scikit-activeml"]
START = time.perf_counter()
# Samples in a pass through the network: for ours and for the yardstick.
BATCH_SIZE = 64
Work = Callable[[], object]
Spread = dict[str, float]


def options(description: str, name: str, repeats: int | None = None) -> argparse.ArgumentParser:
    """Return the options that all benchmarks have, with `--repeats` where these have a number."""
    parser = argparse.ArgumentParser(description=description.split("\n\n")[0])
    add = parser.add_argument
    add("--out", type=Path, help=f"file of the result (default: {RESULTS.name}/{name}.json)")
    add("--device", default="cpu", help="cpu or cuda (default: cpu)")
    if repeats is not None:
        add("--repeats", type=int, default=repeats, help=f"rounds (default: {repeats})")
    add("--quick", action="store_true", help="tiny sizes: does it run?")
    return parser


def seconds(work: Work, device: str) -> float:
    """Time one call; what is left over on a GPU, before and after, is waited for."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def alternate(
    works: Mapping[str, Work], repeats: int, device: str, text: str, warm_up: bool = True
) -> dict[str, list[float]]:
    """Time several things in turn, round after round: other work on the machine slows them alike.

    A first round that does not count fills caches and lets libraries choose their kernels.
    """
    found: dict[str, list[float]] = {name: [] for name in works}
    total = (repeats + warm_up) * len(works)
    with tqdm(total=total, desc=text) as bar:
        for repeat in range(-warm_up, repeats):
            for name, work in works.items():
                bar.set_postfix_str(name)
                taken = seconds(work, device)
                if repeat >= 0:
                    found[name].append(taken)
                bar.update()
    return found


def spread(values: Sequence[float]) -> Spread:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratio(values: Sequence[float], over: Sequence[float]) -> Spread:
    """Return the spread of the ratios within each round."""
    return spread([a / b for a, b in zip(values, over, strict=True)])


def scaled(values: Sequence[float], by: float) -> list[float]:
    return [value * by for value in values]


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Fit the slope of log(value) over log(size) by least squares: 1 is linear growth."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def sweep(
    measured: str,
    over: str,
    sizes: Sequence[int],
    lines: Mapping[str, Sequence[Sequence[float]]],
    fixed: Mapping[str, Any],
    note: str = "",
) -> dict[str, Any]:
    """Describe growth: for each line, the repeats at every size, their spread and the exponent."""
    return {
        "measured": measured,
        "over": over,
        "sizes": list(sizes),
        "fixed": dict(fixed),
        "note": note,
        "lines": {
            name: {
                "seconds": [spread(repeats) for repeats in values],
                "exponent": exponent(sizes, [statistics.median(repeats) for repeats in values]),
            }
            for name, values in lines.items()
        },
    }


def target(what: str, found: Spread | float, wanted: str, met: bool) -> dict[str, Any]:
    return {"what": what, "found": found, "wanted": wanted, "met": bool(met)}


def at_most(what: str, found: Spread, limit: float) -> dict[str, Any]:
    return target(what, found, f"at most {limit:g}", found["median"] <= limit)


def at_least(what: str, found: Spread, limit: float) -> dict[str, Any]:
    return target(what, found, f"at least {limit:g}", found["median"] >= limit)


def about_linear(what: str, growth: Mapping[str, Any]) -> dict[str, Any]:
    """Check that the first line of a sweep grows about linearly."""
    found = next(iter(growth["lines"].values()))["exponent"]
    return target(what, found, "1 ± 0.15", abs(found - 1) <= 0.15)


def processor() -> str:
    listing = Path("/proc/cpuinfo")
    if listing.exists():
        for line in listing.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def surroundings(given: argparse.Namespace) -> dict[str, Any]:
    """Describe where and with what it was measured: the part that all results have."""
    on_gpu = torch.device(given.device).type == "cuda"
    return {
        "quick": given.quick,
        **({"repeats": given.repeats} if "repeats" in given else {}),
        "machine": {
            "device": torch.cuda.get_device_name(given.device) if on_gpu else "CPU",
            "processor": processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "system": platform.system(),
        },
        "versions": {"python": platform.python_version()}
        | {package: version(package) for package in PACKAGES},
    }


def write(path: Path | None, name: str, result: Mapping[str, Any]) -> None:
    """Write a result, and how long it took to measure."""
    path = path or RESULTS / f"{name}.json"
    result = {**result, "took": time.perf_counter() - START}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def noisy_images(
    n: int, n_classes: int, size: int, channels: int = 3, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Draw images (n, channels, size, size) of a coarse pattern for each class, and noise."""
    patterns = torch.randn(
        n_classes, channels, 4, 4, generator=torch.Generator().manual_seed(n_classes)
    )
    patterns = F.interpolate(patterns, size=(size, size), mode="bilinear").numpy()
    rng = np.random.default_rng(seed)
    y = rng.integers(n_classes, size=n)
    noise = rng.standard_normal((n, channels, size, size), dtype="float32")
    return 0.5 * patterns[y] + noise, y.astype("int64")


def trained_net(
    network: str, X: np.ndarray, y: np.ndarray, epochs: int, device: str, seed: int = 0
) -> NeuralNetClassifier:
    """Train for a few epochs: a network in the middle of active learning is half-confident."""
    torch.manual_seed(seed)
    net = make_net(network, X.shape[1:], int(y.max()) + 1, device)
    return net.set_params(max_epochs=epochs).fit(X, y)


def confidence(net: NeuralNetClassifier, X: np.ndarray) -> float:
    """Compute the mean of the largest probability."""
    return float(net.predict_proba(X).max(1).mean())


@dataclass(frozen=True)
class ImageCase:
    """A CIFAR-style ResNet-18 trained for a moment, a pool for it, and what to say about them."""

    net: NeuralNetClassifier
    pool: np.ndarray
    X_training: np.ndarray
    y_training: np.ndarray
    sizes: dict[str, Any]

    @classmethod
    def make(cls, given: argparse.Namespace, n: int, n_classes: int, size: int = 32) -> ImageCase:
        size, n_train, epochs = (8, max(64, n_classes), 1) if given.quick else (size, 1000, 3)
        X, y = noisy_images(n_train, n_classes, size)
        y[:n_classes] = np.arange(n_classes)  # of few samples a class might have none
        net = trained_net("resnet18", X, y, epochs, given.device)
        pool, _ = noisy_images(n, n_classes, size, seed=1)
        sizes = {
            "network": "CIFAR-style ResNet-18",
            "n_parameters": sum(p.numel() for p in net.module_.parameters()),
            "n_classes": n_classes,
            "image": [3, size, size],
            "mean_confidence": confidence(net, pool[:256]),
        }
        net.module_.eval()  # predicting has left it in training mode
        return cls(net, pool, X, y, sizes)
