"""
Imbalanced classes: what gets labelled
======================================

In many pools a few classes have most of the samples, and the ones that matter are rare. A random
choice labels them as rarely as they occur. This example makes such a pool, and counts class by
class what random choice, entropy sampling and FisherMask ask for.
"""

# %%
# Pools with a long tail
# ----------------------
#
# Of the digits that come with scikit-learn, the most frequent class of a pool keeps 130 images, the
# next ones fewer and fewer, and the rarest 6 or 7: twenty to one. The test set has forty images of
# every class, so its accuracy is the balanced one: a rare digit counts as much as a frequent one.
#
# Some digits are harder than others. To not confuse hard with rare, there are four pools, and in
# each the digits are frequent and rare in another random order.

import matplotlib.pyplot as plt
import numpy as np
import torch
from modAL.uncertainty import entropy_sampling
from sklearn.datasets import load_digits
from skorch import NeuralNetClassifier
from torch import nn

from skfishermask import FisherMaskSampler, active_learning_curve

X, y = load_digits(return_X_y=True)
X = (X / 16).astype("float32")
n_pools = 4
counts = np.round(130 * 20 ** (-np.arange(10) / 9)).astype(int)
print("images in a pool, by class:", counts, "in all", counts.sum())

splits, orders, starts = [], [], []
for seed in range(n_pools):
    rng = np.random.default_rng(seed)
    order = rng.permutation(10)
    images_of = [rng.permutation(np.flatnonzero(y == digit)) for digit in order]
    pool = np.concatenate([i[:n] for i, n in zip(images_of, counts, strict=True)])
    test = np.concatenate([i[-40:] for i in images_of])
    splits.append((pool, test))
    orders.append(order)
    starts.append(rng.choice(pool, 20, replace=False))

# %%
# The loops
# ---------
#
# :func:`~skfishermask.active_learning_curve` runs the loop on each pool: twenty labels drawn at
# random, then five queries of twenty. We give it the pools and test sets as ``cv``, and the rows to
# start from: drawn without regard to class, so that the rarest digits are mostly missing at first.


class Network(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


net = NeuralNetClassifier(
    Network,
    criterion=nn.CrossEntropyLoss,
    optimizer=torch.optim.Adam,
    lr=0.01,
    max_epochs=40,
    batch_size=32,
    train_split=None,
    verbose=0,
)
strategies = {
    "random": "random",
    "entropy": entropy_sampling,
    "FisherMask": FisherMaskSampler(batch_size=256),
}
results = {
    name: active_learning_curve(
        net,
        X,
        y,
        query_strategy=strategy,
        n_initial=starts,
        n_instances=20,
        n_queries=5,
        cv=splits,
        random_state=0,
        return_indices=True,
    )
    for name, strategy in strategies.items()
}

# %%
# What was labelled
# -----------------
#
# Classes are numbered from the most frequent to the rarest. A bar is the mean number of labels that
# a class got, over the four pools; a grey line says how many images of it there were to find.

rank = np.empty((n_pools, len(X)), dtype=int)
for row, order in zip(rank, orders, strict=True):
    row[:] = np.argsort(order)[y]


def labels_by_class(result):
    return np.array(
        [np.bincount(r[i], minlength=10) for r, i in zip(rank, result["indices"], strict=True)]
    )


colours = {"random": "0.55", "entropy": "#d55e00", "FisherMask": "#0072b2"}
labels = {name: labels_by_class(result) for name, result in results.items()}

figure, axes = plt.subplots(1, 3, figsize=(9.5, 3.4), sharey=True, layout="constrained")
for ax, (name, n) in zip(axes, labels.items(), strict=True):
    ax.bar(np.arange(1, 11), n.mean(axis=0), color=colours[name])
    ax.step(np.arange(0, 12) + 0.5, np.r_[counts, 0, 0], where="post", color="0.3", lw=1)
    ax.set(title=name, xlabel="class, most frequent first", xticks=range(1, 11), ylim=(0, 40))
    ax.spines[["top", "right"]].set_visible(False)
axes[0].set_ylabel("labels, of 120 in all")
plt.show()

print("labels for the three    most frequent   rarest classes")
for name, n in labels.items():
    mean = n.mean(axis=0)
    print(f"{name:<24}{mean[:3].sum():13.1f}{mean[7:].sum():9.1f}")

# %%
# Random choice follows the pool: almost two thirds of its labels go to the three most frequent
# classes, and it finds nine of the twenty-eight images of the rarest three classes. Entropy and
# FisherMask find more than twice as many, although neither is told that there is an imbalance: a
# network knows least about what it has seen least.
#
# How accurate that makes the network
# -----------------------------------
#
# Left the balanced accuracy, mean and standard error over the four pools. Right how many images of
# the rarest three classes have been found.

figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.8), layout="constrained")
markers = {"random": "o", "entropy": "s", "FisherMask": "D"}
for name, result in results.items():
    score, n_labels = result["test_score"], result["n_labeled"]
    mean, error = score.mean(axis=0), score.std(axis=0, ddof=1) / np.sqrt(n_pools)
    style = {"color": colours[name], "marker": markers[name], "label": name}
    left.plot(n_labels, mean, **style)
    left.fill_between(n_labels, mean - error, mean + error, color=colours[name], alpha=0.15, lw=0)
left.set(xlabel="labels", ylabel="balanced accuracy", xticks=n_labels)
left.legend(frameon=False)
n_rare = counts[7:].sum()
for name, result in results.items():
    is_rare = np.array([r[i] >= 7 for r, i in zip(rank, result["indices"], strict=True)])
    found = is_rare.cumsum(axis=1)[:, result["n_labeled"] - 1].mean(axis=0)
    right.plot(result["n_labeled"], found, color=colours[name], marker=markers[name], label=name)
right.axhline(n_rare, color="0.3", lw=1)
right.annotate(f"all {n_rare}", (20, n_rare - 0.5), va="top")
right.set(
    xlabel="labels", ylabel="images of the rarest three classes", xticks=n_labels, ylim=(0, 30)
)
for ax in (left, right):
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
plt.show()

for name, result in results.items():
    print(f"{name:<11}", *(f"{s:6.3f}" for s in result["test_score"].mean(axis=0)))

# %%
# Both are far above random choice. Entropy finds rare images a little faster than FisherMask, and
# yet FisherMask is the more accurate at the start: with forty or sixty labels it also matters what
# the other images are. At the end the two are close, and the bands overlap.
