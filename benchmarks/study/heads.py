"""The third round of the study: heads that are fitted in milliseconds, in many settings.

Run from the root of the repository, with the files of ``benchmarks.study.data`` and torchvision's
Fashion-MNIST in one folder::

    python -m benchmarks.study.heads --list
    python -m benchmarks.study.heads --data-dir output/data --seeds 20
    python -m benchmarks.study.heads --settings 'ridge_wordnet*' 'first*' --seeds 20

``protocol.md`` says what the settings and strategies are for. Results are those of
``benchmarks.study.run``: for each setting a folder with ``setting.json`` and ``results.csv``, a row
for each strategy, seed and number of labels. What is there is not computed again. Two processes at
a time need different settings.
"""

from __future__ import annotations

import argparse
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.base import clone
from sklearn.metrics import balanced_accuracy_score

from benchmarks.common.fast_heads import RidgeNet
from benchmarks.study.peers import dcom, refine
from benchmarks.study.results import DEFAULT, PUBLISHED
from benchmarks.study.run import run, slug
from benchmarks.study.strategies import STRATEGIES, drawn_seed, fisher
from skfishermask.data.unwrap import unwrap

RESULTS = Path("benchmarks/results/label_efficiency_heads")
RIDGE, MLP = "ridge", "mlp16 full batch"
KINDS = [
    (RIDGE, "cifar10-features"),
    (RIDGE, "wordnet"),
    (RIDGE, "wordnet-verbs"),
    (RIDGE, "fashion-mnist"),
    (MLP, "cifar10-features"),
    (MLP, "wordnet"),
    (MLP, "letter"),
    (MLP, "satimage"),
    (MLP, "texture"),
]
RATIOS = (1, 50)
INITIAL = ("coverage", "random")
# First labels, labels a batch, batches.
CURVES = [(20, 10, 10), (100, 20, 5), (20, 100, 3), (100, 10, 10), (20, 20, 5), (100, 100, 3)]
LONG = (100, 100, 10)
LONG_KINDS = [
    (RIDGE, "cifar10-features"),
    (RIDGE, "wordnet"),
    (MLP, "cifar10-features"),
    (MLP, "letter"),
]
ORACLE = "oracle"
ALONE = "FisherMask, coverage alone"
COMPARED = [
    "random",
    "margin",
    "UHerding, radius 1",
    "MaxHerding",
    "BAIT Binary",
    "REFINE",
    "DCoM",
    PUBLISHED,
    DEFAULT,
    ALONE,
    ORACLE,
]
N_DRAWN = 50  # batches of the oracle


class Oracle:
    """The best of 50 random batches, by the accuracy on the test set after training on each.

    Parameters
    ----------
    X, y : ndarray
        All samples and labels.
    split : tuple of ndarray of int
        Rows of the pool and of the test set.
    """

    def __init__(self, X: np.ndarray, y: np.ndarray, split: tuple[np.ndarray, np.ndarray]) -> None:
        pool, test = split
        self.labels = {x.tobytes(): label for x, label in zip(X[pool], y[pool], strict=True)}
        self.X_test, self.y_test = X[test], y[test]

    def __call__(self, learner: Any, X_pool: Any, n_instances: int = 1) -> np.ndarray:
        net = unwrap(learner).net
        again = clone(net)
        if isinstance(net, RidgeNet):
            again.set_params(penalty=net.penalty_)
        labels = np.array([self.labels[x.tobytes()] for x in X_pool])
        rng = np.random.default_rng(drawn_seed())
        seed = int(rng.integers(2**31))
        best, best_score = np.arange(n_instances), -1.0
        for _ in range(N_DRAWN):
            batch = rng.choice(len(X_pool), n_instances, replace=False)
            X = np.concatenate([learner.X_training, X_pool[batch]])
            y = np.concatenate([learner.y_training, labels[batch]])
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)  # the same weights to begin with
                again.fit(X, y)
            score = balanced_accuracy_score(self.y_test, again.predict(self.X_test))
            if score > best_score:
                best, best_score = batch, score
        return best


STRATEGIES.update({ALONE: fisher(coverage_share=1), "REFINE": refine, "DCoM": dcom, ORACLE: Oracle})


def setting(
    kind: tuple[str, str], ratio: int, initial: str, sizes: tuple[int, int, int], part: str = ""
) -> dict[str, Any]:
    network, dataset = kind
    n_initial, n_instances, n_queries = sizes
    balance = "balanced" if ratio == 1 else f"{ratio}to1"
    name = slug(f"{part} {network.split()[0]} {dataset} {balance} {initial}")
    return {
        "name": f"{name}_{n_initial}_{n_queries}x{n_instances}",
        "dataset": dataset,
        "network": network,
        "imbalance": ratio,
        "initial": initial,
        "n_initial": n_initial,
        "n_instances": n_instances,
        "n_queries": n_queries,
        "pool_size": 2000,
        "test_size": 2600,
        "trainings": 1,
    }


def all_settings() -> list[dict[str, Any]]:
    """Return the settings of the curves, of long curves, and of first batches alone."""
    found = []
    for i, kind in enumerate(KINDS):
        for j, ratio in enumerate(RATIOS):
            sizes = CURVES[(i + j) % len(CURVES)]
            found += [setting(kind, ratio, initial, sizes) for initial in INITIAL]
    for kind in LONG_KINDS:
        found += [setting(kind, ratio, "coverage", LONG, "long") for ratio in RATIOS]
    for kind in KINDS:
        for ratio in RATIOS:
            for n in (20, 100):
                # One query, which any curve has; the row with n labels is of interest.
                found += [setting(kind, ratio, i, (n, 1, 1), "first") for i in INITIAL]
    return found


def strategies_of(setting: dict[str, Any]) -> list[str]:
    """Return those that run: one where the first batch decides, not the slowest in long curves."""
    if setting["name"].startswith("first"):
        return ["random"]
    slowest = {ORACLE, PUBLISHED} if setting["name"].startswith("long") else set()
    return [n for n in COMPARED if n not in slowest]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data-dir", type=Path, default=Path("output/data"))
    add("--settings", nargs="+", default=["*"], metavar="PATTERN", help="names, with wildcards")
    add("--strategies", nargs="+", default=COMPARED, choices=COMPARED, metavar="NAME")
    add("--first-seed", type=int, default=50, help="as registered: 50")
    add("--seeds", type=int, default=20)
    add("--out", type=Path, default=RESULTS)
    add("--list", action="store_true", help="print the names of the settings")
    options = parser.parse_args()
    chosen = [s for s in all_settings() if any(fnmatch(s["name"], p) for p in options.settings)]
    if not chosen:
        raise SystemExit(f"No setting is called {' or '.join(options.settings)}; see --list.")
    if options.list:
        print(*(s["name"] for s in chosen), sep="\n")
        return
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        for some in chosen:
            dataset = some["dataset"]
            if dataset != "fashion-mnist":
                dataset = str(options.data_dir / f"{dataset}.npz")
            names = [n for n in strategies_of(some) if n in options.strategies]
            given = vars(options) | some | {"dataset": dataset, "strategies": names}
            run(argparse.Namespace(**given, device="cpu", download=False), seed)


if __name__ == "__main__":
    main()
