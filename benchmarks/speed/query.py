"""Whole queries: beside the authors' way, beside other strategies, and what each knob costs.

Run from the root of the repository::

    python -m benchmarks.speed.query
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torchvision
from skorch import NeuralNetClassifier
from torch import nn

from benchmarks.common import harness
from benchmarks.common.harness import BATCH_SIZE
from benchmarks.common.memory import watching_memory
from benchmarks.speed.embedding import (
    AUTHORS_BATCH,
    kept_entries,
    looped_diagonal,
    looped_embedding,
    one_by_one,
)
from benchmarks.speed.selection import authors_rows, gains_with_two_products, select_naively
from benchmarks.study.strategies import badge, k_center
from skfishermask import PUBLISHED, FisherMaskSampler, fisher_embedding
from skfishermask.fisher import fisher_matrix


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
        self.sampler = FisherMaskSampler(**PUBLISHED, batch_size=BATCH_SIZE, random_state=0)
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
        """Return what is timed, each with the factor that scales it to a whole query."""
        few, n_mask = 2, min(self.n, PUBLISHED["n_mask_samples"])
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
        """Return what the strategies of the label-efficiency study take."""
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
        """Compute the largest relative difference of V^T V between the naive loop and ours."""
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
        repeats, device = self.given.repeats, self.given.device
        timed = {name: work for name, (_, work) in works.items()}
        times = harness.alternate(timed, repeats, device, "query and peers", warm_up=False)
        whole = {name: harness.scaled(times[name], factor) for name, (factor, _) in works.items()}
        # Two products give the gains of four, in half the time.
        naive = select_naively(
            self.rows, self.n_instances, self.fisher, gains_with_two_products, show=True
        )
        ours = {name: [run[name] for run in self.ours] for name in self.ours[0]}
        # F lies between the two; the authors' way is not charged for it.
        between = ours.get("fisher", [0.0] * repeats)
        ours["embedding and selection"] = add(ours["embedding"], between, ours["selection"])
        sides = {side: other_way(whole, side) for side in ("authors'", "kinder")}
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
        targets = [
            harness.at_least(
                f"{step}: times less than the authors' way", ratios["authors'"][step], 100
            )
            for step in ("embedding", "selection", "embedding and selection")
        ]
        what, n_common = "images in common with the authors' batch", same["n_common"]
        wanted = f"all {self.n_instances}"
        targets.append(harness.target(what, n_common, wanted, same["same_batch"]))
        return {
            "sizes": self.case.sizes
            | {key: v for key, v in self.sampler.query_info_.items() if key != "seconds"}
            | {
                "K": self.n_instances,
                "batch": BATCH_SIZE,
                "n_mask_samples": PUBLISHED["n_mask_samples"],
            },
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


def other_way(whole: dict[str, list[float]], side: str) -> dict[str, list[float]]:
    """Return the seconds of the steps of another way to the same query."""
    steps = ("diagonal", "embedding", "selection")
    theirs = {step: whole[f"{side} {step}"] for step in steps}
    return theirs | {
        "embedding and selection": add(theirs["embedding"], theirs["selection"]),
        "total": add(*theirs.values()),
    }


def add(*parts: Sequence[float]) -> list[float]:
    return [sum(values) for values in zip(*parts, strict=True)]


def over_samples(given: argparse.Namespace, case: harness.ImageCase) -> dict[str, Any]:
    """Measure the growth of the whole query with the pool."""
    sizes = (16, 32) if given.quick else (500, 1000, 2000, 4000)
    n_instances = 2 if given.quick else 50
    few = {"n_mask_samples": 16}
    sampler = FisherMaskSampler(**PUBLISHED | few, batch_size=BATCH_SIZE, random_state=0)
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
        "few samples for the diagonal: its cost does not depend on the pool",
    )


def few_images(given: argparse.Namespace) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Measure a large network on few samples: their rows are fewer than masked parameters."""
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
    sampler = FisherMaskSampler(**PUBLISHED, random_state=0)
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


def measure(given: argparse.Namespace) -> dict[str, Any]:
    # Before anything else has taken memory, because its peak is told.
    few, few_targets = few_images(given)
    headline = Headline(given)
    query, targets = headline.measure()
    growth = over_samples(given, headline.case)
    return {
        **harness.surroundings(given),
        "query": query,
        "few images": few,
        "sweeps": [growth],
        "targets": [
            *targets,
            *few_targets,
            harness.about_linear("query over N, exponent", growth),
        ],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = harness.options(__doc__ or "", "query", repeats=3)
    given = parser.parse_args(arguments)
    harness.write(given.out, "query", measure(given))


if __name__ == "__main__":
    main()
