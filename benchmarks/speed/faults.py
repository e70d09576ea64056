"""Queries on a Dask cluster while one of its workers is killed: do the picks change?

Each run has a cluster of its own on this machine. While chunks are embedded, or after some picks,
one worker gets SIGKILL, at a moment that differs from run to run.
"""

from __future__ import annotations

import argparse
import os
import signal
import threading
import time
from collections.abc import Sequence
from typing import Any

ORDER = ("diagonal", "embedding", "fisher", "selection")
PHASES = ("embedding", "selection")
N, N_LABELED, CHUNK = 6000, 100, 400


def slow(chunk: Any) -> Any:
    """Wait a moment for each chunk, so that a worker can be killed meanwhile."""
    time.sleep(0.1)
    return chunk


def query(n_picks: int, kill_after: float | None) -> tuple[Any, Any, dict[str, Any]]:
    """Choose on a fresh cluster; kill a worker `kill_after` seconds into the query."""
    import dask.array as da
    from distributed import Client, LocalCluster

    from benchmarks.common import harness
    from skfishermask import PUBLISHED, FisherMaskSampler

    X, y = harness.noisy_images(N, 5, 8, channels=1)
    training, labels = X[:N_LABELED], y[:N_LABELED]
    net = harness.trained_net("cnn", training, labels, 5, "cpu")
    options = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": ":0"}
    with LocalCluster(**options) as machines, Client(machines) as client:
        pool = da.from_array(X[N_LABELED:], (CHUNK, 1, 8, 8)).map_blocks(slow, dtype=X.dtype)
        sampler = FisherMaskSampler(random_state=0, mask_fraction=300, **PUBLISHED)
        # The first query on a cluster imports everything there.
        sampler(net, pool, n_picks, X_labeled=training)
        pids = client.run(os.getpid).values()
        timer = threading.Timer(kill_after or 0, os.kill, (min(pids), signal.SIGKILL))
        if kill_after is not None:
            timer.start()
        start = time.perf_counter()
        indices, gains = sampler(net, pool, n_picks, X_labeled=training)
        took = time.perf_counter() - start
        timer.cancel()
        deadline = time.monotonic() + 10
        while (left := client.run_on_scheduler(_tasks)) and time.monotonic() < deadline:
            time.sleep(0.1)
        info = sampler.query_info_
    return indices, gains, {
        "killed_after": kill_after,
        "killed": kill_after is not None and kill_after < took,
        "seconds": info["seconds"],
        "round_trips": info["round_trips"],
        "tasks_left": left,
    }  # fmt: skip


def _tasks(dask_scheduler: Any) -> int:
    return len(dask_scheduler.tasks)


def measure(given: argparse.Namespace) -> dict[str, Any]:
    import numpy as np

    from benchmarks.common import harness

    n_picks = 10 if given.quick else 60
    expected, gains, undisturbed = query(n_picks, None)
    seconds, runs = undisturbed["seconds"], []
    for number in range(given.runs):
        phase = PHASES[number % len(PHASES)]
        moment = (number // len(PHASES) + 0.5) / -(-given.runs // len(PHASES))
        before = sum(seconds[name] for name in ORDER[: ORDER.index(phase)])
        found, theirs, told = query(n_picks, before + 0.9 * moment * seconds[phase])
        told |= {"phase": phase, "moment": 0.9 * moment}
        told["same_picks"] = bool(np.array_equal(found, expected))
        told["relative_difference_of_gains"] = float(np.abs(theirs / gains - 1).max())
        runs.append(told)
    same = sum(run["same_picks"] and run["killed"] for run in runs)
    return {
        **harness.surroundings(given),
        "sizes": {"N": N - N_LABELED, "n_chunks": -(-(N - N_LABELED) // CHUNK), "K": n_picks},
        "undisturbed": undisturbed,
        "runs": runs,
        "targets": [
            harness.target("same picks after a killed worker, runs", same, str(len(runs)),
                           same == len(runs)),
        ],
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    from benchmarks.common import harness

    parser = harness.options(__doc__ or "", "faults")
    parser.add_argument("--runs", type=int, default=20, help="killed queries (default: 20)")
    given = parser.parse_args(arguments)
    harness.write(given.out, "faults", measure(given))


if __name__ == "__main__":
    main()
