"""The paper's query: 1,200 of 25,000 images, ResNet-18, its share of the parameters. For a GPU.

With 10 classes and all directions, and with 100 classes and three directions. On a CPU it needs
50 GB of memory and days, but for ``--quick``. Run from the root of the repository::

    python -m benchmarks.speed.paper --device cuda
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.common import harness
from skfishermask import PUBLISHED, FisherMaskSampler

MASK_FRACTION = 0.002
CASES: dict[int, dict[str, Any]] = {10: {}, 100: {"n_directions": 3}}


def measure_case(
    given: argparse.Namespace, n_classes: int, parameters: dict[str, Any]
) -> dict[str, Any]:
    """Measure seconds of the query's steps, beside copies in the memory of the device."""
    n, n_instances, n_copied = (120, 6, 1000) if given.quick else (25_000, 1200, 2**28)
    case = harness.ImageCase.make(given, n, n_classes)
    sampler = FisherMaskSampler(
        mask_fraction=MASK_FRACTION,
        **PUBLISHED | {"batch_size": 256, "random_state": 0} | parameters,
    )
    infos: list[dict[str, Any]] = []
    source = torch.ones(n_copied, device=given.device)
    room = torch.empty_like(source)

    def query() -> None:
        sampler(case.net, case.pool, n_instances)
        infos.append(sampler.query_info_)

    works: dict[str, harness.Work] = {"query": query, "copy": lambda: room.copy_(source)}
    times = harness.alternate(works, given.repeats, given.device, f"{n_classes} classes")
    infos = infos[1:]  # as of all works, the first round does not count
    a_second = [2 * source.nbytes / seconds for seconds in times["copy"]]
    read = n_instances * infos[0]["embedding_bytes"]
    reading = [read / info["seconds"]["selection"] for info in infos]
    found = {
        "sizes": case.sizes | {"N": n, "K": n_instances},
        "query": {key: value for key, value in infos[-1].items() if key != "seconds"},
        "seconds": {
            step: harness.spread([info["seconds"][step] for info in infos])
            for step in infos[0]["seconds"]
        },
        "bytes a second, copying": harness.spread(a_second),
        # As if every pick read all embeddings: two picks that share a read can make it above 1.
        "share of that in the selection": harness.ratio(reading, a_second),
    }
    if torch.device(given.device).type == "cuda":
        found["peak_bytes_on_device"] = torch.cuda.max_memory_allocated(given.device)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    given = harness.options(__doc__ or "", "paper", repeats=3).parse_args(arguments)
    cases = {str(C): measure_case(given, C, parameters) for C, parameters in CASES.items()}
    harness.write(given.out, "paper", {**harness.surroundings(given), "cases": cases})


if __name__ == "__main__":
    main()
