"""Write the page on label efficiency, and its pictures, from the committed results.

Run from the root of the repository::

    python -m benchmarks.label_efficiency_report
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

from benchmarks.strategies import FISHERMASK, PEERS, VARIANTS

RESULTS = Path("benchmarks/results/label_efficiency")
DATASETS = {"digits": "Digits", "fashion-mnist": "Fashion-MNIST", "cifar10": "CIFAR-10"}
OURS = "FisherMask"
# Drawn in the picture; the tables have all.
DRAWN = ["random", "margin", "BADGE", "BAIT", OURS, "FisherMask, 3 directions"]
COLOURS = ["0.45", "tab:orange", "tab:green", "tab:purple", "tab:blue", "tab:cyan"]
THREE = "FisherMask, 3 directions"
CORE = [*PEERS, OURS, "FisherMask, 1 direction", THREE, "FisherMask, lambda 0.01"]
# The ways to make it better.
TRIED = [THREE, *(f"{OURS}, {name}" for name in VARIANTS)]
UNWEIGHTED = "FisherMask, unweighted"
# A variant is chosen on the first seeds of one data set, and confirmed on all else.
CHOOSING = "digits"
N_CHOOSING = 16
WANTED_ERROR = 0.004
MIN_SEEDS = 8  # a bootstrap interval of fewer is too narrow
FEW = "too few seeds"


@dataclass
class Setting:
    """The results of one setting: data set, balance and batch size."""

    info: dict[str, Any]
    table: pd.DataFrame

    @property
    def name(self) -> str:
        ratio = self.info["imbalance"]
        balance = "balanced" if ratio == 1 else f"{ratio:g}:1"
        dataset = DATASETS.get(self.info["dataset"], self.info["dataset"])
        return f"{dataset}, {balance}, batches of {self.info['n_instances']}"

    @cached_property
    def curves(self) -> dict[str, pd.DataFrame]:
        """Of each strategy, accuracy by seed (rows) and number of labels (columns).

        The main strategies are cut to the seeds that all of them have.
        """
        found = {
            name: table.pivot(index="seed", columns="n_labeled", values="accuracy")
            for name, table in self.table.groupby("strategy", sort=False)
        }
        main = [name for name in CORE if name in found]
        shared = set.intersection(*(set(found[name].index) for name in main))
        return found | {name: found[name].loc[sorted(shared)] for name in main}

    def means(self, name: str) -> pd.Series:
        """Mean accuracy over the curve, by seed."""
        return self.curves[name].mean(axis=1)

    def differences(self, name: str, other: str) -> pd.Series:
        """Paired differences of mean accuracy, by the seeds that both have."""
        return (self.means(name) - self.means(other)).dropna()

    def difference(self, name: str, other: str) -> np.ndarray:
        """The same without the seeds."""
        return self.differences(name, other).to_numpy()

    def halves(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Differences to the default on the seeds that choose a variant, and on those that
        confirm it."""
        if name not in self.curves:
            return np.empty(0), np.empty(0)
        found = self.differences(name, OURS)
        chooses = (found.index < N_CHOOSING) & (self.info["dataset"] == CHOOSING)
        return found[chooses].to_numpy(), found[~chooses].to_numpy()

    @cached_property
    def best_peer(self) -> str:
        return max((n for n in PEERS if n in self.curves), key=lambda n: self.means(n).mean())

    def needed(self, name: str) -> float | None:
        """Labels at which the mean curve first reaches what random ends with, interpolated."""
        curve = self.curves[name].mean()
        best = np.maximum.accumulate(curve.to_numpy())
        wanted = self.curves["random"].mean().iloc[-1]
        return float(np.interp(wanted, best, curve.index)) if best[-1] >= wanted else None

    def query_seconds(self, name: str) -> float:
        return float(self.table.loc[self.table.strategy == name, "query_time"].median())


def load(folder: Path) -> list[Setting]:
    names = {name: f"{OURS}, {name}" for name in VARIANTS}
    settings = [
        Setting(
            json.loads(file.read_text()),
            pd.read_csv(file.with_name("results.csv")).replace({"strategy": names}),
        )
        for file in sorted(folder.glob("*/setting.json"))
    ]
    settings = [s for s in settings if {"random", OURS} <= set(s.curves)]
    order = {name: i for i, name in enumerate(DATASETS)}
    return sorted(
        settings,
        key=lambda s: (order.get(s.info["dataset"], 9), s.info["imbalance"], s.info["n_instances"]),
    )


def error(values: np.ndarray) -> float:
    """Standard error of a mean."""
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else np.nan


def interval(values: np.ndarray) -> tuple[float, float]:
    """95% percentile interval of the mean over 10,000 resamples of the seeds."""
    rng = np.random.default_rng(0)
    means = values[rng.integers(len(values), size=(10_000, len(values)))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def verdict(values: np.ndarray) -> str:
    if len(values) < MIN_SEEDS:
        return FEW
    low, high = interval(values)
    return "win" if low > 0 else "loss" if high < 0 else "tie"


def compared(values: np.ndarray) -> tuple[str, str]:
    """The mean difference and its interval, for a table."""
    low, high = interval(values)
    return signed(values.mean()), f"{signed(low)} to {signed(high)}"


def signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")  # noqa: RUF001


def table(head: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> str:
    lines = [f".. list-table:: {caption}", "   :header-rows: 1", "   :stub-columns: 1", ""]
    for row in [head, *rows]:
        for i, cell in enumerate(row):
            lines.append(f"   {'*' if i == 0 else ' '} - {cell}")
    return "\n".join(lines) + "\n"


def heading(text: str, line: str = "-") -> str:
    return f"{text}\n{line * len(text)}\n"


def present(settings: list[Setting], names: Sequence[str]) -> list[str]:
    return [name for name in names if any(name in s.curves for s in settings)]


def by_setting(
    settings: list[Setting],
    names: Sequence[str],
    cell: Callable[[Setting, str], str],
    caption: str,
) -> str:
    rows = [
        [name, *(cell(s, name) if name in s.curves else "" for s in settings)]
        for name in present(settings, names)
    ]
    return table(["", *(s.name for s in settings)], rows, caption)


def accuracy_cell(s: Setting, name: str) -> str:
    mean = f"{s.means(name).mean():.3f}"
    return f"**{mean}**" if name == s.best_peer else mean


def difference_cell(other: Callable[[Setting], str]) -> Callable[[Setting, str], str]:
    def cell(s: Setting, name: str) -> str:
        if name == other(s):
            return "—"
        values = s.difference(name, other(s))
        if len(values) < 2:
            return "one seed"
        mark = {"win": "▲ ", "loss": "▼ "}.get(verdict(values), "")
        return f"{mark}{signed(values.mean())} ({error(values):.3f})"

    return cell


def needed_cell(s: Setting, name: str) -> str:
    needed, budget = s.needed(name), s.curves[name].columns[-1]
    return f"> {budget}" if needed is None else f"{needed:.0f}"


def against_best_peer(settings: list[Setting], name: str) -> str:
    """Where a strategy beats the best peer, ties or loses: a sentence and a table."""
    groups: dict[str, list[str]] = {"win": [], "tie": [], "loss": [], FEW: []}
    rows = []
    for s in settings:
        if name in s.curves:
            values = s.difference(name, s.best_peer)
            found = verdict(values)
            groups[found].append(s.name)
            rows.append([s.name, s.best_peer, *compared(values), str(len(values)), found])
    words = {
        "win": "beats the best peer, with an interval that excludes zero, in",
        "tie": "cannot be told from it in",
        "loss": "loses to it, with an interval that excludes zero, in",
    }
    parts = [
        f"{words[kind]} {len(found)} ({'; '.join(found)})" if found else f"{words[kind]} none"
        for kind, found in groups.items()
        if kind != FEW
    ]
    text = f"Of {len(rows)} settings, **{name}** {', '.join(parts)}."
    if groups[FEW]:
        text += f" In {len(groups[FEW])} there were too few seeds to say (fewer than {MIN_SEEDS})."
    head = ["Setting", "Best peer", "Difference", "95% interval", "Seeds", ""]
    return f"{text}\n\n{table(head, rows, f'{name} against the best peer')}"


def counts(settings: list[Setting], names: Sequence[str]) -> str:
    rows = []
    for name in present(settings, names):
        row = [name]
        for other in (lambda s: "random", lambda s: s.best_peer):
            compared = [
                s.difference(name, other(s))
                for s in settings
                if name in s.curves and name != other(s)
            ]
            compared = [values for values in compared if len(values) >= MIN_SEEDS]
            found = [verdict(values) for values in compared]
            row.append(" / ".join(str(found.count(k)) for k in ("win", "tie", "loss")))
            means = [values.mean() for values in compared]
            row.append(signed(float(np.mean(means))) if means else "—")
        rows.append(row)
    head = [
        "",
        "random: win / tie / loss",
        "mean difference",
        "best peer: win / tie / loss",
        "mean difference",
    ]
    return table(head, rows, "Over all settings in which the strategy was run")


def draw(settings: list[Setting], file: Path) -> None:
    columns = 2
    rows = -(-len(settings) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(9, 3.1 * rows), layout="constrained", squeeze=False
    )
    for ax, s in zip(axes.flat, settings, strict=False):
        for name, colour, marker in zip(DRAWN, COLOURS, "o^vsDP", strict=True):
            if name not in s.curves:
                continue
            curve = s.curves[name]
            mean, half = curve.mean(), curve.sem()
            ax.plot(mean.index, mean, color=colour, marker=marker, markersize=4, label=name)
            ax.fill_between(mean.index, mean - half, mean + half, color=colour, alpha=0.15, lw=0)
        ax.set_title(f"{s.name} ({len(s.curves[OURS])} seeds)", fontsize=10)
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    for ax in axes.flat[len(settings) :]:
        ax.set_axis_off()
    for ax in axes[:, 0]:
        ax.set_ylabel("test accuracy")
    for ax in axes[-1]:
        ax.set_xlabel("labels")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def errors_reached(settings: list[Setting]) -> str:
    """How precise the comparison is, setting by setting."""
    rows = []
    for s in settings:
        errors = {
            name: error(s.difference(name, s.best_peer))
            for name in CORE
            if name in s.curves and name != s.best_peer
        }
        worst = max(errors.values())
        enough = [name for name, value in errors.items() if value <= WANTED_ERROR]
        rows.append(
            [
                s.name,
                str(len(s.curves[OURS])),
                s.best_peer,
                f"{np.median(list(errors.values())):.4f}",
                f"{worst:.4f}",
                f"{len(enough)} of {len(errors)}",
            ]
        )
    head = [
        "Setting",
        "Seeds",
        "Best peer",
        "Median s.e.",
        "Largest s.e.",
        f"At most {WANTED_ERROR}",
    ]
    return table(head, rows, "Standard errors of the paired differences to the best peer")


def stratified(parts: Sequence[np.ndarray]) -> tuple[float, float, float]:
    """Mean of the settings' means, and its 95% interval: seeds are resampled by setting."""
    rng = np.random.default_rng(0)
    means = [x[rng.integers(len(x), size=(10_000, len(x)))].mean(axis=1) for x in parts]
    low, high = np.quantile(np.mean(means, axis=0), [0.025, 0.975])
    return float(np.mean([x.mean() for x in parts])), float(low), float(high)


def tried(settings: list[Setting]) -> str:
    """Every variant, the one that the first half of the runs chooses, and what the other says."""
    names = present(settings, TRIED)
    first = {
        name: [x for s in settings if len(x := s.halves(name)[0]) >= MIN_SEEDS] for name in names
    }
    n_settings = max(map(len, first.values()))
    chosen = max(
        (name for name in names if len(first[name]) == n_settings),
        key=lambda name: np.mean([x.mean() for x in first[name]]),
    )
    cells = {
        (s.name, name): f"{signed(x.mean())} ({error(x):.3f}, {len(x)} seeds)"
        for s in settings
        for name in names
        if len(x := s.halves(name)[0])
    }
    columns = [s.name for s in settings if any((s.name, name) in cells for name in names)]
    choosing = table(
        ["", *columns],
        [[name, *(cells.get((column, name), "") for column in columns)] for name in names],
        "To choose by: difference of mean accuracy to FisherMask (standard error)",
    )
    second = {s.name: x for s in settings if len(x := s.halves(chosen)[1]) >= MIN_SEEDS}
    text = (
        f"On the first {N_CHOOSING} seeds of {DATASETS[CHOOSING]} the variants were compared with "
        f"the default. Of those that were run in all of its {n_settings} settings the one with "
        "the largest mean difference is the candidate; it becomes the default only if it wins over "
        "the other seeds and the other data, which had no part in the choice.\n\n"
        f"{choosing}\nThe candidate is **{chosen}**."
    )
    if not second:
        return text + " It was not tried on other seeds yet, so the default stays.\n"
    mean, low, high = stratified([*second.values()])
    lost = [name for name, x in second.items() if verdict(x) == "loss"]
    outcome = (
        "It wins, so it is the default now."
        if low > 0 and not lost
        else "That is no win, so the default stays."
    )
    rows = [[name, *compared(x), str(len(x)), verdict(x)] for name, x in second.items()]
    confirming = table(
        ["Setting", "Difference", "95% interval", "Seeds", ""],
        rows,
        f"To confirm by: {chosen}, difference to FisherMask",
    )
    return (
        f"{text} On the other seeds and data:\n\n{confirming}\nOver these settings its "
        f"difference to the default is {signed(mean)}, 95% interval {signed(low)} to "
        f"{signed(high)}; it loses in {len(lost)} of {len(second)}. {outcome}\n"
    )


def setting_table(settings: list[Setting]) -> str:
    rows = []
    for s in settings:
        i = s.info
        rows.append(
            [s.name]
            + [
                str(i[k])
                for k in "n_initial n_queries pool_size test_size network trainings".split()  # noqa: SIM905
            ]
        )
    head = [
        "Setting",
        "First labels",
        "Queries",
        "Pool, at most",
        "Test set",
        "Network",
        "Trainings",
    ]
    return table(head, rows, "What was run")


PAGE = """\
..
   Written by benchmarks/label_efficiency_report.py from the results in
   benchmarks/results/label_efficiency. Change those, not this file.

Label efficiency
================

The reason to query is fewer labels for the same accuracy. This page says what we measured, also
where FisherMask loses. Every number on it is computed from the results in
``benchmarks/results/label_efficiency``; see :ref:`repeat-the-study`.

.. image:: images/label_efficiency.png
   :alt: Learning curves of six query strategies in each setting, mean and standard error.
   :class: dark-light

In short
--------

{sentences}

"The best peer" is the strategy with the highest mean accuracy among random, entropy, margin,
k-center, BADGE, BAIT and BAIT Binary *in that setting, on these seeds*. It is picked after the
fact, which flatters it.

{power}

What was done
-------------

In each seed a pool and a balanced test set are drawn, then the same initial samples and the same
initial weights go to every strategy. After each query the network is trained from scratch with
Adam until 99% of its training samples are right. The accuracy on the test set, averaged over the
whole learning curve, is the score of the run; strategies are compared seed by seed. Where a
setting says "2 trainings", two networks are trained on each labelled set and their accuracies
averaged; the first one is queried. Imbalanced pools are long-tailed: the class sizes fall
exponentially from the largest to the smallest, in an order of the classes drawn by the seed; at
least one sample of each class is among the first labels.

{settings}

The network is a small convolutional one (two convolutions, 32 hidden units). Random, entropy and
margin sampling are modAL's or ours, k-center and BADGE scikit-activeml's on the same network's
features and probabilities. BAIT is ``mask="output_layer", oversample=2.0``; BAIT Binary is the
cheap variant of Huseljic et al. (2024), through :func:`~skfishermask.select_batch`.

Versions: {versions}. Machine: {machine}.

{errors}

Mean accuracy
-------------

{accuracy}

In bold the best peer. Below, the paired difference to it with its standard error; ▲ and ▼ where
the 95% bootstrap interval over the seeds excludes zero.

{against_peer}

{against_random}

{counts}

Labels needed
-------------

Labels at which the mean curve reaches what random sampling reaches with the whole budget.

{needed}

What a query costs
------------------

{seconds}

The runs shared two cores with other work, so the seconds say which is cheaper, not how fast a
quiet machine is.
{ablation}{variants}
What to use when
----------------

{advice}

.. _repeat-the-study:

Repeat it
---------

.. code-block:: console

   $ python -m benchmarks.label_efficiency --dataset digits --n-instances 20 --n-queries 5 \\
         --trainings 2 --seeds 12
   $ python -m benchmarks.label_efficiency --dataset fashion-mnist --data-dir data --download \\
         --imbalance 50 --n-initial 50 --n-instances 100 --n-queries 3
   $ python -m benchmarks.label_efficiency_report --results output/label_efficiency

A run that was stopped goes on where it was. ``--help`` lists the strategies; a data set of your
own is a file with ``X_train``, ``y_train``, ``X_test`` and ``y_test``. The tool under it is
:func:`~skfishermask.active_learning_curve`.
"""


def advice(settings: list[Setting]) -> str:
    """Recommendations that follow from the tables, by rules."""
    names = present(settings, CORE)
    shared = [s for s in settings if all(n in s.curves for n in names)]
    means = {n: float(np.mean([s.means(n).mean() for s in shared])) for n in names if shared}
    ranking = sorted(means, key=lambda n: -means[n])
    lines = []
    if shared:
        order = ", ".join(f"{n} ({means[n]:.3f})" for n in ranking)
        lines = [
            f"Ranked by mean accuracy over the {len(shared)} settings in which all of these were "
            f"run: {order}.",
            "",
        ]
    cheap = [n for n in ("margin", "BADGE", "entropy") if n in ranking]
    for n in cheap:
        cost = np.median([s.query_seconds(OURS) / max(s.query_seconds(n), 1e-9) for s in settings])
        gap = np.mean([s.difference(OURS, n).mean() for s in settings])
        lines.append(
            f"- A FisherMask query took {cost:.0f} times as long as one by {n} on these small "
            f"networks, for a mean difference of {signed(float(gap))}."
        )
    if both := [s for s in settings if THREE in s.curves]:
        cost = np.median([s.query_seconds(THREE) / s.query_seconds(OURS) for s in both])
        gap = np.mean([s.difference(THREE, OURS).mean() for s in both])
        lines.append(
            f"- Three directions instead of all cost {cost:.2f} of the time, for a mean difference "
            f"of {signed(float(gap))}."
        )
    if both := [s for s in settings if UNWEIGHTED in s.curves]:
        gap = np.mean([s.difference(UNWEIGHTED, OURS).mean() for s in both])
        lines.append(
            "- Without the probability weights, as in the authors' code, the mean difference to "
            f"FisherMask is {signed(float(gap))}."
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    options = parser.parse_args()
    settings = load(options.results)
    draw(settings, options.docs / "images" / "label_efficiency.png")
    best = difference_cell(lambda s: s.best_peer)
    ablation = variants = ""
    masks = [n for n in FISHERMASK if "mask" in n[10:] or "layer" in n or n.endswith("parameters")]
    if present(settings, masks):
        ablation = (
            "\n"
            + heading("Masks, weights and hybrid")
            + "\nPaired differences to the default: the global mask, rows weighted by the "
            "probabilities.\n\n"
            + by_setting(
                [s for s in settings if any(n in s.curves for n in masks)],
                [n for n in FISHERMASK if n not in CORE],
                difference_cell(lambda s: OURS),
                "Difference of mean accuracy to FisherMask (standard error)",
            )
        )
    if present(settings, TRIED):
        variants = "\n" + heading("What was tried to make it better") + "\n" + tried(settings)
    first = settings[0].info
    page = PAGE.format(
        sentences="\n".join(against_best_peer(settings, n) for n in (OURS, THREE)),
        power=power(settings),
        settings=setting_table(settings),
        versions=", ".join(f"{k} {v}" for k, v in first["versions"].items()),
        machine=f"{first['machine']['cores']} cores ({first['machine']['processor']}), one thread "
        f"a run, device {first['machine']['device']}",
        errors=errors_reached(settings),
        accuracy=by_setting(settings, CORE, accuracy_cell, "Mean accuracy over the learning curve"),
        against_peer=by_setting(settings, CORE, best, "Difference to the best peer"),
        against_random=by_setting(
            settings, CORE, difference_cell(lambda s: "random"), "Difference to random sampling"
        ),
        counts=counts(settings, CORE),
        needed=by_setting(settings, CORE, needed_cell, "Labels needed"),
        seconds=by_setting(
            settings,
            [*CORE, *(n for n in FISHERMASK if n not in CORE)],
            lambda s, n: f"{s.query_seconds(n):.2f}",
            "Seconds a query, median",
        ),
        ablation=ablation,
        variants=variants,
        advice=advice(settings),
    )
    (options.docs / "label_efficiency.rst").write_text(page)
    print(f"{len(settings)} settings: {options.docs / 'label_efficiency.rst'}")


def power(settings: list[Setting]) -> str:
    """What difference the study can see."""
    found = [s.difference(OURS, s.best_peer) for s in settings]
    errors = [error(values) for values in found if len(values) >= MIN_SEEDS]
    if not errors:
        return f"No setting has {MIN_SEEDS} seeds yet."
    return (
        f"Where there are at least {MIN_SEEDS} seeds, the standard error of the paired difference "
        f"between FisherMask and the best peer is {min(errors):.4f} to {max(errors):.4f}, so "
        f"differences below about {2.8 * min(errors):.3f} to {2.8 * max(errors):.3f} (2.8 standard "
        "errors) are likely to be missed. A tie here means: not told apart, not equal."
    )


if __name__ == "__main__":
    main()
