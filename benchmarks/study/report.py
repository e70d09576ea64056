"""Write the page on label efficiency, and its pictures, from the committed results.

Run from the root of the repository::

    python -m benchmarks.study.report
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from scipy import stats

from benchmarks.study import pixels, stopping
from benchmarks.study.run import CANDIDATES, STUDIED, STUDY
from benchmarks.study.strategies import PEERS

RESULTS = Path("benchmarks/results/label_efficiency")
PROTOCOL = "benchmarks/study/protocol.md"
DATASETS = {
    "cifar10-features": "CIFAR-10 features with an MLP head",
    "cifar10-components": "CIFAR-10 features with a linear head",
    "wordnet": "WordNet definitions",
    "letter": "Letters",
    "digits": "Digits",
    "fashion-mnist": "Fashion-MNIST",
    "cifar10-images": "CIFAR-10 images with a ResNet-18 from scratch",
}
FIRST = ("digits", "fashion-mnist")  # the first study, with some of the peers
N_FIRST = 8  # settings there
PAPER = "cifar10-images"  # the paper's setting, with some of the peers
OURS = "FisherMask"  # the method as published
DEFAULT = "FisherMask, coverage at first"  # what FisherMaskSampler() does
KINDS = ("balanced", "long-tailed")
# Drawn in the learning curves; the tables have all.
DRAWN = ["random", "margin", "BADGE", "BAIT", "MaxHerding", "UHerding", OURS, DEFAULT]
COLOURS = ["0.45", "tab:orange", "tab:green", "tab:purple", "tab:red", "tab:brown", "tab:blue"]
COLOURS += ["black"]
WANTED_ERROR = 0.006
MIN_SEEDS = 8  # a bootstrap interval of fewer is too narrow
N_RESAMPLES = 10_000


@dataclass(frozen=True)
class Round:
    """A round of the protocol: candidates for the default, and the seeds that decide."""

    candidates: list[str]
    seeds: range
    first_study: range = range(0)

    def of(self, setting: Setting) -> range:
        return self.first_study if setting.info["dataset"] in FIRST else self.seeds


# Seed 0 was looked at before the protocol was written.
ROUNDS = [
    Round(CANDIDATES[0], range(1, 13)),
    Round(CANDIDATES[1], range(13, 25), range(101, 113)),
]


@dataclass
class Setting:
    """The results of one setting: data set, balance and batch size."""

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
        """Of each strategy, accuracy by seed (rows) and number of labels (columns)."""
        return {
            name: table.pivot(index="seed", columns="n_labeled", values="accuracy")
            for name, table in self.table.groupby("strategy", sort=False)
        }

    @cached_property
    def means(self) -> pd.DataFrame:
        """Mean accuracy over the curve, by seed and strategy; NaN where there is no such run."""
        return pd.DataFrame({name: curve.mean(axis=1) for name, curve in self.curves.items()})

    def difference(self, name: str, other: str = OURS) -> np.ndarray:
        """Paired differences of mean accuracy, by the seeds that both have."""
        return (self.means[name] - self.means[other]).dropna().to_numpy()

    @cached_property
    def scores(self) -> pd.Series:
        """Mean of each strategy of the study: FisherMask's, plus the mean paired difference."""
        names = [n for n in STUDIED if n in self.curves and len(self.difference(n))]
        ours = self.means[OURS].mean()
        return pd.Series({n: ours + self.difference(n).mean() for n in names})

    @property
    def peers(self) -> list[str]:
        return [name for name in PEERS if name in self.scores]

    @property
    def n_seeds(self) -> int:
        """How many each peer has in common with FisherMask, at least."""
        return min(len(self.difference(name)) for name in self.peers)

    @property
    def best_peer(self) -> str:
        return str(self.scores[self.peers].idxmax())

    @property
    def regret(self) -> pd.Series:
        """Distance of every strategy to the best one of this setting."""
        return self.scores.max() - self.scores

    def query_seconds(self, name: str) -> float:
        """The lower quartile: other work on the machine makes many of them too long."""
        return float(self.table.loc[self.table.strategy == name, "query_time"].quantile(0.25))


def load(folder: Path) -> list[Setting]:
    settings = [
        Setting(
            json.loads(file.read_text()),
            pd.read_csv(file.with_name("results.csv")),
        )
        for file in sorted(folder.glob("*/setting.json"))
    ]
    settings = [s for s in settings if {"random", OURS} <= set(s.curves)]
    order = {name: i for i, name in enumerate(DATASETS)}
    return sorted(
        settings,
        key=lambda s: (order.get(s.info["dataset"], 9), s.info["imbalance"], s.info["n_instances"]),
    )


def has_all(setting: Setting) -> bool:
    """Whether every peer was run with some seed."""
    return set(PEERS) <= set(setting.peers)


def error(values: np.ndarray) -> float:
    """Standard error of a mean."""
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else np.nan


def resampled(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return values[rng.integers(len(values), size=(N_RESAMPLES, len(values)))].mean(axis=1)


def bootstrap(parts: Sequence[np.ndarray]) -> tuple[float, float, float]:
    """Mean of the settings' means and its 95% interval, settings and seeds resampled."""
    rng = np.random.default_rng(0)
    means = np.stack([resampled(part, rng) for part in parts], axis=1)
    which = rng.integers(len(parts), size=(N_RESAMPLES, len(parts)))
    low, high = np.quantile(np.take_along_axis(means, which, axis=1).mean(axis=1), [0.025, 0.975])
    return float(np.mean([part.mean() for part in parts])), float(low), float(high)


def interval(values: np.ndarray) -> tuple[float, float]:
    """95% percentile interval of the mean over resamples of the seeds."""
    low, high = np.quantile(resampled(values, np.random.default_rng(0)), [0.025, 0.975])
    return float(low), float(high)


def enough(settings: list[Setting]) -> bool:
    """Whether there are seeds enough for a verdict."""
    return all(s.n_seeds >= MIN_SEEDS for s in settings)


def verdict(low: float, high: float) -> str:
    """What the interval of "FisherMask minus the other" says of FisherMask."""
    return "better" if low > 0 else "worse" if high < 0 else "level"


def signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")  # noqa: RUF001


def listed(names: Sequence[str]) -> str:
    return ", ".join(names[:-1]) + f" and {names[-1]}" if len(names) > 1 else "".join(names)


def span(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low}" if low == high else f"{low} to {high}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> str:
    lines = [f".. list-table:: {caption}", "   :header-rows: 1", "   :stub-columns: 1", ""]
    for row in [head, *rows]:
        for i, cell in enumerate(row):
            lines.append(f"   {'*' if i == 0 else ' '} - {cell}".rstrip())
    return "\n".join(lines) + "\n"


def folded(title: str, text: str) -> str:
    body = "\n".join(f"   {line}".rstrip() for line in text.splitlines())
    return f".. dropdown:: {title}\n\n{body}\n"


def kinds_of(settings: list[Setting]) -> dict[str, list[Setting]]:
    """All of them, and those of each kind of pool."""
    found = {"all": settings}
    for kind in KINDS:
        if some := [s for s in settings if s.kind == kind]:
            found[kind] = some
    return found


def compared(
    settings: list[Setting], other: Callable[[Setting], str], name: str = OURS
) -> tuple[float, float, float] | None:
    """One strategy minus another, over settings."""
    parts = [s.difference(name, other(s)) for s in settings if {name, other(s)} <= set(s.curves)]
    return bootstrap(parts) if parts else None


def outcomes(settings: list[Setting], names: Sequence[str], ours: str = OURS) -> str:
    """How many of some strategies FisherMask is better than, level with and worse than."""
    groups: dict[str, list[str]] = {"better": [], "level": [], "worse": []}
    for name in names:
        found = compared(settings, lambda s, name=name: name, ours)
        assert found is not None
        groups[verdict(*found[1:])].append(name)
    worse = groups["worse"]
    return (
        f"beats {len(groups['better']) or 'none'}, cannot be told from "
        f"{len(groups['level']) or 'none'} and loses to {len(worse) or 'none'}"
        + (f" ({listed(worse)})" if worse else "")
    )


def regrets(settings: list[Setting]) -> pd.DataFrame:
    """Of each strategy, its regret by setting."""
    return pd.DataFrame({s.name: s.regret for s in settings}).dropna()


def regret_table(settings: list[Setting]) -> str:
    found = regrets(settings)
    kinds = list(kinds_of(settings).items())[1:]
    batches = sorted({s.info["n_instances"] for s in settings})
    rows = []
    for name in found.mean(axis=1).sort_values().index:
        values = found.loc[name]
        row = [f"**{name}**" if name == OURS else str(name)]
        row += [f"{values.mean():.3f}", f"{values.max():.3f}", values.idxmax()]
        row += [f"{values[[s.name for s in some]].max():.3f}" for _, some in kinds]
        for batch in batches:
            seconds = [s.query_seconds(name) for s in settings if s.info["n_instances"] == batch]
            row.append(f"{np.median(seconds):.2f}")
        rows.append(row)
    head = ["", "Mean", "Worst", "The worst is in", *(f"Worst, {kind}" for kind, _ in kinds)]
    head += [f"Seconds for {batch}" for batch in batches]
    return table(head, rows, f"Regret over {len(settings)} settings, and what a query costs")


def peer_table(settings: list[Setting], names: Sequence[str], ours: str = OURS) -> str:
    """One of ours minus every peer, over the seeds that both have."""
    kinds = kinds_of(settings)
    fewest = min(len(s.difference(ours, name)) for s in settings for name in names)

    def cells(other: Callable[[Setting], str]) -> list[str]:
        row = []
        for some in kinds.values():
            found = compared(some, other, ours)
            assert found is not None
            mean, low, high = found
            mark = {"better": "▲ ", "level": "", "worse": "▼ "}[verdict(low, high)]
            mark = mark if fewest >= MIN_SEEDS else ""
            row.append(f"{mark}{signed(mean)} ({signed(low)} to {signed(high)})")
        return row

    rows = [[name, *cells(lambda s, name=name: name)] for name in names]
    rows.append(["the best peer, found afterwards", *cells(lambda s: s.best_peer)])
    head = ["", *(f"{kind} ({len(some)} settings)" for kind, some in kinds.items())]
    caption = f"{ours} minus the other: mean accuracy, 95% interval, {fewest} seeds or more"
    return table(head, rows, caption)


def has_default(settings: list[Setting]) -> bool:
    """Whether the default was run in all settings, with seeds enough for a verdict."""
    return all(DEFAULT in s.curves and len(s.difference(DEFAULT)) >= MIN_SEEDS for s in settings)


def draw_differences(settings: list[Setting], file: Path) -> None:
    """Every strategy minus FisherMask, for balanced and for long-tailed pools."""
    names = [n for n in regrets(settings).mean(axis=1).sort_values().index if n != OURS]
    kinds = list(kinds_of(settings).items())[1:]
    figure, axes = plt.subplots(
        1, len(kinds), figsize=(9, 0.32 * len(names) + 1.4), sharey=True, layout="constrained",
        squeeze=False,
    )  # fmt: skip
    rows = np.arange(len(names))[::-1]
    for ax, (kind, some) in zip(axes.flat, kinds, strict=True):
        for row, name in zip(rows, names, strict=True):
            found = compared(some, lambda s: OURS, name)
            assert found is not None
            mean, low, high = found
            colour = "tab:green" if low > 0 else "tab:red" if high < 0 else "0.5"
            colour = colour if enough(settings) else "0.5"
            ax.plot([low, high], [row, row], color=colour, lw=2)
            ax.plot(mean, row, "o", color=colour)
        ax.axvline(0, color="black", lw=1)
        ax.set_title(f"{kind} pools ({len(some)} settings)", fontsize=11)
        ax.set_xlabel("accuracy, difference\nto FisherMask as published")
        ax.set_yticks(rows, [f"{n} (default)" if n == DEFAULT else n for n in names])
        ax.grid(axis="x", alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def draw_curves(settings: list[Setting], file: Path) -> None:
    columns = 4 if len(settings) > 4 else 2
    rows = -(-len(settings) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(3.6 * columns, 2.9 * rows), layout="constrained", squeeze=False
    )
    for ax, s in zip(axes.flat, settings, strict=False):
        n_seeds: list[int] = []
        for name, colour, marker in zip(DRAWN, COLOURS, "o^vsDPX*", strict=True):
            if name not in s.curves:
                continue
            # FisherMask's mean, plus the mean difference on the seeds that both have.
            difference = (s.curves[name] - s.curves[OURS]).dropna()
            mean = s.curves[OURS].mean() + difference.mean()
            half = s.curves[name].loc[difference.index].sem()
            n_seeds.append(len(difference))
            ax.plot(mean.index, mean, color=colour, marker=marker, markersize=4, label=name)
            ax.fill_between(mean.index, mean - half, mean + half, color=colour, alpha=0.15, lw=0)
        ax.set_title(f"{s.dataset}\n{s.short} a batch ({span(n_seeds)} seeds)", fontsize=9)
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    for ax in axes.flat[len(settings) :]:
        ax.set_axis_off()
    for ax in axes[:, 0]:
        ax.set_ylabel("test accuracy")
    for ax in axes[-1]:
        ax.set_xlabel("labels")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(DRAWN), frameon=False)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def by_dataset(settings: list[Setting], cell: Callable[[Setting, str], str], caption: str) -> str:
    """A table for each data set: strategies in rows, its settings in columns."""
    tables = []
    for dataset in dict.fromkeys(s.dataset for s in settings):
        some = [s for s in settings if s.dataset == dataset]
        names = [n for n in STUDIED if any(n in s.scores for s in some)]
        rows = [[n, *(cell(s, n) if n in s.scores else "" for s in some)] for n in names]
        tables.append(table(["", *(s.short for s in some)], rows, f"{dataset}: {caption}"))
    return "\n".join(tables)


def accuracy_cell(s: Setting, name: str) -> str:
    mean = f"{s.scores[name]:.3f}"
    return f"**{mean}**" if name == s.regret.idxmin() else mean


def difference_cell(s: Setting, name: str) -> str:
    if name == OURS:
        return "—"
    values = s.difference(name)
    if len(values) < 2:
        return f"{signed(values.mean())} (one seed)"
    mark = ""
    if len(values) >= MIN_SEEDS:
        low, high = interval(values)
        mark = "▲ " if low > 0 else "▼ " if high < 0 else ""
    return f"{mark}{signed(values.mean())} ({error(values):.3f})"


def errors_reached(settings: list[Setting]) -> str:
    """How precise the comparison is, setting by setting."""
    rows = []
    for s in settings:
        errors = [error(s.difference(n)) for n in s.peers]
        numbers = ["—"] * 3
        if not np.isnan(errors).all():
            within = sum(value <= WANTED_ERROR for value in errors)
            numbers = [f"{np.median(errors):.4f}", f"{max(errors):.4f}"]
            numbers.append(f"{within} of {len(errors)}")
        rows.append([s.name, str(s.n_seeds), *numbers])
    head = ["Setting", "Seeds", "Median s.e.", "Largest s.e.", f"At most {WANTED_ERROR}"]
    return table(head, rows, "Standard errors of FisherMask minus a peer")


def confirming(setting: Setting, of: Round) -> pd.DataFrame:
    """The scores that decide about a round's candidates, of all that ran with its seeds."""
    names = [name for name in [*PEERS, OURS, *of.candidates] if name in setting.means]
    found = setting.means[names].filter(of.of(setting), axis=0).dropna(axis=1, how="all")
    return found.dropna()


def passes(scores: dict[str, pd.DataFrame], name: str) -> dict[str, Any]:
    """What the protocol asks of a candidate for the default, by the scores in each setting."""
    differences = {s: (x[name] - x[OURS]).to_numpy() for s, x in scores.items()}
    regret = pd.DataFrame({s: x.mean().max() - x.mean() for s, x in scores.items()})
    lost = []
    for setting, values in differences.items():
        tail = 0.05 / len(scores) / 2
        half = error(values) * stats.t.ppf(1 - tail, max(1, len(values) - 1))
        if values.mean() + half < 0:
            lost.append(setting)
    mean, low, high = bootstrap([*differences.values()])
    worst = [regret.loc[n].max() for n in (OURS, name)]
    return {
        "difference": f"{signed(mean)} ({signed(low)} to {signed(high)})",
        "mean": [regret.loc[n].mean() for n in (OURS, name)],
        "worst": worst,
        "lost": lost,
        "passes": bool(low > 0 and worst[1] < worst[0] and not lost),
    }


def defaults(settings: list[Setting], of: Round) -> str:
    """The candidates of a round, and what the protocol's test says."""
    settings = [s for s in settings if of.of(s)]
    scores = {s.name: confirming(s, of) for s in settings}
    seeds = min((len(x) for x in scores.values()), default=0)
    there = all({OURS, *of.candidates} <= set(x) for x in scores.values())
    if not seeds or not there or len(settings) < len(STUDY) + N_FIRST * bool(of.first_study):
        return "These runs have not been done in all settings yet: the default stays."
    rows, passed = [], []
    for name in of.candidates:
        found = passes(scores, name)
        row = [name, found["difference"]]
        row += [f"{a:.3f} → {b:.3f}" for a, b in (found["mean"], found["worst"])]
        row += ["; ".join(found["lost"]) or "none", "yes" if found["passes"] else "no"]
        rows.append(row)
        if found["passes"]:
            passed.append((found["worst"][1], name))
    if seeds < MIN_SEEDS:
        text = (
            f"Some setting has {seeds} of the {MIN_SEEDS} seeds yet that the protocol asks for, so "
            "nothing is decided: the default stays."
        )
    elif passed:
        best = min(passed)[1]
        text = f"**{best}** passes the test with the smallest worst regret."
        text += " It is the default." if best == DEFAULT else ""
    else:
        text = "None passes the test: the default stays."
    head = ["", f"Difference to {OURS}", "Mean regret", "Worst regret", "Lost", "Passes"]
    n_seeds = span([len(x) for x in scores.values()])
    caption = f"Candidates for the default: {len(settings)} settings, {n_seeds} seeds"
    return f"{text}\n\n{table(head, rows, caption)}"


def advice(settings: list[Setting]) -> str:
    """Recommendations that follow from the regrets, by rules."""
    found = regrets(settings)
    ours = [name for name in (OURS, DEFAULT) if name in found.index]
    found = found.loc[[name for name in found.index if name in [*PEERS, *ours]]]

    def of_ours(values: pd.Series) -> str:
        return ", ".join(f"{name}: {values[name]:.3f}" for name in [*ours, "random"])

    lines = []
    for kind, some in list(kinds_of(settings).items())[1:]:
        of_kind = found[[s.name for s in some]].mean(axis=1).sort_values()
        best, *others = of_kind.index[:3]
        lines.append(
            f"- **{kind.capitalize()} pool**: {best}, with a mean regret of {of_kind.iloc[0]:.3f}; "
            f"then {others[0]} ({of_kind.iloc[1]:.3f}) and {others[1]} ({of_kind.iloc[2]:.3f}). "
            f"{of_ours(of_kind)}."
        )
    worst = found.max(axis=1).sort_values()
    lines.append(
        f"- **You cannot tell**: {worst.index[0]} is never further than {worst.iloc[0]:.3f} from "
        f"the best. {of_ours(worst)}."
    )
    cheap = [n for n in worst.index if np.median([s.query_seconds(n) for s in settings]) < 1]
    if cheap:
        lines.append(
            f"- **A query must take less than a second** on pools of this size: {cheap[0]}, never "
            f"further than {worst[cheap[0]]:.3f} from the best."
        )
    return "\n".join(lines)


def setting_table(settings: list[Setting]) -> str:
    keys = ["n_initial", "n_queries", "pool_size", "test_size", "network", "trainings"]
    rows = [[s.name, str(s.n_seeds), *(str(s.info[k]) for k in keys)] for s in settings]
    head = ["Setting", "Seeds", "First labels", "Queries", "Pool, at most", "Test set, at most"]
    return table([*head, "Network", "Trainings"], rows, "What was run")


def first_study(settings: list[Setting]) -> str:
    """The eight settings of small networks from scratch, and every variant tried there."""
    variants = sorted({n for s in settings for n in s.curves} - set(STUDIED))
    rows = []
    for name in variants:
        some = [s for s in settings if name in s.curves]
        found = compared(some, lambda s: OURS, name)
        assert found is not None
        mean, low, high = found
        rows.append([name, str(len(some)), f"{signed(mean)} ({signed(low)} to {signed(high)})"])
    parts = [
        "Small convolutional networks trained from scratch, against the peers of 2020; the "
        "strategies that measure coverage, and random sampling, BAIT and FisherMask beside them, "
        "ran with other seeds later. A strategy is compared with FisherMask on the seeds that both "
        "have. Variants were chosen on the first 16 seeds of the digits and tried on all else; "
        "none was confirmed to be better than FisherMask as published.",
        CURVES.format("label_efficiency_first"),
        regret_table(settings),
        peer_table(settings, [n for n in PEERS if all(n in s.scores for s in settings)]),
    ]
    if rows:
        head = ["", "Settings", "Mean difference to FisherMask (95% interval)"]
        parts.append(table(head, rows, "Variants of FisherMask that were tried"))
    return "\n\n".join(parts)


def paper(settings: list[Setting]) -> str:
    """The paper's own setting, of few seeds: what they say, and no verdict."""
    lines = []
    for s in settings:
        mean = s.scores.sort_values(ascending=False)
        others = ", ".join(f"{name} {value:.3f}" for name, value in mean.items())
        lines.append(f"- {s.short} a batch, {s.n_seeds} seeds: {others}.")
    info = settings[0].info
    last = info["n_initial"] + info["n_queries"] * info["n_instances"]
    head = ["", *(s.short for s in settings)]
    names = [n for n in STUDIED if all(n in s.scores for s in settings)]
    differences = [[n, *(difference_cell(s, n) for s in settings)] for n in names]
    seconds = [[n, *(f"{s.query_seconds(n):.1f}" for s in settings)] for n in names]
    return PAPERS.format(
        first=info["n_initial"],
        last=last,
        lines="\n".join(lines),
        curves=CURVES.format("label_efficiency_paper"),
        details=folded(
            "Differences to FisherMask, and seconds of a query",
            table(head, differences, "mean accuracy minus FisherMask's (standard error)")
            + "\n"
            + table(head, seconds, "seconds of a query on one thread"),
        ),
    )


def of_pixels(settings: list[Setting]) -> str:
    """Whether coverage of pixels helps."""
    found = compared(settings, lambda s: OURS, pixels.SHARE)
    assert found is not None
    mean, low, high = found
    names = [name for name in pixels.COMPARED if name != OURS]
    rows = [
        [f"{pixels.CALLED[s.info['network']]}, {s.short}", *(difference_cell(s, n) for n in names)]
        for s in sorted(settings, key=lambda s: [*pixels.CALLED].index(s.info["network"]))
    ]
    info, seeds = settings[0].info, span([len(s.difference(pixels.SHARE)) for s in settings])
    return PIXELS.format(
        n_instances=info["n_instances"],
        n_initial=info["n_initial"],
        mean=f"{signed(mean)} ({signed(low)} to {signed(high)})",
        lies="lies" if low > 0 else "does not lie",
        protocol=PROTOCOL,
        table=table(
            ["", *names],
            rows,
            f"Mean accuracy minus FisherMask's (standard error), {seeds} seeds",
        ),
    )


def when_to_stop(found: pd.DataFrame, curves: pd.DataFrame) -> str:
    """Whether what is known before a batch tells what labels still gain."""
    best = str(found["one threshold"].idxmax())
    ours, count = [name for name in found.index if "objective" in name], [*found.index][-1]
    beaten = found.loc[ours, "one threshold"].max() > found.loc[count, "one threshold"]
    rows = [[name, *(f"{value:.2f}" for value in row)] for name, row in found.iterrows()]
    head = ["Before a batch", "Rank correlation, mean", "Lowest setting", "One threshold (AUC)"]
    return STOPPING.format(
        settings=len(curves[["dataset", "imbalance"]].drop_duplicates()),
        seeds=curves.seed.nunique(),
        labels=int(curves.n_labeled.max()),
        ahead=stopping.AHEAD,
        enough=stopping.ENOUGH,
        best=best,
        than="better than" if beaten else "no better than",
        table=table(head, rows, f"What tells the accuracy that {stopping.AHEAD} more batches gain"),
    )


PAGE = """\
..
   Written by benchmarks/study/report.py from the results in
   benchmarks/results/label_efficiency. Change those, not this file.

Label efficiency
================

{sentence}

.. image:: images/label_efficiency.png
   :alt: Accuracy of every strategy minus that of FisherMask, with intervals, by kind of pool.

What to use when
----------------

{advice}
- **Photographs as inputs**: coverage of pixels says little. On images of CIFAR-10 whose features a
  frozen pretrained network makes inside the net it did worse than FisherMask (:ref:`below
  <pixels>`), so the default covers no inputs that large. Give such features as the inputs.

{power}

Regret
------

The regret of a strategy in a setting is how far its accuracy is from that of the strategy that
came out best there. Nobody knows the best one beforehand, so a small worst regret is what a default
should have. Accuracy is the mean over the learning curve, on a balanced test set. The candidates
for the default have fewer seeds than the peers: each is compared with FisherMask on the seeds that
both have.

{regret}

Seconds are those of one query on one thread, a pool of {pool} samples and the networks below, the
lower quartile: the machine had other work.

FisherMask against each peer
----------------------------

{peers}
{default}
An interval is a bootstrap over settings and seeds; ▲ ours is better, ▼ it is worse. Without a
mark the two are not told apart, which is not to say that they are equal. The best peer of a setting
is found after the fact, which flatters it.

A better default?
-----------------

The candidates, the seeds and the test were written down before the runs that decide, in
``{protocol}``, twice.

First round. {first_round}

Second round. {second_round}

{extra}
Details
-------

{details}

.. _repeat-the-study:

Repeat it
---------

.. code-block:: console

   $ python -m benchmarks.study.run --study --data-dir output/data --first-seed 1 --seeds 8
   $ python -m benchmarks.study.report --results output/label_efficiency

A run that was stopped goes on where it was, and so do the committed results with ``--out
benchmarks/results/label_efficiency``. ``benchmarks/study/data.py`` says where the
data come from; ``--help`` lists the strategies; a data set of your own is a file with ``X_train``,
``y_train``, ``X_test`` and ``y_test``. The tool under it is
:func:`~skfishermask.active_learning_curve`.
"""

PAPERS = """\
The paper's setting
-------------------

A ResNet-18 trained from scratch on images of CIFAR-10 (JPEG), {first} to {last} labels; the paper
goes to 5,000 and beyond, on a GPU. Mean accuracy over the curve:

{lines}

So few seeds decide nothing; they are not part of the numbers above.

{curves}
{details}
"""

PIXELS = """\
.. _pixels:

Photographs as inputs
---------------------

Coverage is measured on what the net is given. Given images of CIFAR-10 (3,072 numbers) and batches
of {n_instances} from {n_initial} labels on, does it help a small convolutional network from
scratch, or a head on features of the images, as where a frozen pretrained network is a part of the
net? A share of the batch by the rule of ``coverage_share="auto"``, minus none: {mean}. That
{lies} above 0; unless it does, ``"auto"`` covers no inputs of more than 2,048 numbers, says
``{protocol}``.

{table}
"""

STOPPING = """\
When to stop
------------

``query_info_["objective"]`` has the objective before and after a batch. Does it say when more
labels gain little? Below are the mean curves of FisherMask up to {labels} labels in {settings}
settings, {seeds} seeds each, beside what else is known without a test set. The rank correlation,
in a setting, is that of a signal with the accuracy that the next {ahead} batches gain. To stop one
needs a threshold that is the same everywhere: the last column is the probability that the signal is
larger where {ahead} batches still gain {enough} than where they do not (0.5: it says nothing).

{table}
The best single threshold is on: {best}. One on the objective is {than} one on the number of labels.
"""

CURVES = """\
.. image:: images/{}.png
   :alt: Learning curves of some strategies, mean and standard error; FisherMask's mean, plus the
         mean difference to it on the seeds that both have.
"""

DONE = """\
In each seed a pool and a balanced test set are drawn, then the same initial samples and the same
initial weights go to every strategy. After each query the network is trained from scratch with
Adam until 99% of its training samples are right. The accuracy on the test set, averaged over the
whole learning curve, is the score of the run; strategies are compared seed by seed. Where a
setting has 2 trainings, two networks are trained on each labelled set and their accuracies
averaged; the first one is queried. Long-tailed pools: the class sizes fall exponentially from the
largest to the smallest, in an order of the classes drawn by the seed; at least one sample of each
class is among the first labels.

*CIFAR-10 features* are the 1,280 outputs of EfficientNet-lite0, trained on ImageNet and frozen, for
images of 128 pixels enlarged from CIFAR-10 (JPEG); the linear head sees their 32 leading principal
components. With a linear head FisherMask is BAIT without its backward step. *WordNet definitions*
are the mean token vectors of WordLlama, 256 numbers, for the definition of a noun; the classes are
its ten largest subjects. *Letters* are 16 numbers for a picture of one of the letters A to M, from
KEEL. MLP heads have 16 hidden units.

*FisherMask* is the method as published, ``coverage_share=0``; *FisherMask, coverage at first* is
the default, ``coverage_share="auto"``. All strategies get the same inputs, features and
probabilities. Random, entropy and margin sampling are modAL's or ours; k-center, BADGE, TypiClust,
DropQuery and MaxHerding are scikit-activeml's with their authors' settings; UHerding (Bae et al.
2025), TCM (Doucet et al. 2024) and BAIT Binary (Huseljic et al. 2024) are short code of ours in
``benchmarks/study/strategies.py``. TypiClust, MaxHerding, UHerding and DropQuery work on the
inputs, the first three at unit length; k-center and BADGE on the network's penultimate features.
BAIT is ``mask="output_layer", oversample=2.0``. ``coverage_share=1`` is UHerding with radius 1. TCM
takes TypiClust up to 5 labels a class: its authors advise an early change on pretrained features.
"""


def page_of(
    settings: list[Setting],
    docs: Path,
    stops: pd.DataFrame | None = None,
    photographs: Sequence[Setting] = (),
) -> str:
    """The page, and its pictures.

    `stops` is the table of :mod:`benchmarks.study.stopping`, `photographs` are the settings of
    :mod:`benchmarks.study.pixels`.
    """
    papers = [s for s in settings if s.info["dataset"] == PAPER]
    settings = [s for s in settings if s.info["dataset"] != PAPER]
    old = [s for s in settings if s.info["dataset"] in FIRST and not has_all(s)]
    new = [s for s in settings if has_all(s)] or old
    old = [] if new is old else old
    images = docs / "images"
    draw_differences(new, images / "label_efficiency.png")
    draw_curves(new, images / "label_efficiency_curves.png")
    peers = [n for n in PEERS if all(n in s.scores for s in new)]
    kinds = list(kinds_of(new).items())[1:]
    datasets = listed(list(dict.fromkeys(s.dataset for s in new)))
    seeds = min(s.n_seeds for s in new)
    measured = f"{len(peers)} other strategies in {len(new)} settings ({datasets})"
    if not enough(new):
        sentence = (
            f"Does FisherMask save labels? So far it was compared with {measured}, with "
            f"{seeds} {'seed' if seeds == 1 else 'seeds'} in each: a first look that decides "
            f"nothing. Verdicts need {MIN_SEEDS} seeds in every setting."
        )
    else:

        def told(ours: str) -> str:
            said = [f"on {kind} pools it {outcomes(some, peers, ours)}" for kind, some in kinds]
            return "; ".join(said) + "."

        sentence = f"Does FisherMask save labels? Of {measured} {told(OURS)}"
        if has_default(new):
            sentence += (
                f" That is the method as published. The default (*{DEFAULT}*) takes a share of the "
                f"batch by coverage of the inputs while labels are few: {told(DEFAULT)}"
            )
    first = new[0].info
    details = [
        folded("What was run", DONE + "\n" + setting_table(new)),
        folded("Learning curves", CURVES.format("label_efficiency_curves")),
        folded(
            "Mean accuracy",
            "In bold the best one of each setting.\n\n"
            + by_dataset(new, accuracy_cell, "mean accuracy"),
        ),
        folded(
            "Differences to FisherMask in each setting",
            "Standard errors in brackets; ▲ better and ▼ worse than FisherMask, where there are at "
            f"least {MIN_SEEDS} seeds and the 95% bootstrap interval over them excludes zero.\n\n"
            + by_dataset(new, difference_cell, "difference to FisherMask")
            + "\n"
            + errors_reached(new),
        ),
        folded(
            "Versions and machine",
            ", ".join(f"{k} {v}" for k, v in first["versions"].items())
            + f". {first['machine']['cores']} cores ({first['machine']['processor']}), one thread "
            f"a run, device {first['machine']['device']}.",
        ),
    ]
    if old:
        draw_curves(old, images / "label_efficiency_first.png")
        details.append(folded("The first study: small networks from scratch", first_study(old)))
    extra = ""
    if papers:
        draw_curves(papers, images / "label_efficiency_paper.png")
        extra += paper(papers) + "\n"
    if photographs:
        extra += of_pixels([*photographs]) + "\n"
    if stops is not None:
        extra += when_to_stop(stopping.judged(stops), stops) + "\n"
    return PAGE.format(
        extra=extra,
        sentence=sentence,
        advice=advice(new),
        power=power(new),
        regret=regret_table(new),
        pool=first["pool_size"],
        peers=peer_table(new, peers),
        default=peer_table(new, peers, DEFAULT) if has_default(new) else "",
        protocol=PROTOCOL,
        first_round=defaults(new, ROUNDS[0]),
        second_round=defaults(new + old, ROUNDS[1]),
        details="\n".join(details),
    )


def power(settings: list[Setting]) -> str:
    """What difference the study can see."""
    seeds = [s.n_seeds for s in settings]
    ours = {OURS: OURS, DEFAULT: "the default"}
    errors = {
        called: [error(s.difference(n, name)) for s in settings for n in s.peers]
        for name, called in ours.items()
        if all(name in s.scores for s in settings)
    }
    text = f"Seeds in each setting: {span(seeds)}."
    if min(seeds) < MIN_SEEDS:
        text += (
            f" With fewer than {MIN_SEEDS} this is a first look: intervals are too narrow, and a "
            "difference in one setting can be chance."
        )
    for called, values in errors.items():
        if not np.isnan(values).all():
            text += (
                f" The standard error of a difference between {called} and a peer in one setting "
                f"is {np.nanmedian(values):.4f} in the median and {np.nanmax(values):.4f} at most."
            )
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    options = parser.parse_args()
    settings = load(options.results)
    file = options.results / stopping.RESULTS.name
    stops = pd.read_csv(file) if file.exists() else None
    photographs = load(options.results.with_name(pixels.RESULTS.name))
    page = page_of(settings, options.docs, stops, photographs)
    (options.docs / "label_efficiency.rst").write_text(page)
    print(f"{len(settings)} settings: {options.docs / 'label_efficiency.rst'}")


if __name__ == "__main__":
    main()
