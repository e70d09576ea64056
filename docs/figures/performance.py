"""The steps of a query beside the naive ways, from the file with the measurements."""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import FuncFormatter

# The build runs the figures in their folder.
result = json.loads(Path("../../benchmarks/results/query.json").read_text(encoding="utf-8"))[
    "query"
]
steps = ["diagonal", "embedding", "selection", "total"]
sides = [
    (result["ours"], "#4477AA", "skfishermask"),
    (result["theirs"]["kinder"], "0.75", "a plain loop"),
    (result["theirs"]["authors'"], "0.5", "the authors' way"),
]

figure, axes = plt.subplots(figsize=(6.4, 3.6))
y = np.arange(len(steps))
for offset, (spreads, colour, label) in zip((-0.27, 0, 0.27), sides, strict=True):
    seconds = [spreads[step]["median"] for step in steps]
    axes.barh(y + offset, seconds, height=0.25, color=colour, label=label)
    for at, value in zip(y + offset, seconds, strict=True):
        text = f"{value:,.0f}" if value >= 10 else f"{value:.2g}"
        axes.text(value * 1.08, at, text, va="center", fontsize=8)
axes.set_yticks(y, steps)
axes.invert_yaxis()
axes.set(xscale="log", xlabel="seconds")
axes.set_xlim(axes.get_xlim()[0] / 2, 2 * axes.get_xlim()[1])
axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
axes.spines[["top", "right"]].set_visible(False)
figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=9)
