"""
Comparing strategies
====================

Which query strategy needs fewer labels on *your* data? :func:`~skfishermask.active_learning_curve`
runs the loop over the splits of a cross-validation, and
:class:`~skfishermask.ActiveLearningCurveDisplay` draws the curves. This example compares four
strategies on the breast cancer data, keeps what it has computed in a folder, and reads the result
with care.
"""

# %%
# One strategy, one call
# ----------------------
#
# The function is called like :func:`~sklearn.model_selection.cross_validate`. In every split the
# training part is the pool: ten labels at first, then ten more with each of five queries, and the
# test part for the scores. :class:`~sklearn.model_selection.StratifiedShuffleSplit` gives as many
# splits as we want.

import tempfile
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from modAL.uncertainty import entropy_sampling
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import StratifiedShuffleSplit
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from skorch import NeuralNetClassifier
from torch import nn

from skfishermask import (
    PUBLISHED,
    ActiveLearningCurveDisplay,
    FisherMaskSampler,
    active_learning_curve,
)

X, y = load_breast_cancer(return_X_y=True)
X = X.astype("float32")


class Network(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(30, 16), nn.ReLU(), nn.Linear(16, 2))


net = NeuralNetClassifier(
    Network,
    criterion=nn.CrossEntropyLoss,
    optimizer=torch.optim.Adam,
    lr=0.01,
    max_epochs=30,
    batch_size=32,
    train_split=None,
    verbose=0,
)
estimator = make_pipeline(StandardScaler(), net)
experiment = {
    "n_initial": 10,
    "n_instances": 10,
    "n_queries": 5,
    "cv": StratifiedShuffleSplit(6, test_size=0.5, random_state=0),
    "random_state": 0,
}
result = active_learning_curve(estimator, X, y, query_strategy="random", **experiment)
for name, values in result.items():
    print(f"{name:<11} {values.shape}")

# %%
# The result is a dict of arrays: the numbers of labels; a row of scores and of seconds for every
# split.
#
# Several strategies, and a folder
# --------------------------------
#
# A strategy is ``"random"``, or what modAL takes as a query strategy. Here are modAL's entropy
# sampling; BAIT, the method that FisherMask generalises, which looks at the output layer alone; and
# FisherMask. As the seeds depend on ``random_state`` and on the split alone, all of them start from
# the same labels and the same weights, and can be compared split by split.
#
# Such a comparison can run for days, so it is kept in a folder as it goes: what ``checkpoint``
# holds is not computed again. To show it, we ask for two splits first and then for all six.

strategies = {
    "random": "random",
    "entropy": entropy_sampling,
    "BAIT": FisherMaskSampler(
        **PUBLISHED | {"mask": "output_layer", "oversample": 2.0}, batch_size=256
    ),
    "FisherMask": FisherMaskSampler(batch_size=256),
}
folder = tempfile.TemporaryDirectory()


def compare(**changes):
    start = time.perf_counter()
    results = {
        name: active_learning_curve(
            estimator,
            X,
            y,
            query_strategy=strategy,
            checkpoint=Path(folder.name) / name,
            **experiment | changes,
        )
        for name, strategy in strategies.items()
    }
    print(f"{time.perf_counter() - start:6.1f} s")
    return results


results = compare(cv=StratifiedShuffleSplit(2, test_size=0.5, random_state=0))
results = compare()
results = compare()

# %%
# The last call took no time worth speaking of: everything was in the folder. A run that was killed
# goes on in the same way, and ends in the same numbers.
#
# Drawing the curves
# ------------------
#
# :class:`~skfishermask.ActiveLearningCurveDisplay` draws means and bands. The same results with two
# kinds of band: on the left the standard deviation over the splits, on the right the standard error
# of the mean.

# Colours that colour-blind readers can tell apart.
plt.rcParams["axes.prop_cycle"] = plt.cycler(color=["0.4", "#d55e00", "#009e73", "#0072b2"])
figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True, layout="constrained")
for ax, band in zip(axes, ["std", "sem"], strict=True):
    ActiveLearningCurveDisplay.from_results(results, ax=ax, band=band, score_label="Test accuracy")
    ax.set_title(f'band="{band}"')
    ax.set_xticks(result["n_labeled"])
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
axes[1].set_ylabel("")
plt.show()

# %%
# The left band answers: how much does it depend on luck, on the split and the first ten labels,
# what I get from *one* run? With ten labels the answer is several hundredths, more than any
# strategy brings. The right band answers: how sure is the *mean* of these six runs? Neither says
# directly whether one strategy is better than another, and that the bands overlap does not mean
# there is no difference.
#
# Paired differences
# ------------------
#
# Much of the luck is common to all strategies: a split that is easy for one is easy for the others.
# Taken split by split, it drops out. The grey lines are the splits, the coloured ones their mean
# with its standard error.


colours = {"entropy": "C1", "BAIT": "C2", "FisherMask": "C3"}
n_labels, baseline = results["random"]["n_labeled"], results["random"]["test_score"]
figure, axes = plt.subplots(1, 3, figsize=(10, 3.6), sharey=True, layout="constrained")
for ax, (name, colour) in zip(axes, colours.items(), strict=True):
    gap = results[name]["test_score"] - baseline
    mean, error = gap.mean(axis=0), gap.std(axis=0, ddof=1) / np.sqrt(len(gap))
    ax.axhline(0, color="0.3", lw=1)
    ax.plot(n_labels, gap.T, color="0.75", lw=0.8)
    ax.errorbar(n_labels, mean, error, color=colour, marker="o", markersize=5, capsize=3, lw=2)
    ax.set(title=f"{name} less random", xlabel="Labelled samples", xticks=n_labels)
    ax.spines[["top", "right"]].set_visible(False)
axes[0].set_ylabel("difference in test accuracy")
plt.show()

# %%
# Five points in a row tempt to pick the best one. It is fairer to decide beforehand on one number:
# here the difference, averaged over all five queries.

print("mean difference to random, with its standard error")
for name in colours:
    area = (results[name]["test_score"] - baseline)[:, 1:].mean(axis=1)
    seconds = results[name]["query_time"].mean()
    print(
        f"{name:<11} {area.mean():+.4f} +- {area.std(ddof=1) / np.sqrt(len(area)):.4f}, "
        f"better in {(area > 0).sum()} of {len(area)} splits, {seconds:.2f} s a query"
    )
area = (results["FisherMask"]["test_score"] - results["entropy"]["test_score"])[:, 1:].mean(axis=1)
error = area.std(ddof=1) / np.sqrt(len(area))
in_errors = area.mean() / error
print(f"FisherMask less entropy: {area.mean():+.4f} +- {error:.4f}, {in_errors:.1f} errors")
folder.cleanup()

# %%
# All three are better than random choice by about one hundredth, and it takes no more than that to
# see: with six splits the standard errors are well below half of the differences. By how many
# standard errors FisherMask is ahead of entropy, the last line says. About two of them, from six
# splits, are a hint and no result: these data are easy, there are two classes, and a batch of ten
# repeats itself little. Who wants to know runs more splits, which the folder makes cheap to add.
#
# Some rules for experiments of your own:
#
# - Compare strategies on the same splits and seeds, and look at differences.
# - Decide beforehand what you will report.
# - Count the seconds too: a query of FisherMask costs more than one of entropy.
# - Report all the data sets that you tried.
