"""One query of a large pool on a Dask cluster of this machine, and through a local scratch file.

Both choose from the same pool with the same network, each in a process of its own, one after the
other. What the cluster costs over the scratch file is the ratio of their seconds; the peaks of
memory are what the operating system says of each process.

The workers import this script, too, so large packages are imported in the functions.
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

from benchmarks.common.memory import (
    peak_resident,
    private,
    resident,
    start_watching,
    stop_watching,
    watching_memory,
)

SIZES = {"N": 300_000, "n_chunks": 30, "K": 400, "k": 1000, "C": 3, "n_workers": 2}
QUICK_SIZES = {"N": 600, "n_chunks": 3, "K": 10, "k": 350, "C": 5, "n_workers": 2}
# Small enough that the local query goes through a scratch file.
MEMORY_SHARE = 1e-6
CASES = ("local", "cluster")


def query(given: argparse.Namespace, sizes: dict[str, int], pool: Any) -> dict[str, Any]:
    """Run the query in this process."""
    import numpy as np

    from benchmarks.common import harness
    from skfishermask import PUBLISHED, FisherMaskSampler

    with np.load(given.folder / "training.npz") as training:
        net = harness.trained_net("cnn", training["X"], training["y"], 5, "cpu")
    sampler = FisherMaskSampler(
        mask_fraction=sizes["k"],
        batch_size=256,
        memory_share=MEMORY_SHARE,
        **PUBLISHED,
        random_state=0,
        verbose=1,
    )
    before = {"before_bytes": resident(), "before_private_bytes": private()}
    with watching_memory() as seen:
        indices, gains = sampler(net, pool, sizes["K"])
    info = dict(sampler.query_info_)
    return {
        "picks": indices.tolist(),
        "gains": gains.tolist(),
        "seconds": info.pop("seconds"),
        "query": info,
        **before,
        "peak_bytes": peak_resident(),
        **seen,
    }


def local(given: argparse.Namespace, sizes: dict[str, int]) -> dict[str, Any]:
    import numpy as np

    return query(given, sizes, np.load(given.folder / "pool.npy", mmap_mode="r"))


def cluster(given: argparse.Namespace, sizes: dict[str, int]) -> dict[str, Any]:
    """Run the query on a cluster; its workers read the pool from its file, chunk by chunk."""
    import dask.array as da
    import numpy as np
    from dask import delayed
    from distributed import Client, LocalCluster

    path, n = str(given.folder / "pool.npy"), sizes["N"] // sizes["n_chunks"]

    def rows(start: int) -> Any:
        return np.array(np.load(path, mmap_mode="r")[start : start + n])

    options = {"n_workers": sizes["n_workers"], "threads_per_worker": 1}
    with LocalCluster(dashboard_address=None, **options) as machines, Client(machines) as client:
        parts = [delayed(rows)(start) for start in range(0, sizes["N"], n)]
        shape, dtype = (n, 1, 28, 28), np.dtype("float32")
        pool = da.concatenate([da.from_delayed(part, shape, dtype) for part in parts])
        before = client.run(start_watching)
        found = query(given, sizes, pool)
        after = client.run(stop_watching)
    return {**found, "workers": [before[name] | after[name] for name in sorted(after)]}


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Measure both queries, each in a fresh process, and compare them."""
    import numpy as np
    import psutil

    from benchmarks.common import harness
    from benchmarks.speed.large import write_images

    sizes = QUICK_SIZES if given.quick else SIZES
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        data = write_images(Path(scratch), sizes["N"], None, sizes["C"])
        for case in CASES:
            command = [sys.executable, "-m", "benchmarks.speed.cluster", "--case", case]
            command += ["--folder", scratch, "--out", f"{scratch}/{case}.json"]
            command += ["--quick"] if given.quick else []
            subprocess.run(command, check=True)
            found[case] = json.loads(Path(scratch, f"{case}.json").read_text("utf-8"))
    picks = [found[case].pop("picks") for case in CASES]
    gains = [np.array(found[case].pop("gains")) for case in CASES]
    info = found["cluster"]["query"]
    share = info["embedding_bytes"] / sizes["n_workers"]
    peak = max(worker["peak_private_bytes"] for worker in found["cluster"]["workers"])
    trips = info["round_trips"] / sizes["K"]
    steps = found["local"]["seconds"]
    targets = [
        harness.target("picks in common, of all", len(set(picks[0]) & set(picks[1])) / sizes["K"],
                       "1", picks[0] == picks[1]),
        harness.target("largest size of a worker, GB", peak / 1e9,
                       f"at most {(share + 800e6) / 1e9:.2f}", peak <= share + 800e6),
        harness.target("round trips a pick", trips, "below 0.25", trips < 0.25),
    ]  # fmt: skip
    return {
        **harness.surroundings(given),
        "memory_bytes": psutil.virtual_memory().total,
        "data": data,
        "sizes": {**sizes, "r": info["n_directions"]},
        "same_picks": picks[0] == picks[1],
        "relative_difference_of_gains": float(np.abs(gains[1] / gains[0] - 1).max()),
        "share_bytes": share,
        "overhead": {step: found["cluster"]["seconds"][step] / steps[step] for step in steps},
        "cases": found,
        "targets": targets,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    from benchmarks.common import harness

    parser = harness.options(__doc__ or "", "cluster")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.case:
        run = local if given.case == "local" else cluster
        harness.write(given.out, given.case, run(given, QUICK_SIZES if given.quick else SIZES))
    else:
        harness.write(given.out, "cluster", measure(given))


if __name__ == "__main__":
    main()
