"""How many labels does each query strategy need? One setting of the study a call.

Every strategy starts from the same initial samples and the same initial weights in every seed,
and trains from scratch after each query. A seed draws its own pool and test set. Results go into
a folder for the setting: ``results.csv`` with a row for each seed, strategy and number of labels,
``setting.json`` with everything that was set and the versions, and ``curves.png``. Called again,
with more seeds or strategies for instance, it computes what the table does not have; what a stopped
run had of a strategy is in a checkpoint beside it.

Run from the root of the repository::

    python -m benchmarks.study.run --dataset digits --n-instances 20 --seeds 8
    python -m benchmarks.study.run --dataset fashion-mnist --data-dir ~/data --download \
        --imbalance 50 --strategies random entropy BADGE FisherMask
    python -m benchmarks.study.run --study --data-dir output/data --first-seed 1 --seeds 8

The last runs the settings on pretrained features and on tabular data, seed by seed: all settings
and strategies with the first seed, then with the next, and so on. The files are made by
``benchmarks.study.data``; with ``--out benchmarks/results/label_efficiency`` the
committed results grow.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import traceback
from functools import partial
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from sklearn.datasets import load_digits
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score
from tqdm.auto import tqdm

from benchmarks.common.fast_heads import FAST_NETS, make_fast_net
from benchmarks.common.networks import NETWORKS, SeveralTrainings, make_net
from benchmarks.study.results import CANDIDATES, PUBLISHED
from benchmarks.study.strategies import PEERS, STRATEGIES
from skfishermask import ActiveLearningCurveDisplay, active_learning_curve

METRICS = {
    "accuracy": accuracy_score,
    "balanced_accuracy": balanced_accuracy_score,
    "f1_macro": partial(f1_score, average="macro"),
}
COLUMNS = ["strategy", "seed", "n_labeled", *METRICS, "fit_time", "query_time"]
# How first labels are drawn. Results that do not say it began with at least one of each class.
INITIAL = ("stratified", "random", "coverage")
SETTINGS = [
    "imbalance",
    "initial",
    "n_initial",
    "n_instances",
    "n_queries",
    "network",
    "pool_size",
    "test_size",
    "trainings",
]
# Data set, network, imbalance, first labels with batches of 20 and of 100.
KINDS = [
    ("cifar10-features", "mlp16", 50, 20, 100),
    ("cifar10-components", "linear", 50, 20, 100),
    ("wordnet", "mlp16", 50, 20, 100),
    ("letter", "mlp16", 100, 26, 100),
]
STUDY = [
    {
        "dataset": dataset,
        "network": network,
        "imbalance": ratio,
        "n_initial": few if n_instances == 20 else many,
        "n_instances": n_instances,
        "n_queries": n_queries,
        "pool_size": 2000,
        "test_size": 2600,
        "trainings": 1,
    }
    for n_instances, n_queries in ((20, 4), (100, 2))
    for dataset, network, imbalance, few, many in KINDS
    for ratio in (1, imbalance)
]
STUDIED = list(dict.fromkeys([*PEERS, PUBLISHED, *chain(*CANDIDATES)]))
PACKAGES = ["skfishermask", "torch", "scikit-learn", "skorch", "numpy", "scikit-activeml"]


def load(dataset: str, data_dir: Path, download: bool) -> tuple[np.ndarray, np.ndarray, int]:
    """Load images (n, channels, height, width) in [0, 1], labels, and the number for training.

    Of digits, which has no test set of its own, the number is that of all.
    """
    if dataset == "digits":
        X, y = load_digits(return_X_y=True)
        return (X / 16).astype("float32").reshape(-1, 1, 8, 8), y, len(y)
    if dataset in ("fashion-mnist", "cifar10"):
        from torchvision.datasets import CIFAR10, FashionMNIST

        kind = FashionMNIST if dataset == "fashion-mnist" else CIFAR10
        parts = [kind(data_dir, train=train, download=download) for train in (True, False)]
        X = np.concatenate([np.asarray(part.data) for part in parts])
        y = np.concatenate([np.asarray(part.targets) for part in parts])
        n_train = len(parts[0])
    else:
        arrays = np.load(dataset)
        X = np.concatenate([arrays["X_train"], arrays["X_test"]])
        y = np.concatenate([arrays["y_train"], arrays["y_test"]]).astype("int64")
        n_train = len(arrays["y_train"])
    if X.ndim == 3:
        X = X[..., None]
    X = np.moveaxis(X, -1, 1)
    return (X / 255 if X.dtype == np.uint8 else X).astype("float32"), y, n_train


def long_tail(n_classes: int, largest: int, ratio: float) -> np.ndarray:
    """Return class sizes that fall exponentially from `largest` to `largest` / `ratio`."""
    sizes = largest * ratio ** (-np.arange(n_classes) / (n_classes - 1))
    return np.maximum(1, sizes.round().astype(int))


def make_split(
    y: np.ndarray, n_train: int, seed: int, pool_size: int, test_size: int, imbalance: float
) -> tuple[np.ndarray, np.ndarray]:
    """Draw rows of the pool, balanced or long-tailed, and of a balanced test set."""
    rng = np.random.default_rng(seed)
    classes = np.unique(y)
    rows = {c: rng.permutation(np.flatnonzero(y == c)) for c in classes}
    per_class = test_size // len(classes)
    if n_train == len(y):
        test = {c: rows[c][:per_class] for c in classes}
        pool = {c: rows[c][per_class:] for c in classes}
    else:
        test = {c: rows[c][rows[c] >= n_train][:per_class] for c in classes}
        pool = {c: rows[c][rows[c] < n_train] for c in classes}
    profile = long_tail(len(classes), 1_000_000, imbalance) / 1_000_000
    largest = min(pool_size / profile.sum(), min(len(part) for part in pool.values()))
    sizes = dict(
        zip(rng.permutation(classes), np.maximum(1, (largest * profile).astype(int)), strict=True)
    )
    chosen = [pool[c][: sizes[c]] for c in classes]
    return np.sort(np.concatenate(chosen)), np.sort(np.concatenate(list(test.values())))


def mean_scores(several: SeveralTrainings, X: Any, y: np.ndarray) -> dict[str, float]:
    """Compute each metric, averaged over the trainings."""
    predicted = [net.predict(X) for net in several.estimators_]
    return {
        name: float(np.mean([metric(y, p) for p in predicted])) for name, metric in METRICS.items()
    }


def slug(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name.lower()).strip("_")


def setting_name(options: argparse.Namespace) -> str:
    if hasattr(options, "name"):
        return options.name
    balance = "balanced" if options.imbalance == 1 else f"{options.imbalance:g}to1"
    dataset = slug(Path(options.dataset).stem)
    return f"{dataset}_{balance}_{options.n_instances}"


def read_results(folder: Path) -> pd.DataFrame:
    """Load the rows there are, maybe none."""
    file = folder / "results.csv"
    return pd.read_csv(file) if file.exists() else pd.DataFrame(columns=COLUMNS)


def add_results(folder: Path, name: str, seed: int, result: dict[str, np.ndarray]) -> None:
    """Add a strategy's run with one seed to the table."""
    rows = pd.DataFrame(
        {"strategy": name, "seed": seed, "n_labeled": result["n_labeled"]}
        | {metric: result[f"test_{metric}"][0].round(6) for metric in METRICS}
        | {
            "fit_time": result["fit_time"][0].round(4),
            # After the last training there is no query.
            "query_time": np.append(result["query_time"][0], np.nan).round(4),
        }
    )
    table = read_results(folder)
    new = folder / "results.csv.new"
    (pd.concat([table, rows]) if len(table) else rows).to_csv(new, index=False)
    new.replace(folder / "results.csv")


def write_setting(folder: Path, options: argparse.Namespace) -> None:
    """Write what all results of a folder have in common, and what computed the latest."""
    machine = {
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
    }
    content = {
        **what_is_set(options),
        "machine": machine,
        "versions": {package: version(package) for package in PACKAGES},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "setting.json").write_text(json.dumps(content, indent=1) + "\n")


def what_is_set(options: argparse.Namespace) -> dict[str, Any]:
    """Return what results in one table have in common."""
    names = {name: getattr(options, name) for name in SETTINGS}
    return {"dataset": Path(options.dataset).stem, **names}


def check_setting(folder: Path, options: argparse.Namespace) -> None:
    """Refuse to add to results of another setting."""
    file = folder / "setting.json"
    if file.exists():
        old = {"initial": INITIAL[0]} | json.loads(file.read_text())
        new = what_is_set(options)
        other = {name: (old[name], value) for name, value in new.items() if old[name] != value}
        if other:
            raise SystemExit(f"{folder} has results with (theirs, yours): {other}.")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--dataset", default="digits", help="digits, fashion-mnist, cifar10 or a file .npz with "
        "X_train, y_train, X_test, y_test")  # fmt: skip
    add("--data-dir", type=Path, default=Path("output/data"), help="where torchvision's data lie")
    add("--download", action="store_true", help="let torchvision download them")
    add("--imbalance", type=float, default=1, help="largest class of the pool over the smallest")
    add("--study", action="store_true", help="run the settings of the study, not one of your own")
    add("--strategies", nargs="+", default=STUDIED, choices=[*STRATEGIES],
        metavar="NAME", help=f"of: {', '.join(STRATEGIES)}")  # fmt: skip
    add("--seeds", type=int, default=4, help="paired repeats (default: 4)")
    add("--first-seed", type=int, default=0, help="the lowest of them (default: 0)")
    add("--n-initial", type=int, default=20)
    add("--initial", choices=INITIAL, default=INITIAL[0],
        help="first labels: by class, at random, or such that they cover the inputs")  # fmt: skip
    add("--n-instances", type=int, default=20, help="labels a query (default: 20)")
    add("--n-queries", type=int, default=5)
    add("--pool-size", type=int, default=1000)
    add("--test-size", type=int, default=500)
    add("--network", default="cnn", choices=[*NETWORKS, *FAST_NETS])
    add("--trainings", type=int, default=1, help="trainings a labelled set, scores averaged")
    add("--device", default="cpu")
    add("--out", type=Path, default=Path("output/label_efficiency"))
    return parser.parse_args()


def first_labels(options: argparse.Namespace, pool: np.ndarray, seed: int) -> dict[str, Any]:
    """Return the arguments of `active_learning_curve` for the first labels."""
    if options.initial == "random":
        rng = np.random.default_rng(seed)
        return {"n_initial": rng.choice(pool, options.n_initial, replace=False)}
    initial = "coverage" if options.initial == "coverage" else "random"
    return {"n_initial": options.n_initial, "initial": initial}


def run(options: argparse.Namespace, seed: int) -> None:
    """Run all strategies in one setting with one seed, but for those that have results.

    A strategy that fails is reported and left out, so that it stops no others.
    """
    folder = options.out / setting_name(options)
    check_setting(folder, options)
    table = read_results(folder)
    names = [n for n in options.strategies if n not in {*table.strategy[table.seed == seed]}]
    if not names:
        return
    X, y, n_train = load(options.dataset, options.data_dir, options.download)
    split = make_split(y, n_train, seed, options.pool_size, options.test_size, options.imbalance)
    make = make_fast_net if options.network in FAST_NETS else make_net
    net = make(options.network, X.shape[1:], len(np.unique(y)), options.device)
    first = first_labels(options, split[0], seed)
    for name in tqdm(names, desc=f"{folder.name}, seed {seed}", unit="strategy"):
        strategy = STRATEGIES[name]
        try:
            result = active_learning_curve(
                SeveralTrainings(net, options.trainings),
                X,
                y,
                # A class is one that has to know the labels.
                query_strategy=strategy(X, y, split) if isinstance(strategy, type) else strategy,
                **first,
                n_instances=options.n_instances,
                n_queries=options.n_queries,
                cv=[split],
                scoring=mean_scores,
                random_state=seed,
                checkpoint=folder / "checkpoint" / f"{slug(name)}_{seed}",
                return_indices=True,
            )
        except Exception:  # a peer may raise anything
            print(f"{folder.name}, seed {seed}, {name}:\n{traceback.format_exc()}")
            continue
        # The same for all strategies: found once.
        first = {"n_initial": result["indices"][0][: options.n_initial]}
        write_setting(folder, options)
        add_results(folder, name, seed, result)


def show(options: argparse.Namespace) -> None:
    """Draw the curves of a setting, and print their means."""
    folder = options.out / setting_name(options)
    table = read_results(folder)
    curves = {}
    for name in options.strategies:
        part = table[table.strategy == name].pivot(
            index="seed", columns="n_labeled", values="accuracy"
        )
        curves[name] = {"n_labeled": part.columns.to_numpy(), "test_accuracy": part.to_numpy()}
    display = ActiveLearningCurveDisplay.from_results(
        curves, score_name="test_accuracy", band="sem"
    )
    display.figure_.savefig(folder / "curves.png", dpi=150)
    plt.close(display.figure_)
    print(f"\n{'mean accuracy over the curve':<45}{'mean':>8}{'- random':>12}{'s.e.':>8}")
    means = table.groupby(["strategy", "seed"], sort=False).accuracy.mean().unstack(0)
    for name in options.strategies:
        line = f"{name:<45}{means[name].mean():>8.4f}"
        if "random" in means and name != "random":
            difference = (means[name] - means["random"]).dropna()
            line += f"{difference.mean():>+12.4f}{difference.sem():>8.4f}"
        print(line)


def main() -> None:
    options = parse()
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    if options.study:
        for seed in seeds:
            for setting in STUDY:
                file = str(options.data_dir / f"{setting['dataset']}.npz")
                run(argparse.Namespace(**vars(options) | setting | {"dataset": file}), seed)
        return
    for seed in seeds:
        run(options, seed)
    show(options)


if __name__ == "__main__":
    main()
