"""What a greedy step costs, beside the naive one and beside one product of the embeddings.

Run from the root of the repository::

    python -m benchmarks.speed.selection
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from benchmarks.common import harness
from benchmarks.common.harness import BATCH_SIZE
from benchmarks.speed.embedding import make_mask
from skfishermask import ParameterMask, fisher_diagonal, fisher_embedding, select_batch
from skfishermask.fisher import fisher_matrix, predicted_means

# Candidates that the naive step takes at a time.
CHUNK = 100
# The floor is the mean of this number of products: a single one is too short to time.
N_PRODUCTS = 10
Gains = Callable[[Tensor, Tensor, Tensor], Tensor]


def gains_as_published(v: Tensor, inverse: Tensor, fisher: Tensor) -> Tensor:
    """Compute gains from left to right: four products with (k, k)."""
    eye = torch.eye(v.shape[1], dtype=v.dtype, device=v.device)
    middle = torch.linalg.inv(eye + v @ inverse @ v.mT)
    return (v @ inverse @ fisher @ inverse @ v.mT @ middle).diagonal(dim1=1, dim2=2).sum(1)


def gains_with_two_products(v: Tensor, inverse: Tensor, fisher: Tensor) -> Tensor:
    """Compute the same gains, with V M^-1 kept."""
    eye = torch.eye(v.shape[1], dtype=v.dtype, device=v.device)
    x = v @ inverse
    return torch.einsum("nij,nji->n", x @ fisher @ x.mT, torch.linalg.inv(eye + x @ v.mT))


def select_naively(
    embedding: Tensor,
    n_instances: int,
    fisher: Tensor,
    gains: Gains = gains_as_published,
    show: bool = False,
) -> list[int]:
    """Choose greedily from M = I, with every embedding multiplied by M^-1 at every step."""
    inverse = torch.eye(len(fisher), dtype=embedding.dtype, device=embedding.device)
    fisher = fisher.to(embedding.dtype)
    chosen: list[int] = []
    for _ in tqdm(range(n_instances), desc="naive selection", disable=not show):
        values = torch.cat([gains(v, inverse, fisher) for v in embedding.split(CHUNK)])
        values[chosen] = -math.inf
        chosen.append(int(values.argmax()))
        x = embedding[chosen[-1]] @ inverse
        eye = torch.eye(len(x), dtype=x.dtype, device=x.device)
        inverse = inverse - x.T @ torch.linalg.inv(eye + x @ embedding[chosen[-1]].T) @ x
    return chosen


def authors_rows(
    module: nn.Module, batches: Sequence[Tensor], mask: ParameterMask, **options: Any
) -> Tensor:
    """Return rows sqrt(p_c) g_c, one for each class, in float64: the same V^T V from C rows.

    Their values are the naive loop's, which benchmarks.speed.query checks; all of them are made in
    our way.
    """
    rows = fisher_embedding(module, batches, mask, weighting="none", **options)
    p = predicted_means(module, batches, **options).sort(1, descending=True).values
    return rows.double() * p.sqrt()[:, :, None]


class Pool:
    """Embedded images, of which sweeps take the first candidates and the largest columns.

    The images are small, so that there can be many: a greedy step does not see them.
    """

    def __init__(self, given: argparse.Namespace, n: int, n_classes: int, k: int) -> None:
        case = harness.ImageCase.make(given, n, n_classes, size=16)
        self.sizes = case.sizes
        self.module = case.net.module_
        self.batches = torch.as_tensor(case.pool, device=given.device).split(BATCH_SIZE)
        diagonal = fisher_diagonal(self.module, self.batches[:4], n_directions=1)
        self.mask = make_mask(diagonal, k)
        shown = tqdm(self.batches, desc=f"embedding, C = {n_classes}")
        self.embedding = fisher_embedding(self.module, shown, self.mask)
        self._largest = self.embedding.square().sum((0, 1)).argsort(descending=True)

    def take(self, n: int, k: int) -> Tensor:
        """Return the first n candidates at the k columns with most Fisher information."""
        columns = self._largest[:k].sort().values
        return self.embedding[:n, :, columns].contiguous()


class Steps:
    """Return what is timed for a greedy step: selections of one sample and of many."""

    def __init__(self, embedding: Tensor, n_instances: int) -> None:
        self.embedding = embedding
        self.fisher = fisher_matrix(embedding)
        self.n_instances = n_instances

    def works(self, name: str) -> dict[str, harness.Work]:
        return {
            f"{name}: 1": lambda: select_batch(self.embedding, 1, self.fisher),
            f"{name}: {self.n_instances}": lambda: select_batch(
                self.embedding, self.n_instances, self.fisher
            ),
        }

    def a_step(self, name: str, times: Mapping[str, Sequence[float]]) -> list[float]:
        """Compute the seconds of each step after the first, which has the start in it."""
        # At tiny sizes noise can leave less than nothing.
        return [
            max(many - one, 1e-9) / (self.n_instances - 1)
            for one, many in zip(
                times[f"{name}: 1"], times[f"{name}: {self.n_instances}"], strict=True
            )
        ]

    def floor(self) -> None:
        """Return products of the stacked embeddings (n r, k) with a (k, 2 r) matrix."""
        _, r, k = self.embedding.shape
        factors = self.embedding.new_ones((k, 2 * r))
        for _ in range(N_PRODUCTS):
            self.embedding.view(-1, k) @ factors


def a_naive_step(embedding: Tensor, gains: Gains) -> harness.Work:
    fisher = fisher_matrix(embedding)
    return lambda: select_naively(embedding, 1, fisher, gains)


def peers(given: argparse.Namespace, pool: Pool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Measure seconds a step: ours, the floor, and naive steps on some candidates, scaled.

    And the target that follows.
    """
    n, k, n_instances = (20, 100, 5) if given.quick else (2000, 1403, 100)
    n_naive = 10 if given.quick else 400
    ours = Steps(pool.take(n, k), n_instances)
    few = -(-n_naive // BATCH_SIZE)
    columns = pool._largest[:k].sort().values
    theirs = authors_rows(pool.module, pool.batches[:few], pool.mask)[:n_naive, :, columns]
    naive = {
        "naive, as published": a_naive_step(theirs.contiguous(), gains_as_published),
        "naive, float32, two products": a_naive_step(
            theirs.float().contiguous(), gains_with_two_products
        ),
    }
    works = {**ours.works("ours"), "floor": ours.floor, **naive}
    times = harness.alternate(works, given.repeats, given.device, "peers")
    a_step = {
        "skfishermask": ours.a_step("ours", times),
        "floor": harness.scaled(times["floor"], 1 / N_PRODUCTS),
        **{name: harness.scaled(times[name], n / n_naive) for name in naive},
    }
    whole = harness.scaled(times[f"ours: {n_instances}"], 1 / n_instances)
    over_floor = harness.ratio(a_step["skfishermask"], a_step["floor"])
    return {
        "sizes": {"N": n, "r": ours.embedding.shape[1], "k": k, "K": n_instances},
        "naive candidates": n_naive,
        "seconds a step": {name: harness.spread(values) for name, values in a_step.items()},
        "ratio to ours": {
            name: harness.ratio(values, a_step["skfishermask"]) for name, values in a_step.items()
        },
        "start, seconds": harness.spread(times["ours: 1"]),
        "with the start, in floors a step": harness.ratio(whole, a_step["floor"]),
    }, harness.at_most(
        f"greedy step of {n:,} candidates with k = {k:,}, in floors", over_floor, 1.6
    )


def steps_over(
    given: argparse.Namespace,
    over: str,
    embeddings: Mapping[int, Tensor],
    fixed: Mapping[str, Any],
    naive: int = 0,
    note: str = "",
) -> dict[str, Any]:
    """Measure the growth of a greedy step, and of a naive one on `naive` candidates, if any.

    And the step over the floor, size by size.
    """
    n_instances = 3 if given.quick else 100
    steps = {size: Steps(V, n_instances) for size, V in embeddings.items()}
    works: dict[str, harness.Work] = {}
    for size, step in steps.items():
        works |= step.works(str(size))
        works[f"{size}: floor"] = step.floor
        if naive:
            works[f"{size}: naive"] = a_naive_step(step.embedding[:naive], gains_with_two_products)
    times = harness.alternate(
        works, given.repeats, given.device, f"step over {over}", warm_up=False
    )
    lines = {
        "greedy step": [step.a_step(str(size), times) for size, step in steps.items()],
        "floor": [harness.scaled(times[f"{size}: floor"], 1 / N_PRODUCTS) for size in steps],
    }
    if naive:
        lines["naive step, float32, two products"] = [
            harness.scaled(times[f"{size}: naive"], len(step.embedding) / naive)
            for size, step in steps.items()
        ]
    in_floors = [
        harness.ratio(*both) for both in zip(lines["greedy step"], lines["floor"], strict=True)
    ]
    growth = harness.sweep("greedy step", over, [*steps], lines, {**fixed, "K": n_instances}, note)
    return {**growth, "in floors": in_floors}


def over_batch(given: argparse.Namespace, pool: Pool) -> dict[str, Any]:
    """Measure the growth of the selection with the batch, where steps outweigh the start."""
    n, k = (20, 60) if given.quick else (2000, 500)
    sizes = (2, 4) if given.quick else (100, 200, 400, 800)
    embedding = pool.take(n, k)
    fisher = fisher_matrix(embedding)
    works = {f"K = {K}": (lambda K=K: select_batch(embedding, K, fisher)) for K in sizes}
    times = harness.alternate(works, given.repeats, given.device, "selection over K", warm_up=False)
    return harness.sweep(
        "selection",
        "K",
        sizes,
        {"selection": [*times.values()]},
        {"N": n, "r": embedding.shape[1], "k": k},
        "a small mask and many picks, so that the picks outweigh the start",
    )


def over_classes(given: argparse.Namespace) -> dict[str, Any]:
    classes = (3, 5) if given.quick else (5, 9, 17, 33)
    n, k = (12, 100) if given.quick else (500, 1403)
    embeddings = {C: Pool(given, n, C, k).take(n, k) for C in classes}
    note = "the two factors of the product and the blocks of each candidate both grow with r"
    return steps_over(given, "C", embeddings, {"N": n, "k": k}, note=note)


def equal_rows(given: argparse.Namespace, pool: Pool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Time pools of candidates that are all equal, or all zero, beside one where they differ."""
    n, k, n_instances = (20, 60, 3) if given.quick else (2000, 500, 20)
    V = pool.take(n, k)
    pools = {"different": V, "equal": V[:1].expand_as(V).contiguous(), "zero": V * 0}
    works = {
        name: partial(select_batch, rows, n_instances, fisher_matrix(rows))
        for name, rows in pools.items()
    }
    times = harness.alternate(works, given.repeats, given.device, "pools of equal candidates")
    ratios = {name: harness.ratio(values, times["different"]) for name, values in times.items()}
    worst = max((ratios["equal"], ratios["zero"]), key=lambda found: found["median"])
    what = f"selection from {n:,} equal candidates, over one from different ones"
    return {
        "sizes": {"N": n, "r": V.shape[1], "k": k, "K": n_instances},
        "seconds": {name: harness.spread(values) for name, values in times.items()},
        "ratio to different ones": ratios,
    }, harness.at_most(what, worst, 3)


def measure(given: argparse.Namespace) -> dict[str, Any]:
    n, k = (24, 1400) if given.quick else (8000, 8000)
    pool = Pool(given, n, 10, k)
    fixed = {"C": 10, "r": pool.embedding.shape[1]}
    samples = (12, 24) if given.quick else (1000, 2000, 4000, 8000)
    masks = (50, 100) if given.quick else (2000, 4000, 8000)
    beside, target = peers(given, pool)
    k_sweep = steps_over(
        given,
        "k",
        {k: pool.take(n // 2, k) for k in masks},
        {**fixed, "N": n // 2},
        naive=100,
        note="a step is a part that grows with k and one that does not; with smaller masks the "
        "second weighs more, and the slope is less",
    )
    by_samples = {n: pool.take(n, k // 2) for n in samples}
    n_sweep = steps_over(given, "N", by_samples, {**fixed, "k": k // 2})
    large = f"greedy step of {n:,} candidates with k = {k // 2:,}, in floors"
    batch_sweep = over_batch(given, pool)
    equal, equal_target = equal_rows(given, pool)
    return {
        **harness.surroundings(given),
        "sizes": pool.sizes,
        "peers": beside,
        "equal candidates": equal,
        "sweeps": [k_sweep, n_sweep, over_classes(given), batch_sweep],
        "targets": [
            target,
            harness.at_most(large, n_sweep["in floors"][-1], 1),
            equal_target,
            harness.about_linear("greedy step over k, exponent", k_sweep),
            harness.about_linear("selection over K, exponent", batch_sweep),
        ],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    given = harness.options(__doc__ or "", "selection", repeats=3).parse_args(arguments)
    harness.write(given.out, "selection", measure(given))


if __name__ == "__main__":
    main()
