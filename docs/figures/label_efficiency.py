"""Points of accuracy that each strategy adds to random sampling, by kind of pool."""

from pathlib import Path

import matplotlib.pyplot as plt

from benchmarks.study.results import (
    DEFAULT,
    PUBLISHED,
    RANDOM,
    by_kind,
    compare,
    compared_strategies,
    load,
    of_study,
)

# The build runs the figures in their folder.
settings = of_study(load(Path("../../benchmarks/results/label_efficiency")))
names = [name for name in compared_strategies(settings) if name != RANDOM]
labels = {DEFAULT: "FisherMask, coverage at first", PUBLISHED: "FisherMask as published"}
colours = {DEFAULT: "#CC3311", PUBLISHED: "#4477AA"}
kinds = by_kind(settings)

figure, axes = plt.subplots(
    1, len(kinds), figsize=(7.6, 0.28 * len(names) + 1.1), sharex=True, sharey=True, squeeze=False
)
rows = range(len(names), 0, -1)
for ax, (kind, some) in zip(axes.flat, kinds.items(), strict=True):
    for at, name in zip(rows, names, strict=True):
        found = compare(some, name, RANDOM)
        colour = colours.get(name, "0.5")
        ax.plot([100 * found.low, 100 * found.high], [at, at], color=colour, lw=2)
        ax.plot(100 * found.mean, at, "o", color=colour)
    ax.axvline(0, color="black", lw=1)
    ax.set_title(f"{kind} pools ({len(some)} settings)", fontsize=10)
    ax.set_yticks(rows, [labels.get(name, name) for name in names])
    ax.grid(axis="x", alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
for tick, name in zip(axes[0, 0].get_yticklabels(), names, strict=True):
    tick.set_color(colours.get(name, "black"))
    tick.set_fontweight("bold" if name == DEFAULT else "normal")
figure.supxlabel("points of accuracy over random sampling, and 95% interval", fontsize=10)
