"""The steps of a query beside the authors' way, from the file with the measurements."""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

# The build runs the figures in their folder.
path = Path("../../benchmarks/results/query_resnet18.json")
result = json.loads(path.read_text())
steps = ["diagonal", "embedding", "selection", "total"]
ours = [result["ours, seconds"][step]["median"] for step in steps]
theirs = [result["authors' way, seconds, scaled"][step] for step in steps]

figure, axes = plt.subplots(figsize=(5.6, 3.0))
y = np.arange(len(steps))
for offset, seconds, colour, label in (
    (-0.2, ours, "#4477AA", "skfishermask"),
    (0.2, theirs, "0.6", "the authors' way, scaled"),
):
    axes.barh(y + offset, seconds, height=0.36, color=colour, label=label)
    for at, value in zip(y + offset, seconds, strict=True):
        axes.text(value * 1.08, at, f"{value:,.0f}", va="center", fontsize=9)
axes.set_yticks(y, steps)
axes.invert_yaxis()
axes.set(xscale="log", xlabel="seconds", xlim=(1, 9000))
axes.spines[["top", "right"]].set_visible(False)
figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=9)
