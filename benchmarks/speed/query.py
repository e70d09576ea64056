"""Whole queries: beside the authors' way, beside other strategies, and what each knob costs.

Run from the root of the repository::

    python -m benchmarks.speed.query
    python -m benchmarks.speed.query --large   # big pools, not part of `make bench`
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import torch
import torchvision
from sklearn.datasets import load_digits
from skorch import NeuralNetClassifier
from torch import nn
from tqdm.auto import tqdm

from benchmarks.common import harness
from benchmarks.common.dense import batch_information, objective, select_batch_oracle
from benchmarks.common.harness import BATCH_SIZE
from benchmarks.common.memory import peak_resident, private, resident, watching_memory
from benchmarks.speed.embedding import (
    AUTHORS_BATCH,
    kept_entries,
    looped_diagonal,
    looped_embedding,
    one_by_one,
)
from benchmarks.speed.selection import authors_rows, gains_with_two_products, select_naively
from benchmarks.study.strategies import badge, k_center
from skfishermask import FisherMaskSampler, fisher_embedding
from skfishermask.fisher import fisher_matrix

# The authors' number of samples for the diagonal, which is the default, too.
DIAGONAL = {"n_mask_samples": 1024}
# The method alone: coverage of the inputs is another one.
OURS = DIAGONAL | {"coverage_share": 0}


# The query beside the authors' way


class Headline:
    """One query, and everything that it is compared with."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        self.n, self.n_instances = (16, 3) if given.quick else (2000, 100)
        # Some more images, for the sweep over the pool.
        self.case = harness.ImageCase.make(given, 2 * self.n, 10)
        self.pool = self.case.pool[: self.n]
        self.module = self.case.net.module_
        self.images = torch.as_tensor(self.pool, device=given.device)
        self.sampler = FisherMaskSampler(**OURS, batch_size=BATCH_SIZE, random_state=0)
        self.ours: list[dict[str, float]] = []
        self.indices = np.empty(0, dtype=int)
        # The first query does not count, and makes the mask that everything else takes.
        self.query()
        self.ours.clear()
        self.mask = self.sampler.mask_
        self.kept = kept_entries(self.module, self.mask)
        self.rows = authors_rows(self.module, self.images.split(BATCH_SIZE), self.mask)
        self.fisher = fisher_matrix(self.rows)

    def query(self) -> None:
        self.indices, _ = self.sampler(self.case.net, self.pool, self.n_instances)
        self.ours.append(self.sampler.query_info_["seconds"])

    def works(self) -> dict[str, tuple[float, harness.Work]]:
        """What is timed, each with the factor that makes it a whole query's."""
        few, n_mask = 2, min(self.n, DIAGONAL["n_mask_samples"])
        module, batch = self.module, self.images[:AUTHORS_BATCH]
        single, float32 = self.images[:few], self.rows.float()
        n_naive = min(self.n, 400)
        part = self.rows[:n_naive]
        return {
            "skfishermask": (1, self.query),
            "authors' embedding": (
                self.n / few,
                lambda: looped_embedding(module, batch, self.kept, few),
            ),
            "authors' diagonal": (n_mask / few, lambda: looped_diagonal(module, batch, few)),
            "authors' selection": (
                self.n_instances * self.n / n_naive,
                lambda: select_naively(part, 1, self.fisher),
            ),
            "kinder embedding": (self.n / few, lambda: one_by_one(module, single, self.kept)),
            "kinder diagonal": (
                n_mask / few,
                lambda: [looped_diagonal(module, image, 1) for image in single.split(1)],
            ),
            "kinder selection": (
                self.n_instances,
                lambda: select_naively(float32, 1, self.fisher, gains_with_two_products),
            ),
            "BADGE, scikit-activeml": (1, lambda: badge(self.learner, *self.task)),
            "CoreSet, scikit-activeml": (1, lambda: k_center(self.learner, *self.task)),
        }

    @property
    def learner(self) -> Any:
        """What the strategies of the label-efficiency study take."""
        return SimpleNamespace(
            estimator=self.case.net,
            query_strategy=None,
            X_training=self.case.X_training,
            y_training=self.case.y_training,
        )

    @property
    def task(self) -> tuple[np.ndarray, int]:
        return self.pool, self.n_instances

    def same_gradients(self) -> float:
        """Largest relative difference of V^T V between the naive loop's samples and ours."""
        few = 3
        naive = looped_embedding(self.module, self.images[:AUTHORS_BATCH], self.kept, few)
        ours = fisher_embedding(self.module, [self.images[:few]], self.mask).double().cpu()
        theirs = torch.as_tensor(naive)
        expected = theirs.mT @ theirs
        return float(
            ((ours.mT @ ours - expected).norm(dim=(1, 2)) / expected.norm(dim=(1, 2))).max()
        )

    def measure(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        works = self.works()
        times = harness.alternate(
            {name: work for name, (_, work) in works.items()},
            self.given.repeats,
            self.given.device,
            "query and peers",
            warm_up=False,
        )
        whole = {name: harness.scaled(times[name], factor) for name, (factor, _) in works.items()}
        # Two products give the gains of four, in half the time.
        naive = select_naively(
            self.rows, self.n_instances, self.fisher, gains_with_two_products, show=True
        )
        ours = {name: [run[name] for run in self.ours] for name in self.ours[0]}
        # F lies between the two; the authors' way is not charged for it.
        between = ours.get("fisher", [0.0] * self.given.repeats)
        ours["embedding and selection"] = add(ours["embedding"], between, ours["selection"])
        sides = {}
        for side in ("authors'", "kinder"):
            theirs = {
                step: whole[f"{side} {step}"] for step in ("diagonal", "embedding", "selection")
            }
            theirs["embedding and selection"] = add(theirs["embedding"], theirs["selection"])
            theirs["total"] = add(*(theirs[s] for s in ("diagonal", "embedding", "selection")))
            sides[side] = theirs
        ratios = {
            side: {step: harness.ratio(values, ours[step]) for step, values in theirs.items()}
            for side, theirs in sides.items()
        }
        chosen = self.indices.tolist()
        same = {
            "same_batch": set(chosen) == set(naive),
            "same_order": chosen == naive,
            "n_common": len(set(chosen) & set(naive)),
            "relative_difference_of_information": self.same_gradients(),
        }
        steps = ("embedding", "selection", "embedding and selection", "total")
        targets = [
            harness.at_least(f"{step}: times less than the authors' way", spread, 100)
            for step, spread in ((step, ratios["authors'"][step]) for step in steps[:3])
        ]
        targets.append(
            harness.target(
                "images in common with the authors' batch",
                same["n_common"],
                f"all {self.n_instances}",
                same["same_batch"],
            )
        )
        return {
            "sizes": self.case.facts
            | {key: v for key, v in self.sampler.query_info_.items() if key != "seconds"}
            | {"K": self.n_instances, "batch": BATCH_SIZE, **DIAGONAL},
            "ours": {name: harness.spread(values) for name, values in ours.items()},
            "theirs": {
                side: {step: harness.spread(values) for step, values in theirs.items()}
                for side, theirs in sides.items()
            },
            "ratios": ratios,
            "factors": {name: factor for name, (factor, _) in works.items()},
            "strategies": {
                name: harness.spread(whole[name])
                for name in ("skfishermask", "BADGE, scikit-activeml", "CoreSet, scikit-activeml")
            },
            "n_training": len(self.case.X_training),
            "graph": min(self.n, AUTHORS_BATCH),
            **same,
        }, targets


def add(*parts: Sequence[float]) -> list[float]:
    return [sum(values) for values in zip(*parts, strict=True)]


def over_samples(given: argparse.Namespace, case: harness.ImageCase) -> dict[str, Any]:
    """Growth of the whole query with the pool."""
    sizes = (16, 32) if given.quick else (500, 1000, 2000, 4000)
    n_instances = 2 if given.quick else 50
    few = {"n_mask_samples": 16}
    sampler = FisherMaskSampler(**OURS | few, batch_size=BATCH_SIZE, random_state=0)
    works = {f"N = {n}": (lambda n=n: sampler(case.net, case.pool[:n], n_instances)) for n in sizes}
    # At most two rounds, because these are long.
    rounds = min(2, given.repeats)
    times = harness.alternate(works, rounds, given.device, "query over N", warm_up=False)
    return harness.sweep(
        "query",
        "N",
        sizes,
        {"query": [*times.values()]},
        {"k": len(sampler.mask_), "C": 10, "K": n_instances, **few},
        "few samples for the diagonal, whose cost does not depend on the pool",
    )


def few_images(given: argparse.Namespace) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A large network and few samples: their rows are fewer than the mask has parameters."""
    n_pool, n_labeled, n_instances = (12, 8, 2) if given.quick else (100, 40, 5)
    X, y = harness.noisy_images(n_pool + n_labeled, 4, 32)
    torch.manual_seed(0)
    net = NeuralNetClassifier(
        torchvision.models.resnet18,
        module__num_classes=4,
        criterion=nn.CrossEntropyLoss,
        max_epochs=3,
        train_split=None,
        device=given.device,
        verbose=0,
    ).fit(X[n_pool:], y[n_pool:])
    sampler = FisherMaskSampler(coverage_share=0, random_state=0)
    with watching_memory() as seen:
        sampler(net, X[:n_pool], n_instances, X_labeled=X[n_pool:])
    info = sampler.query_info_
    total, peak = info["seconds"]["total"], seen["peak_private_bytes"]
    name = f"torchvision's ResNet-18 and {n_pool + n_labeled} images"
    return {
        "network": "torchvision's ResNet-18",
        "image": [3, 32, 32],
        "n_parameters": sum(p.numel() for p in net.module_.parameters()),
        "n_labeled": n_labeled,
        "K": n_instances,
        **info,
        **seen,
    }, [
        harness.target(f"{name}: seconds of a query", total, "below 5", total < 5),
        harness.target(f"{name}: bytes at most", peak, "below 2.5 GB", peak < 2.5e9),
    ]


# The knobs


class KnobCase:
    """A small network in the middle of active learning, and the exact answer for its query."""

    def __init__(self, given: argparse.Namespace, seed: int) -> None:
        X, y = load_digits(return_X_y=True)
        X = (X / 16).astype("float32").reshape(-1, 1, 8, 8)
        self.n_labeled = 100
        n_pool, self.n_instances = (60, 5) if given.quick else (len(X) - 100, 50)
        order = np.random.default_rng(seed).permutation(len(X))
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
                module, torch.as_tensor(part).split(BATCH_SIZE), self.mask, dtype=torch.float64
            )
            for part in (self.pool, self.labeled)
        )
        self.fisher = fisher_matrix(torch.cat([self.V, V_labeled]))
        self.start = {"fisher_labeled": fisher_matrix(V_labeled), "n_labeled": self.n_labeled}
        self.exact, _ = select_batch_oracle(self.V, self.n_instances, self.fisher, **self.start)

    def sampler(self, **knobs: Any) -> FisherMaskSampler:
        # The mask from all samples, so that it does not depend on what else is drawn.
        return FisherMaskSampler(
            n_mask_samples=None,
            coverage_share=0,
            batch_size=BATCH_SIZE,
            random_state=self.seed,
            **knobs,
        )

    def gain(self, positions: Sequence[int]) -> float:
        """How much a batch lessens the exact objective."""
        before, after = (
            batch_information(self.V, chosen, self.n_instances, **self.start)
            for chosen in ([], positions)
        )
        return objective(before, self.fisher) - objective(after, self.fisher)

    def compare(self, positions: Sequence[int]) -> tuple[float, float]:
        """Share of picks that are the exact ones, and share of the exact batch's gain."""
        common = len(set(positions) & set(self.exact)) / len(self.exact)
        return common, self.gain(positions) / self.gain(self.exact)


def knob_settings(n_pool: int) -> dict[str, dict[str, Any]]:
    return {
        "as it is": {},
        **{f"n_directions={value}": {"n_directions": value} for value in (1, 3, 0.9, 0.96)},
        **{f'embedding_dtype="{d}"': {"embedding_dtype": d} for d in ("float16", "bfloat16")},
        **{
            f"max_candidates={share:.0%} of the pool": {"max_candidates": round(share * n_pool)}
            for share in (0.5, 0.25)
        },
    }


def knobs(given: argparse.Namespace) -> dict[str, Any]:
    """Agreement with the exact choice and seconds, for each knob, over several networks."""
    n_networks = 1 if given.quick else 5
    cases = [KnobCase(given, seed) for seed in tqdm(range(n_networks), desc="exact choices")]
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


# Large pools


_MILLION = {"n_directions": 1, "embedding_dtype": "bfloat16"}
# The share of free memory that V may take is so small where the scratch file is to be used.
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
    """Write a pool of n images of 28 x 28 and a training set; say what they are."""
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


def large_case(given: argparse.Namespace) -> dict[str, Any]:
    """One query of a large pool: in a process of its own, whose peak memory is the query's."""
    name = given.large_case
    setting = (QUICK_LARGE if given.quick else LARGE)[name]
    parameters = setting.get("parameters", {})
    mapped = "memory_share" in parameters or setting["n"] >= 1_000_000
    pool = np.load(given.folder / "pool.npy", mmap_mode="r" if mapped else None)
    with np.load(given.folder / "training.npz") as training:
        net = harness.trained_net("cnn", training["X"], training["y"], 5, given.device)
    sampler = FisherMaskSampler(
        mask_fraction=setting["k"],
        coverage_share=0,
        batch_size=256,
        random_state=0,
        verbose=1,
        **parameters,
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


def large(given: argparse.Namespace) -> dict[str, Any]:
    """Each large pool in a fresh process; what else this machine has measured stays in the file."""
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
            command = [sys.executable, "-m", "benchmarks.speed.query", "--device", given.device]
            command += ["--large-case", name, "--folder", scratch, "--out", f"{scratch}/case.json"]
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
    """What the large cases say beside each other, and the targets for it."""
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


def measure(given: argparse.Namespace) -> dict[str, Any]:
    # Before anything else has taken memory, because its peak is told.
    few, few_targets = few_images(given)
    # The knobs first: the images of the query need more memory.
    by_knob = knobs(given)
    headline = Headline(given)
    query, targets = headline.measure()
    growth = over_samples(given, headline.case)
    return {
        **harness.surroundings(given),
        "query": query,
        "few images": few,
        "sweeps": [growth],
        "knobs": by_knob,
        "targets": [
            *targets,
            *few_targets,
            harness.about_linear("query over N, exponent", growth),
        ],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = harness.options(__doc__ or "", "query", repeats=3)
    parser.add_argument("--large", action="store_true", help="large pools instead (large.json)")
    parser.add_argument("--cases", nargs="+", choices=[*LARGE], help="these large pools alone")
    parser.add_argument("--data-dir", type=Path, help="where torchvision's Fashion-MNIST lies")
    parser.add_argument("--large-case", choices=[*LARGE], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.large_case:
        harness.write(given.out, "large_case", large_case(given))
    elif given.large:
        harness.write(given.out, "large", large(given))
    else:
        harness.write(given.out, "query", measure(given))


if __name__ == "__main__":
    main()
