"""How often each strategy is more accurate than each other one."""

from pathlib import Path

import matplotlib.pyplot as plt

from benchmarks.study.results import (
    DEFAULT,
    PUBLISHED,
    compared_strategies,
    load,
    of_study,
    wins,
)

# The build runs the figures in their folder.
settings = of_study(load(Path("../../benchmarks/results/label_efficiency")))
names = compared_strategies(settings)
table = wins(settings, names)
labels = {DEFAULT: "FisherMask, coverage at first", PUBLISHED: "FisherMask as published"}
called = [labels.get(name, name) for name in names]

figure, axes = plt.subplots(figsize=(7.6, 6.4))
axes.imshow(table, cmap="RdBu", vmin=0, vmax=1)
for i, name in enumerate(names):
    for j, other in enumerate(names):
        if name != other:
            share = table.loc[name, other]
            colour = "white" if abs(share - 0.5) > 0.3 else "black"
            axes.text(
                j, i, f"{100 * share:.0f}", ha="center", va="center", fontsize=8, color=colour
            )
axes.set_xticks(range(len(names)), called, rotation=60, ha="left", rotation_mode="anchor")
axes.xaxis.tick_top()
axes.set_yticks(range(len(names)), called)
axes.tick_params(length=0)
axes.spines[:].set_visible(False)
for tick in (*axes.get_xticklabels(), *axes.get_yticklabels()):
    tick.set_fontweight("bold" if tick.get_text() == labels[DEFAULT] else "normal")
