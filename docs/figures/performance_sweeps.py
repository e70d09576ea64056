"""How the parts of a query grow, on logarithmic scales, from the files with the measurements."""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

# The build runs the figures in their folder.
folder = Path("../../benchmarks/results")
sweeps = []
for name in ("embedding", "selection", "query"):
    sweeps += json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))["sweeps"]
# Ours first in each sweep; what it is compared with, in the colours below.
others = {
    "floor": ("0.55", "one product of the embeddings"),
    "C ordinary backward passes": ("#CCBB44", "C ordinary backward passes"),
    "naive step, float32, two products": ("#EE6677", "naive step, two products"),
}

figure, panels = plt.subplots(2, -(-len(sweeps) // 2), figsize=(8.4, 5.4))
for axes, sweep in zip(panels.flat, sweeps, strict=False):
    sizes = np.array(sweep["sizes"])
    lines = sorted(sweep["lines"].items(), key=lambda item: item[1]["seconds"][-1]["median"])
    ends = np.array([line["seconds"][-1]["median"] for _, line in lines])
    for rank, (name, line) in enumerate(lines):
        colour, label = others.get(name, ("#4477AA", "skfishermask"))
        median, low, high = (
            np.array([spread[key] for spread in line["seconds"]])
            for key in ("median", "min", "max")
        )
        error = np.stack([median - low, high - median])
        axes.errorbar(sizes, median, error, fmt="o", ms=3.5, color=colour, label=label)
        intercept = np.log(median).mean() - line["exponent"] * np.log(sizes).mean()
        axes.plot(sizes, np.exp(intercept + line["exponent"] * np.log(sizes)), color=colour, lw=1)
        near = np.flatnonzero(np.abs(np.log(ends / ends[rank])) < np.log(3))
        axes.annotate(
            f"{line['exponent']:.2f}",
            (sizes[-1], median[-1]),
            # Apart, where two lines end together.
            xytext=(5, 9 * (rank - near.mean())),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=colour,
        )
    axes.set(xscale="log", yscale="log", xlabel=f"${sweep['over']}$")
    axes.set_title(sweep["measured"], fontsize=10)
    axes.margins(x=0.25, y=0.15)
    # A slope of 1 is a diagonal in every panel.
    axes.set_aspect("equal", adjustable="datalim")
    axes.xaxis.set_major_locator(FixedLocator(sizes[[0, -1]]))
    axes.xaxis.set_minor_locator(FixedLocator(sizes[1:-1]))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.tick_params(labelsize=8)
    lowest = min(spread["median"] for _, line in lines for spread in line["seconds"])
    if np.log(ends[-1] / lowest) > 3 * np.log(sizes[-1] / sizes[0]):
        # Between its ends the axis is too short for their numbers.
        for tick, side in zip(axes.xaxis.get_major_ticks(2), ("right", "left"), strict=True):
            tick.label1.set_horizontalalignment(side)
    axes.spines[["top", "right"]].set_visible(False)
for axes in panels.flat[len(sweeps) :]:
    axes.set_axis_off()
for axes in panels[:, 0]:
    axes.set_ylabel("seconds")
found = {}
for axes in panels.flat:
    handles, labels = axes.get_legend_handles_labels()
    found |= dict(zip(labels, handles, strict=True))
found = {"skfishermask": found["skfishermask"], **found}
figure.legend(found.values(), found, loc="outside upper center", ncols=2, frameon=False, fontsize=9)
