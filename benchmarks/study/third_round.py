"""The values of the page on label efficiency from the third round, which ``heads.py`` runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from benchmarks.study.results import (
    DATASETS,
    DEFAULT,
    KINDS,
    RANDOM,
    Comparison,
    Setting,
    bootstrap,
    standard_error,
    wins,
)

ALONE = "FisherMask, coverage alone"
UHERDING = "UHerding, radius 1"
# In the matrix of wins.
SHORT = {ALONE: "the default", DEFAULT: "the default before", UHERDING: "UHerding"}
ORACLE = "oracle"
# The seed that ran with nothing else running.
TIMED = 50
# Of the protocol: the level of a loss, and the largest standard error of a difference.
LEVEL, WANTED_ERROR = 0.05, 0.006
NAMES = DATASETS | {
    "cifar10-features": "CIFAR-10 features",
    "wordnet-verbs": "definitions of verbs",
    "wordnet": "definitions of nouns",
    "letter": "letters",
    "satimage": "satellite images",
    "texture": "textures",
}
HEADS = {"ridge": "linear head", "mlp16 full batch": "MLP head"}
LINEAR = "ridge"
# From the least to the most often more accurate, on linear heads, in REFINE's paper.
FOREIGN_ORDER = [RANDOM, "margin", "MaxHerding", "BAIT Binary", UHERDING, "REFINE"]


class Curve(Setting):
    """A setting of the third round; its score leaves out the first labels, which all share."""

    @property
    def name(self) -> str:
        info = self.info
        ratio = "balanced" if info["imbalance"] == 1 else f"{info['imbalance']}:1"
        sizes = f"{info['n_initial']} + {info['n_queries']} x {info['n_instances']}"
        return (
            f"{NAMES[info['dataset']]}, {HEADS[info['network']]}, {ratio}, {sizes} labels, "
            f"{info['initial']} first"
        )

    def scores(self, names: Sequence[str]) -> pd.DataFrame:  # type: ignore[override]
        """Return scores by seed and strategy, for the seeds that all of these have."""
        each = {name: self.curves[name].iloc[:, 1:].mean(axis=1) for name in names}
        return pd.DataFrame(each).dropna()

    def first_accuracy(self) -> pd.Series:
        """Return the accuracy with the first labels, by seed."""
        return self.curves[RANDOM].iloc[:, 0]


def load(folder: Path) -> dict[str, Curve]:
    return {
        file.parent.name: Curve(
            json.loads(file.read_text()), pd.read_csv(file.with_name("results.csv"))
        )
        for file in sorted(folder.glob("*/setting.json"))
        if file.with_name("results.csv").exists()
    }


def minus(settings: Sequence[Curve], name: str, other: str) -> Comparison:
    """Compare two strategies over settings, on the seeds that both have in each."""
    tables = [s.scores([name, other]) for s in settings]
    parts = [(table[name] - table[other]).to_numpy() for table in tables if len(table)]
    errors = np.array([standard_error(part) for part in parts])
    error = float(np.sqrt((errors**2).sum()) / len(parts))
    return Comparison(*bootstrap(parts), error, min(map(len, parts)))


def regrets(settings: Sequence[Curve], names: Sequence[str]) -> pd.DataFrame:
    """Compute the distance of each strategy to the best, by strategy and setting.

    All are compared with the default on the seeds that both have.
    """

    def score(setting: Curve, name: str) -> float:
        table = setting.scores([name, ALONE])
        return float((table[name] - table[ALONE]).mean())

    means = pd.DataFrame({s.name: {name: score(s, name) for name in names} for s in settings})
    return means.max() - means


def order(settings: Sequence[Curve]) -> dict[str, Any] | None:
    """Compute whether REFINE's order of strategies holds on linear heads.

    The share of a strategy is how often it is more accurate than the one before it.
    """
    linear = [s for s in settings if s.info["network"] == LINEAR]
    names = [name for name in FOREIGN_ORDER if any(name in s.curves for s in linear)]
    if len(names) < 2:
        return None
    table = wins(linear, names)
    shares = {after: table.loc[after, before] for before, after in pairwise(names)}
    return {
        "n_settings": min(sum(name in s.curves for s in linear) for name in names),
        "names": names,
        "shares": [*shares.values()],
        "broken": [name for name, share in shares.items() if share <= 0.5],
    }


def curves(settings: Sequence[Curve]) -> dict[str, Any] | None:
    """Compare coverage alone with what ran in all curves, and with what ran in some."""
    settings = [s for s in settings if {RANDOM, ALONE} <= set(s.curves)]
    if not settings:
        return None
    ran = list(dict.fromkeys(name for s in settings for name in s.curves))
    names = [n for n in ran if all(n in s.curves for s in settings)]
    matched = [name for name in ran if name != ORACLE]
    regret = regrets(settings, names)
    ahead = {}
    for s in settings:
        table = s.scores([ALONE, RANDOM])
        ahead[s.name] = (table[ALONE] - table[RANDOM]).to_numpy()
    quantile = 1 - LEVEL / len(ahead) / 2
    below = [
        name
        for name, d in ahead.items()
        if len(d) > 1 and d.mean() + stats.t.ppf(quantile, len(d) - 1) * standard_error(d) < 0
    ]
    errors = {
        (s.name, other): standard_error((table[ALONE] - table[other]).to_numpy())
        for s in settings
        for other in (RANDOM, UHERDING)
        if len(table := s.scores([ALONE, other])) > 1
    }
    parts = {kind: [s for s in settings if s.kind == kind] for kind in KINDS} | {"all": settings}
    in_some = {n: [s for s in settings if n in s.curves] for n in ran if n not in names}
    least = min(ahead, key=lambda name: ahead[name].mean())
    numbers = [len(d) for d in ahead.values()]
    return {
        "n_settings": len(settings),
        "n_seeds": (min(numbers), max(numbers)),
        "errors": (float(np.median([*errors.values()])), max(errors.values())),
        "inexact": list(dict.fromkeys(n for (n, _), e in errors.items() if e > WANTED_ERROR)),
        "names": names,
        "minus": {
            kind: {other: minus(some, ALONE, other) for other in names if other != ALONE}
            for kind, some in parts.items()
        },
        "over_random": {
            kind: {name: minus(some, name, RANDOM) for name in names if name != RANDOM}
            for kind, some in parts.items()
        },
        "regret": {
            name: (row.mean(), row.max(), str(row.idxmax())) for name, row in regret.iterrows()
        },
        "in_some": {n: (len(some), minus(some, ALONE, n)) for n, some in in_some.items()},
        "wins": {SHORT.get(name, name): [*row] for name, row in wins(settings, matched).iterrows()},
        "order": order(settings),
        "below": below,
        "least": (least, float(ahead[least].mean())),
        "needed": float(np.median([s.labels_needed(ALONE) for s in settings])),
        "seconds": float(
            np.median(
                [s.query_seconds(ALONE, TIMED) / s.query_seconds(UHERDING, TIMED) for s in settings]
            )
        ),
    }


def first_batches(settings: Sequence[Curve]) -> dict[int, dict[str, Any]]:
    """Compare first batches that cover with random ones, by their number of labels."""
    found = {}
    for n in sorted({s.info["n_initial"] for s in settings}):
        gains = {}
        for one in settings:
            if (one.info["n_initial"], one.info["initial"]) != (n, "coverage"):
                continue
            same = ("dataset", "network", "imbalance", "n_initial")
            [other] = [
                s
                for s in settings
                if s is not one and all(s.info[key] == one.info[key] for key in same)
            ]
            gain = (one.first_accuracy() - other.first_accuracy()).dropna().to_numpy()
            if len(gain):
                gains[one.name.partition(f", {n} +")[0]] = gain
        if gains:
            parts = [*gains.values()]
            lost = [name for name, gain in gains.items() if gain.mean() < -standard_error(gain)]
            comparison = Comparison(*bootstrap(parts), np.nan, min(map(len, parts)))
            found[n] = {"gain": comparison, "n_settings": len(gains), "lost": lost}
    return found


def values(folder: Path) -> dict[str, Any] | None:
    """Compute what the page shows of the third round; None where nothing ran.

    Parameters
    ----------
    folder : Path
        Of its results, ``benchmarks/results/label_efficiency_heads``.
    """
    settings = load(folder)
    first = {name: s for name, s in settings.items() if name.startswith("first")}
    compared = curves([s for name, s in settings.items() if name not in first])
    if compared is None:
        return None
    return compared | {"first": first_batches([*first.values()]), "alone": ALONE}
