"""Queries of large pools, each in a process of its own; not part of `make bench`.

Run from the root of the repository::

    python -m benchmarks.speed.large --data-dir output/data
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from tqdm.auto import tqdm

from benchmarks.common import harness
from benchmarks.common.memory import peak_resident, private, resident, watching_memory
from skfishermask import PUBLISHED, FisherMaskSampler

_MILLION = {"n_directions": 1, "embedding_dtype": "bfloat16"}
# A small `memory_share` sends V to the scratch file.
LARGE: dict[str, dict[str, Any]] = {
    "in memory": {"n": 60_000, "k": 2000},
    "scratch file": {"n": 300_000, "k": 1000, "parameters": {"memory_share": 0.01}},
    "100,000, one direction": {"n": 100_000, "k": 1000, "parameters": _MILLION},
    "1,000,000, one direction": {"n": 1_000_000, "k": 1000, "parameters": _MILLION},
    "5,000, 1,000 classes": {
        "n": 5000, "k": 1000, "n_classes": 1000, "parameters": {"n_directions": 3},
    },
    "50,000, 1,000 classes": {
        "n": 50_000, "k": 1000, "n_classes": 1000, "parameters": {"n_directions": 3},
    },
}  # fmt: skip
# Cases of which the second has ten times the pool of the first.
TENTHS = [
    ("100,000, one direction", "1,000,000, one direction"),
    ("5,000, 1,000 classes", "50,000, 1,000 classes"),
]
MOST_BYTES = 20e9
QUICK_LARGE: dict[str, dict[str, Any]] = {
    "in memory": {"n": 300, "k": 400},
    "scratch file": {"n": 600, "k": 350, "parameters": {"memory_share": 1e-9}},
}


def write_images(folder: Path, n: int, data_dir: Path | None, n_classes: int = 10) -> str:
    """Write a pool of n images of 28 x 28 and a training set; return their name."""
    if data_dir is not None:
        from benchmarks.study.run import load

        X, y, n_train = load("fashion-mnist", data_dir, download=False)
        # The training set comes from the test images, so that the pool can be all the others.
        np.save(folder / "pool.npy", X[: min(n, n_train)])
        np.savez(folder / "training.npz", X=X[n_train:][:1000], y=y[n_train:][:1000])
        return "Fashion-MNIST"
    pool = np.lib.format.open_memmap(
        folder / "pool.npy", mode="w+", dtype="float32", shape=(n, 1, 28, 28)
    )
    part = 10_000
    for start in tqdm(range(0, n, part), desc="writing the pool"):
        X, _ = harness.noisy_images(min(part, n - start), n_classes, 28, channels=1, seed=1 + start)
        pool[start : start + part] = X
    X, y = harness.noisy_images(max(1000, 2 * n_classes), n_classes, 28, channels=1)
    y[:n_classes] = np.arange(n_classes)
    np.savez(folder / "training.npz", X=X, y=y)
    return "synthetic images of 28 x 28"


def measure_case(given: argparse.Namespace) -> dict[str, Any]:
    """Run one query of a large pool; the peak memory of this process is the query's."""
    name = given.one_case
    setting = (QUICK_LARGE if given.quick else LARGE)[name]
    parameters = setting.get("parameters", {})
    mapped = "memory_share" in parameters or setting["n"] >= 1_000_000
    pool = np.load(given.folder / "pool.npy", mmap_mode="r" if mapped else None)
    with np.load(given.folder / "training.npz") as training:
        net = harness.trained_net("cnn", training["X"], training["y"], 5, given.device)
    sampler = FisherMaskSampler(
        mask_fraction=setting["k"],
        **PUBLISHED | {"batch_size": 256, "random_state": 0, "verbose": 1} | parameters,
    )
    n_instances = 10 if given.quick else 1000
    before = {
        "baseline_bytes": resident(),
        "baseline_private_bytes": private(),
        "peak_before_bytes": peak_resident(),
    }
    with watching_memory() as seen:
        sampler(net, pool, n_instances)
    info = sampler.query_info_
    return {
        "N": len(pool),
        "K": n_instances,
        "k": info["mask_size"],
        "r": info["n_directions"],
        "C": setting.get("n_classes", 10),
        "pool_bytes": pool.nbytes,
        "pool_is_mapped": mapped,
        "parameters": parameters,
        "mean_confidence": harness.confidence(net, np.asarray(pool[:1000])),
        "query": {key: value for key, value in info.items() if key != "seconds"},
        "seconds": info["seconds"],
        **before,
        "peak_bytes": peak_resident(),
        **seen,
    }


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Run each large pool in a fresh process; other results of this machine stay in the file."""
    about = harness.surroundings(given)
    settings = QUICK_LARGE if given.quick else LARGE
    wanted = given.cases or settings
    file = given.out or harness.RESULTS / "large.json"
    old = json.loads(file.read_text("utf-8")) if file.exists() else {}
    found = {}
    if all(old.get(key) == about[key] for key in ("quick", "machine", "versions")):
        found = {name: case for name, case in old["cases"].items() if name not in wanted}
    for name in (name for name in settings if name in wanted):
        setting = settings[name]
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            # Real images are too few for the larger pools.
            real = given.data_dir if name.startswith("in memory") else None
            data = write_images(folder, setting["n"], real, setting.get("n_classes", 10))
            command = [sys.executable, "-m", "benchmarks.speed.large", "--device", given.device]
            command += ["--one-case", name, "--folder", scratch, "--out", f"{scratch}/case.json"]
            command += ["--quick"] if given.quick else []
            subprocess.run(command, check=True)
            case = json.loads((folder / "case.json").read_text("utf-8"))
            found[name] = {"data": data} | case
    return {
        **about,
        "memory_bytes": psutil.virtual_memory().total,
        "cases": {name: found[name] for name in settings if name in found},
        **compared(found),
    }


def compared(found: dict[str, Any]) -> dict[str, Any]:
    """Compare the large cases with each other, and with the targets."""
    targets, growth = [], {}
    for small, big in TENTHS:
        if small in found and big in found:
            growth[big] = {
                step: value / found[small]["seconds"][step]
                for step, value in found[big]["seconds"].items()
            }
    for name, case in found.items():
        if case["N"] >= 1_000_000:
            peak = case["peak_private_bytes"]
            met = peak < MOST_BYTES
            targets.append(harness.target(f"{name}: bytes at most", peak, "below 20 GB", met))
    return {"growth from a tenth": growth, "targets": targets}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = harness.options(__doc__ or "", "large")
    parser.add_argument("--cases", nargs="+", choices=[*LARGE], help="these pools alone")
    parser.add_argument("--data-dir", type=Path, help="where torchvision's Fashion-MNIST lies")
    parser.add_argument("--one-case", choices=[*LARGE], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.one_case:
        harness.write(given.out, "large_case", measure_case(given))
    else:
        harness.write(given.out, "large", measure(given))


if __name__ == "__main__":
    main()
