"""The values of the page on label efficiency, from the committed results.

``docs/label_efficiency.rst`` is the template that shows them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats
from sklearn.metrics import roc_auc_score

from benchmarks.study import foreign, third_round, three_clusters
from benchmarks.study.results import (
    CANDIDATES,
    DEFAULT,
    FIRST,
    MIN_SEEDS,
    OF_PIXELS,
    PUBLISHED,
    RANDOM,
    REDUCED,
    Comparison,
    Setting,
    bootstrap,
    by_kind,
    compare,
    compared_strategies,
    is_ours,
    load,
    of_study,
    regrets,
    standard_error,
)

NETWORKS_ON_PIXELS = {
    "cnn": "Small network from scratch",
    "mlp16 behind pixels": "MLP head on features",
    "linear behind pixels": "Linear head on features",
}
# Strategies for numbers and several labels a sample, and one of each that the other has not.
ON_FISHER, ON_COVERAGE = "FisherMask", "coverage alone"
K_CENTER, MEAN_ENTROPY = "k-center", "mean entropy"
STOPPING = "stopping.csv"
N_BATCHES_AHEAD = 5
# A gain in accuracy below which one would rather stop.
WORTHWHILE_GAIN = 0.02
# What is known before a batch is labelled: the smaller, the nearer the end should be.
SIGNALS: dict[str, Callable[[pd.DataFrame], pd.Series]] = {
    "relative fall of the objective by the batch": lambda t: 1 - t.after / t.before,
    "the objective, tr(M^-1 F)": lambda t: t.before,
    "mean margin uncertainty of the pool": lambda t: t.uncertainty,
    "number of labels, the fewer the larger": lambda t: -t.n_labeled,
}


@dataclass(frozen=True)
class Round:
    """A round of the protocol: candidates for the default, and the seeds that decide."""

    candidates: list[str]
    seeds: range
    seeds_of_first_study: range = range(0)

    def scores(self, setting: Setting) -> pd.DataFrame:
        """Return scores by seed, of all strategies that ran with the seeds of the round."""
        first = setting.info["dataset"] in FIRST
        seeds = self.seeds_of_first_study if first else self.seeds
        names = [n for n in setting.means if not is_ours(n) or n in (PUBLISHED, *self.candidates)]
        scores = setting.means[names].filter(seeds, axis=0)
        return scores.dropna(axis=1, how="all").dropna()


# Seed 0 was looked at before the protocol was written.
ROUNDS = [
    Round(CANDIDATES[0], range(1, 13)),
    Round(CANDIDATES[1], range(13, 25), range(101, 113)),
]


def outcomes(settings: Sequence[Setting], peers: Sequence[str]) -> dict[str, list[str]]:
    """Sort peers by the verdict on the default: better, worse or open."""
    found: dict[str, list[str]] = {"better": [], "open": [], "worse": []}
    for name in peers:
        found[compare(settings, DEFAULT, name).verdict].append(name)
    return found


def reduced(folder: Path) -> dict[str, Any] | None:
    """Compute what the default sizes change in accuracy; None where they did not run.

    Parameters
    ----------
    folder : Path
        Of all results, ``benchmarks/results``.
    """
    settings = of_study(load(folder / "label_efficiency"))
    settings = [s for s in settings if REDUCED in s.curves]
    if not settings:
        return None
    differences = {s.name: s.difference(REDUCED, PUBLISHED) for s in settings}
    errors = {name: standard_error(d) for name, d in differences.items()}
    return {
        "n_settings": len(settings),
        "all": compare(settings, REDUCED, PUBLISHED),
        "beyond": [n for n, d in differences.items() if abs(d.mean()) > 2 * errors[n]],
    }


def regret_rows(settings: Sequence[Setting], names: Sequence[str]) -> list[dict[str, Any]]:
    """Compute mean and worst regret of each strategy, and the seconds of a query."""
    table = regrets(settings, names)
    batches = sorted({s.info["n_instances"] for s in settings})
    return [
        {
            "name": name,
            "mean": table.loc[name].mean(),
            "worst": table.loc[name].max(),
            "where": table.loc[name].idxmax(),
            "seconds": {
                batch: float(
                    np.median(
                        [s.query_seconds(name) for s in settings if s.info["n_instances"] == batch]
                    )
                )
                for batch in batches
            },
        }
        for name in names
    ]


def in_each_setting(settings: Sequence[Setting]) -> list[dict[str, Any]]:
    """Return a table for each data set: accuracy of random sampling, and gains over it."""
    tables = []
    for dataset in dict.fromkeys(s.dataset for s in settings):
        some = [s for s in settings if s.dataset == dataset]
        common = set.intersection(*(set(s.curves) for s in some)) - {RANDOM}
        rows: dict[str, list[Comparison]] = {
            name: [compare([s], name, RANDOM) for s in some] for name in common
        }
        means = {name: np.mean([cell.mean for cell in row]) for name, row in rows.items()}
        tables.append(
            {
                "dataset": dataset,
                "columns": [s.short for s in some],
                "n_seeds": [len(s.means) for s in some],
                "random": [s.scores[RANDOM] for s in some],
                "rows": {name: rows[name] for name in sorted(rows, key=lambda n: -means[n])},
            }
        )
    return tables


def standard_errors(settings: Sequence[Setting], peers: Sequence[str]) -> dict[str, Any]:
    """Compute standard errors of a difference in one setting: the median and the largest."""
    errors = [standard_error(s.difference(DEFAULT, peer)) for s in settings for peer in peers]
    return {"median": float(np.median(errors)), "largest": max(errors)}


def is_below_zero(differences: np.ndarray, n_tests: int) -> bool:
    """Return whether the mean is below 0, by Student's t at 5% divided by the number of tests."""
    quantile = stats.t.ppf(1 - 0.05 / n_tests / 2, max(1, len(differences) - 1))
    return bool(differences.mean() + quantile * standard_error(differences) < 0)


def judge(scores: dict[str, pd.DataFrame], name: str) -> dict[str, Any]:
    """Apply the protocol's test to a candidate for the default.

    Parameters
    ----------
    scores : dict of DataFrame
        Scores of each setting, by seed and strategy.
    """
    differences = {s: (x[name] - x[PUBLISHED]).to_numpy() for s, x in scores.items()}
    regret = pd.DataFrame({s: x.mean().max() - x.mean() for s, x in scores.items()})
    lost = []
    for setting, values in differences.items():
        if is_below_zero(values, len(scores)):
            lost.append(setting)
    mean, low, high = bootstrap([*differences.values()])
    before, after = (regret.loc[n] for n in (PUBLISHED, name))
    n_seeds = min(len(values) for values in differences.values())
    smaller = after.max() < before.max()
    return {
        "name": name,
        "difference": Comparison(mean, low, high, np.nan, n_seeds),
        "mean_regret": (before.mean(), after.mean()),
        "worst_regret": (before.max(), after.max()),
        "lost": lost,
        "passes": bool(low > 0 and smaller and not lost and n_seeds >= MIN_SEEDS),
    }


def rounds(settings: Sequence[Setting]) -> list[dict[str, Any]]:
    """Judge the candidates of the rounds of the protocol that have run."""
    found = []
    for one in ROUNDS:
        scores = {s.name: one.scores(s) for s in settings}
        scores = {
            name: x for name, x in scores.items() if len(x) and {*one.candidates} <= {*x.columns}
        }
        if scores:
            judged = [judge(scores, name) for name in one.candidates]
            found.append({"n_settings": len(scores), "candidates": judged})
    return found


def on_pixels(settings: Sequence[Setting]) -> dict[str, Any] | None:
    """Compare a share of coverage with none where the inputs are pixels."""
    if not settings:
        return None
    order = [*NETWORKS_ON_PIXELS]
    ordered = sorted(settings, key=lambda s: order.index(s.info["network"]))
    names = [name for name in ordered[0].curves if name != PUBLISHED]
    return {
        "info": settings[0].info,
        "share": compare(settings, OF_PIXELS, PUBLISHED),
        "names": names,
        "rows": {
            f"{NETWORKS_ON_PIXELS[s.info['network']]}, {s.short}": [
                compare([s], name, PUBLISHED) for name in names
            ]
            for s in ordered
        },
    }


def with_gain(table: pd.DataFrame) -> pd.DataFrame:
    """Return the mean curve of each setting, with the accuracy that the next batches gain."""
    keys = ["dataset", "imbalance"]
    mean = table.groupby([*keys, "n_labeled"], as_index=False).mean(numeric_only=True)
    later = mean.groupby(keys).accuracy.shift(-N_BATCHES_AHEAD)
    return mean.assign(gain=later - mean.accuracy).dropna()


def judge_signals(table: pd.DataFrame) -> pd.DataFrame:
    """Compute how well each signal tells the gain to come, in a setting and over all."""
    mean = with_gain(table)
    settings = [part for _, part in mean.groupby(["dataset", "imbalance"])]
    rows = {}
    for name, signal in SIGNALS.items():
        within = [float(stats.spearmanr(signal(part), part.gain).statistic) for part in settings]
        rows[name] = {
            "mean": np.mean(within),
            "lowest": min(within),
            "one_threshold": roc_auc_score(mean.gain >= WORTHWHILE_GAIN, signal(mean)),
        }
    return pd.DataFrame(rows).T


def when_to_stop(file: Path) -> dict[str, Any] | None:
    if not file.exists():
        return None
    table = pd.read_csv(file)
    judged = judge_signals(table)
    return {
        "n_settings": len(table[["dataset", "imbalance"]].drop_duplicates()),
        "n_seeds": table.seed.nunique(),
        "n_labels": int(table.n_labeled.max()),
        "ahead": N_BATCHES_AHEAD,
        "worthwhile": WORTHWHILE_GAIN,
        "rows": judged.to_dict("index"),
        "best": judged.one_threshold.idxmax(),
    }


def minus(scores: Sequence[pd.DataFrame], name: str, other: str) -> Comparison:
    """Compare two strategies over tasks, each a table of scores by seed and strategy."""
    parts = [(s[name] - s[other]).dropna().to_numpy() for s in scores]
    errors = np.array([standard_error(part) for part in parts])
    error = float(np.sqrt((errors**2).sum()) / len(parts))
    return Comparison(*bootstrap(parts), error, min(len(part) for part in parts))


def by_likelihood(file: Path) -> dict[str, Any] | None:
    """Compare strategies where labels are numbers, and where they are several a sample."""
    if not file.exists():
        return None
    table = pd.read_csv(file).set_index(["task", "seed", "strategy"])
    after_first = table.iloc[:, 1:].mean(axis=1).unstack()
    scores = {
        str(task): part.droplevel("task").dropna(axis=1, how="all")
        for task, part in after_first.groupby("task", sort=False)
    }
    kinds = {"numbers": K_CENTER, "labels": MEAN_ENTROPY}
    found: dict[str, Any] = {"n_seeds": min(len(part) for part in scores.values())}
    lost = [
        f"{task} ({name})"
        for task, part in scores.items()
        for name in (ON_FISHER, ON_COVERAGE)
        if is_below_zero((part[name] - part[RANDOM]).dropna().to_numpy(), 2 * len(scores))
    ]
    for kind, peer in kinds.items():
        some = {task: part for task, part in scores.items() if peer in part}
        names = [n for n in next(iter(some.values())) if n != RANDOM]
        rows = {
            name: [minus([part], name, RANDOM) for part in some.values()]
            + [minus([*some.values()], name, RANDOM)]
            for name in names
        }
        found[kind] = {
            "tasks": [*some],
            "rows": dict(sorted(rows.items(), key=lambda row: -row[1][-1].mean)),
            "coverage": minus([*some.values()], ON_COVERAGE, ON_FISHER),
        }
        ordered = [*found[kind]["rows"]]
        found[kind]["ahead"] = ordered[: min(map(ordered.index, (ON_FISHER, ON_COVERAGE)))]
    return found | {"lost": lost}


def beside_foreign(folder: Path) -> dict[str, Any] | None:
    """Return our numbers beside those that others report of the same, in one table."""
    files = [folder / foreign.FILE.name, folder / three_clusters.FILE.name]
    if not all(file.exists() for file in files):
        return None
    tables, clusters = map(pd.read_csv, files)
    theirs = foreign.THEIRS | {"ThreeClust": three_clusters.THEIRS}
    ours = tables.rename(columns={"split": "seed", "area": "score"})
    ours = pd.concat([ours, clusters.assign(table="ThreeClust")])
    names = [*dict.fromkeys([*three_clusters.COMPARED, *ours.strategy])]
    rows: dict[str, list[dict[str, Any] | None]] = {}
    outside = []
    for table, reported in theirs.items():
        rows[table] = []
        for name in names:
            scores = ours.score[(ours.table == table) & (ours.strategy == name)]
            found = {"mean": scores.mean(), "n": len(scores), "theirs": reported.get(name)}
            rows[table].append(found if len(scores) else None)
            if len(scores) and name in reported:
                mean, deviation = reported[name]
                if abs(scores.mean() - mean) > 2 * deviation:
                    outside.append(f"{table} ({name})")
    repeats = ours.groupby(["table", "strategy"]).size()
    own = tables[tables.strategy.map(is_ours)].groupby(["table", "strategy"]).size()
    called = {third_round.ALONE: "the default", PUBLISHED: "FisherMask, as published"}
    return {
        "names": [called.get(name, name) for name in names],
        "rows": rows,
        "outside": outside,
        "n_compared": sum(map(len, theirs.values())),
        "repeats": (int(repeats.min()), int(repeats.max())),
        "own_repeats": int(own.max()) if len(own) else 0,
    }


def values(folder: Path) -> dict[str, Any]:
    """Compute what the page shows.

    Parameters
    ----------
    folder : Path
        Of the results, ``benchmarks/results``.
    """
    everything = load(folder / "label_efficiency")
    study = of_study(everything)
    names = compared_strategies(study)
    peers = [name for name in names if not is_ours(name)]
    kinds = by_kind(study)
    return {
        "third": third_round.values(folder / "label_efficiency_heads"),
        "default": DEFAULT,
        "published": PUBLISHED,
        "peers": peers,
        "settings": study,
        "outcomes": {kind: outcomes(some, peers) for kind, some in kinds.items()},
        "regret": regret_rows(study, names),
        "errors": standard_errors(study, peers),
        "each_setting": in_each_setting(study),
        "first_study": in_each_setting([s for s in everything if s.info["dataset"] in FIRST]),
        "rounds": rounds(everything),
        "pixels": on_pixels(load(folder / "label_efficiency_pixels")),
        "likelihoods": by_likelihood(folder / "label_efficiency_likelihoods/results.csv"),
        "foreign": beside_foreign(folder / "foreign"),
        "stopping": when_to_stop(folder / "label_efficiency" / STOPPING),
    }
