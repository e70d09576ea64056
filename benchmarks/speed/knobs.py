"""What each knob of a query costs in agreement with the exact choice, and saves in seconds.

Run from the root of the repository::

    python -m benchmarks.speed.knobs
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from tqdm.auto import tqdm

from benchmarks.common import harness
from benchmarks.common.dense import batch_information, objective, select_batch_oracle
from benchmarks.common.harness import BATCH_SIZE
from benchmarks.study.run import make_split
from skfishermask import PUBLISHED, FisherMaskSampler, fisher_embedding
from skfishermask.fisher import fisher_matrix

AUTO = {"n_directions": "auto"}


class KnobCase:
    """A small network in the middle of active learning, and the exact answer for its query."""

    def __init__(self, given: argparse.Namespace, seed: int, imbalance: float = 1) -> None:
        X, y = load_digits(return_X_y=True)
        X = (X / 16).astype("float32").reshape(-1, 1, 8, 8)
        self.n_labeled = 100
        rows, _ = make_split(y, len(y), seed, len(y), 0, imbalance)
        n_pool, self.n_instances = (60, 3) if given.quick else (len(rows) - 100, 10)
        order = np.random.default_rng(seed).permutation(rows)
        labeled, pool = order[:100], order[100 : 100 + n_pool]
        self.seed, self.labeled, self.pool = seed, X[labeled], X[pool]
        self.net = harness.trained_net("cnn", self.labeled, y[labeled], 12, given.device, seed)
        sampler = self.sampler()
        sampler(self.net, self.pool, 1, X_labeled=self.labeled)
        self.mask = sampler.mask_
        # Slow, plain float64 code is the judge, on the CPU.
        module = copy.deepcopy(self.net.module_).double().cpu()
        self.V, V_labeled = (
            fisher_embedding(
                module,
                torch.as_tensor(part).double().split(BATCH_SIZE),
                self.mask,
                dtype=torch.float64,
            )
            for part in (self.pool, self.labeled)
        )
        self.fisher = fisher_matrix(torch.cat([self.V, V_labeled]))
        self.start = {"fisher_labeled": fisher_matrix(V_labeled), "n_labeled": self.n_labeled}
        self.exact, _ = select_batch_oracle(self.V, self.n_instances, self.fisher, **self.start)

    def sampler(self, **knobs: Any) -> FisherMaskSampler:
        # The mask from all samples, so that it does not depend on what else is drawn.
        return FisherMaskSampler(
            **PUBLISHED
            | {"n_mask_samples": None, "batch_size": BATCH_SIZE, "random_state": self.seed}
            | knobs,
        )

    def gain(self, positions: Sequence[int]) -> float:
        """Compute how much a batch reduces the exact objective."""
        before, after = (
            batch_information(self.V, chosen, self.n_instances, **self.start)
            for chosen in ([], positions)
        )
        return objective(before, self.fisher) - objective(after, self.fisher)

    def compare(self, positions: Sequence[int]) -> tuple[float, float]:
        """Return the share of picks that are exact ones, and of the exact batch's gain."""
        common = len(set(positions) & set(self.exact)) / len(self.exact)
        return common, self.gain(positions) / self.gain(self.exact)


def knob_settings(n_pool: int) -> dict[str, dict[str, Any]]:
    return {
        "as it is": {},
        **{f"n_directions={value}": {"n_directions": value} for value in (1, 3, 0.9, 0.96)},
        'n_directions="auto"': AUTO,
        "n_mask_samples=128": {"n_mask_samples": 128},
        **{f'embedding_dtype="{d}"': {"embedding_dtype": d} for d in ("float16", "bfloat16")},
        **{
            f"max_candidates={share:.0%} of the pool": {"max_candidates": round(share * n_pool)}
            for share in (0.5, 0.25, 0.1, 0.05)
        },
        "the defaults, and 25% of the pool": AUTO
        | {"n_mask_samples": 128, "max_candidates": round(0.25 * n_pool)},
    }


def knobs(given: argparse.Namespace, imbalance: float) -> dict[str, Any]:
    """Measure agreement with the exact choice and seconds, for each knob and network."""
    n_networks = 1 if given.quick else 5
    seeds = tqdm(range(n_networks), desc="exact choices")
    cases = [KnobCase(given, seed, imbalance) for seed in seeds]
    settings = knob_settings(len(cases[0].pool))
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in settings}
    times: dict[str, list[float]] = {name: [] for name in settings}
    rows: dict[str, int] = {}
    for case in tqdm(cases, desc="knobs"):
        chosen: dict[str, list[int]] = {}

        def query(name: str, case: KnobCase = case, chosen: dict = chosen) -> None:
            sampler = case.sampler(**settings[name])
            indices, _ = sampler(case.net, case.pool, case.n_instances, X_labeled=case.labeled)
            chosen[name] = indices.tolist()
            rows[name] = sampler.query_info_["n_directions"]

        works = {name: (lambda name=name, query=query: query(name)) for name in settings}
        # The networks are the repeats.
        taken = harness.alternate(works, 1, given.device, f"network {case.seed}")
        for name in settings:
            found[name].append(case.compare(chosen[name]))
            times[name] += taken[name]
    random = [
        case.compare(np.random.default_rng(case.seed).permutation(len(case.V))[: len(case.exact)])
        for case in cases
    ]
    first = cases[0]
    return {
        "sizes": {
            "network": "CNN of the label-efficiency study",
            "data": "digits",
            "n_networks": n_networks,
            "n_labeled": first.n_labeled,
            "N": len(first.pool),
            "K": first.n_instances,
            "k": len(first.mask),
            "mean_confidence": statistics.mean(
                harness.confidence(case.net, case.pool) for case in cases
            ),
        },
        "settings": {
            name: agreement(found[name])
            | {"seconds": harness.spread(times[name]), "n_directions": rows[name]}
            for name in settings
        },
        "random batch": agreement(random),
    }


def agreement(found: Sequence[tuple[float, float]]) -> dict[str, harness.Spread]:
    common, gain = zip(*found, strict=True)
    return {"common": harness.spread(common), "gain": harness.spread(gain)}


def main(arguments: Sequence[str] | None = None) -> None:
    given = harness.options(__doc__ or "", "knobs").parse_args(arguments)
    pools = {name: knobs(given, ratio) for name, ratio in (("balanced", 1), ("50:1", 50))}
    harness.write(given.out, "knobs", harness.surroundings(given) | {"pools": pools})


if __name__ == "__main__":
    main()
