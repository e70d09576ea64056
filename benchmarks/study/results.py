"""The results of the study, and the statistics of its page."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

# Strategies by their names in the results.
RANDOM = "random"
PUBLISHED = "FisherMask"
DEFAULT = "FisherMask, coverage at first"
# Candidates for the default, in the rounds of the protocol.
CANDIDATES = [
    [
        "FisherMask, lambda 0.01",
        "FisherMask, coverage where balanced",
        "FisherMask, coverage-weighted",
    ],
    ["FisherMask, coverage where balanced", DEFAULT],
]
OF_PIXELS = "FisherMask, coverage of pixels at first"
# The published method with the default numbers of directions and of samples for the mask.
REDUCED = "FisherMask, default sizes"
DATASETS = {
    "cifar10-features": "CIFAR-10 features with an MLP head",
    "cifar10-components": "CIFAR-10 features with a linear head",
    "wordnet": "WordNet definitions",
    "letter": "Letters",
    "digits": "Digits",
    "fashion-mnist": "Fashion-MNIST",
    "cifar10-images": "CIFAR-10 images with a ResNet-18 from scratch",
}
# The first study of small networks trained from scratch, and the setting of the paper.
FIRST = ("digits", "fashion-mnist")
PAPER = ("cifar10-images",)
KINDS = ("balanced", "long-tailed")
# A bootstrap interval over fewer seeds is too narrow for a verdict.
MIN_SEEDS = 8
N_RESAMPLES = 10_000


@dataclass
class Setting:
    """The results of one data set, class balance and batch size.

    Parameters
    ----------
    info : dict
        What was set, as in ``setting.json``.
    table : DataFrame
        A row for each strategy, seed and number of labels.
    """

    info: dict[str, Any]
    table: pd.DataFrame

    @property
    def kind(self) -> str:
        return KINDS[self.info["imbalance"] > 1]

    @property
    def dataset(self) -> str:
        return DATASETS.get(self.info["dataset"], self.info["dataset"])

    @property
    def short(self) -> str:
        ratio = self.info["imbalance"]
        return f"{'balanced' if ratio == 1 else f'{ratio:g}:1'}, {self.info['n_instances']}"

    @property
    def name(self) -> str:
        return f"{self.dataset}, {self.short} a batch"

    @cached_property
    def curves(self) -> dict[str, pd.DataFrame]:
        """Return the accuracy of each strategy, by seed (rows) and number of labels (columns)."""
        return {
            name: table.pivot(index="seed", columns="n_labeled", values="accuracy")
            for name, table in self.table.groupby("strategy", sort=False)
        }

    @cached_property
    def means(self) -> pd.DataFrame:
        """Return mean accuracy over the curve, by seed and strategy; NaN where there is no run."""
        return pd.DataFrame({name: curve.mean(axis=1) for name, curve in self.curves.items()})

    def difference(self, name: str, other: str) -> np.ndarray:
        """Return paired differences of mean accuracy, on the seeds that both have."""
        return (self.means[name] - self.means[other]).dropna().to_numpy()

    @cached_property
    def scores(self) -> pd.Series:
        """Return mean accuracy: the published method's, plus the mean paired difference."""
        base = self.means[PUBLISHED].mean()
        return base + self.means.sub(self.means[PUBLISHED], axis=0).mean()

    def paired(self, name: str, other: str) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Return the curves of two strategies on the seeds that both have."""
        mine, yours = self.curves[name], self.curves[other]
        seeds = mine.index.intersection(yours.index)
        return mine.loc[seeds], yours.loc[seeds]

    def labels_needed(self, name: str, other: str = RANDOM) -> float:
        """Compute the share of the other's labels that reached its last mean accuracy.

        By linear interpolation of the mean curve; 1 where that accuracy was not reached.
        """
        curve, target = (part.mean() for part in self.paired(name, other))
        reached = curve.cummax()
        last = reached.index[-1]
        return float(np.interp(target.iloc[-1], reached, reached.index) / last)

    def query_seconds(self, name: str, seed: int | None = None) -> float:
        """Return the lower quartile: other work on the machine made many queries longer."""
        rows = self.table[self.table.strategy == name]
        if seed is not None:
            rows = rows[rows.seed == seed]
        return float(rows.query_time.quantile(0.25))


@dataclass(frozen=True)
class Comparison:
    """One strategy minus another: mean difference, 95% interval and fewest seeds of a setting."""

    mean: float
    low: float
    high: float
    error: float
    n_seeds: int

    @property
    def verdict(self) -> str:
        if self.n_seeds < MIN_SEEDS:
            return "open"
        return "better" if self.low > 0 else "worse" if self.high < 0 else "open"


def load(folder: Path) -> list[Setting]:
    """Load the settings that have results of random sampling and of the published method."""
    settings = [
        Setting(json.loads(file.read_text()), pd.read_csv(file.with_name("results.csv")))
        for file in sorted(folder.glob("*/setting.json"))
    ]
    order = {name: i for i, name in enumerate(DATASETS)}
    return sorted(
        (s for s in settings if {RANDOM, PUBLISHED} <= set(s.curves)),
        key=lambda s: (
            order.get(s.info["dataset"], len(order)),
            s.info["imbalance"],
            s.info["n_instances"],
        ),
    )


def of_study(settings: Iterable[Setting]) -> list[Setting]:
    """Return the settings that the page is about: not the first study, not the paper's."""
    return [s for s in settings if s.info["dataset"] not in (*FIRST, *PAPER)]


def by_kind(settings: Iterable[Setting]) -> dict[str, list[Setting]]:
    kinds = {kind: [s for s in settings if s.kind == kind] for kind in KINDS}
    return {kind: some for kind, some in kinds.items() if some}


def is_ours(name: str) -> bool:
    return name.startswith("FisherMask")


def compared_strategies(settings: Sequence[Setting]) -> list[str]:
    """Return the peers, the published method and the default, by rising mean regret.

    Those that ran in all settings; candidates that did not become the default are left out.
    """
    common = set.intersection(*(set(s.curves) for s in settings))
    names = [n for n in common if not is_ours(n) or n in (PUBLISHED, DEFAULT)]
    return list(regrets(settings, names).mean(axis=1).sort_values().index)


def regrets(settings: Sequence[Setting], names: Sequence[str]) -> pd.DataFrame:
    """Compute each strategy's distance to the best of them, by strategy and setting."""
    scores = pd.DataFrame({s.name: s.scores[sorted(names)] for s in settings})
    return scores.max() - scores


def resample(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return values[rng.integers(len(values), size=(N_RESAMPLES, len(values)))].mean(axis=1)


def bootstrap(parts: Sequence[np.ndarray]) -> tuple[float, float, float]:
    """Compute the mean of the settings' means and its 95% interval.

    Settings are resampled, and seeds within each of them.
    """
    rng = np.random.default_rng(0)
    means = np.stack([resample(part, rng) for part in parts], axis=1)
    drawn = rng.integers(len(parts), size=(N_RESAMPLES, len(parts)))
    low, high = np.quantile(np.take_along_axis(means, drawn, axis=1).mean(axis=1), [0.025, 0.975])
    return float(np.mean([part.mean() for part in parts])), float(low), float(high)


def standard_error(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else np.nan


def compare(settings: Sequence[Setting], name: str, other: str) -> Comparison:
    """Compare two strategies over settings, on the seeds that both have in each."""
    parts = [s.difference(name, other) for s in settings]
    errors = np.array([standard_error(part) for part in parts])
    error = float(np.sqrt((errors**2).sum()) / len(parts))
    return Comparison(*bootstrap(parts), error, min(len(part) for part in parts))


def wins(settings: Sequence[Setting], names: Sequence[str]) -> pd.DataFrame:
    """Compute how often the row's strategy is more accurate than the column's.

    Of all pairs of a seed and a number of labels after the first; a tie counts half, a setting as
    much as any other.
    """
    table = pd.DataFrame(np.nan, index=list(names), columns=list(names))
    for name in names:
        for other in names:
            if name != other:
                shares = []
                for s in settings:
                    if not {name, other} <= set(s.curves):
                        continue
                    mine, yours = (part.iloc[:, 1:].to_numpy() for part in s.paired(name, other))
                    if len(mine):
                        shares.append(((mine > yours) + 0.5 * (mine == yours)).mean())
                if shares:
                    table.loc[name, other] = np.mean(shares)
    return table
