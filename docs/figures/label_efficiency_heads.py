"""Points of accuracy that each strategy of the third round adds to random sampling."""

from pathlib import Path

import matplotlib.pyplot as plt

from benchmarks.study.third_round import ALONE, values

# The build runs the figures in their folder.
over_random = values(Path("../../benchmarks/results/label_efficiency_heads"))["over_random"]
kinds = ["balanced", "long-tailed"]
names = sorted(over_random["all"], key=lambda name: over_random["all"][name].mean)

figure, axes = plt.subplots(1, 2, figsize=(7.6, 0.34 * len(names) + 1.1), sharex=True, sharey=True)
for ax, kind in zip(axes, kinds, strict=True):
    for at, name in enumerate(names):
        found = over_random[kind][name]
        colour = "#CC3311" if name == ALONE else "0.5"
        ax.plot([100 * found.low, 100 * found.high], [at, at], color=colour, lw=2)
        ax.plot(100 * found.mean, at, "o", color=colour)
    ax.axvline(0, color="black", lw=1)
    ax.set_title(f"{kind} pools", fontsize=10)
    ax.set_yticks(range(len(names)), ["the default" if n == ALONE else n for n in names])
    ax.set_ylim(-0.6, len(names) - 0.4)
    ax.grid(axis="x", alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
figure.supxlabel("points of accuracy over random sampling, and 95% interval", fontsize=10)
