"""Learning curves of some strategies in each setting."""

from pathlib import Path

import matplotlib.pyplot as plt

from benchmarks.study.results import DEFAULT, PUBLISHED, RANDOM, load, of_study

# The build runs the figures in their folder.
settings = of_study(load(Path("../../benchmarks/results/label_efficiency")))
drawn = {
    RANDOM: ("0.45", "o"),
    "margin": ("#EE7733", "^"),
    "BADGE": ("#228833", "v"),
    "MaxHerding": ("#EE3377", "D"),
    "UHerding": ("#AA7744", "P"),
    PUBLISHED: ("#4477AA", "s"),
    DEFAULT: ("#CC3311", "*"),
}
labels = {DEFAULT: "FisherMask (default)", PUBLISHED: "FisherMask as published"}

n_columns = min(4, len(settings))
n_rows = -(-len(settings) // n_columns)
figure, axes = plt.subplots(
    n_rows, n_columns, figsize=(3 * n_columns, 2.5 * n_rows + 0.6), squeeze=False
)
for ax, setting in zip(axes.flat, settings, strict=False):
    for name, (colour, marker) in drawn.items():
        if name not in setting.curves:
            continue
        # The published method's mean, plus the mean difference on the seeds that both have.
        mine, published = setting.paired(name, PUBLISHED)
        mean = setting.curves[PUBLISHED].mean() + (mine - published).mean()
        error = mine.sem()
        ax.plot(mean.index, mean, color=colour, marker=marker, markersize=4, label=name)
        ax.fill_between(mean.index, mean - error, mean + error, color=colour, alpha=0.15, lw=0)
    ax.set_title(f"{setting.dataset}\n{setting.short} a batch", fontsize=8)
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
for ax in axes.flat[len(settings) :]:
    ax.set_axis_off()
figure.supxlabel("labels")
figure.supylabel("test accuracy")
handles, names = axes.flat[0].get_legend_handles_labels()
figure.legend(
    handles,
    [labels.get(name, name) for name in names],
    loc="outside upper center",
    ncols=len(drawn),
    frameon=False,
    fontsize=9,
)
