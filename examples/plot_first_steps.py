"""
First steps: which digits to label
==================================

Labels cost people's time, unlabelled samples are often free. *Active learning* trains a
classifier on a few labels, lets it choose the samples that are worth a label next, asks for
these labels, and trains again.

Here a small network learns to read handwritten digits. It chooses what it wants labelled with
:class:`~skfishermask.FisherMaskSampler`, inside the learner of
`modAL <https://modal-python.readthedocs.io>`_. At the end its learning curve is set beside those of
random and of entropy sampling.
"""

# %%
# The data
# --------
#
# The 1,797 digits that come with scikit-learn are images of 8 by 8 pixels. Half of them are kept
# for testing. The other half is the *pool*: we know their labels, but the network gets to see one
# only when it asks.

import matplotlib.pyplot as plt
import numpy as np
import torch
from modAL.uncertainty import entropy_sampling
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from skorch import NeuralNetClassifier
from torch import nn

from skfishermask import FisherMaskSampler
from skfishermask.modal import ActiveLearner

X, y = load_digits(return_X_y=True)
X = (X / 16).astype("float32")
X_pool, X_test, y_pool, y_test = train_test_split(X, y, test_size=0.5, stratify=y, random_state=0)

# %%
# The network
# -----------
#
# Any PyTorch module will do, wrapped as a :class:`~skorch.classifier.NeuralNetClassifier` so that
# it has the methods of a scikit-learn classifier. skorch makes the module anew at each ``fit``:
# after every query the network is trained from the start, on all the labels there are. With
# ``train_split=None`` none of these few labels is set aside for validation.


class Network(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def make_net():
    return NeuralNetClassifier(
        Network,
        criterion=nn.CrossEntropyLoss,
        optimizer=torch.optim.Adam,
        lr=0.01,
        max_epochs=40,
        batch_size=32,
        train_split=None,
        verbose=0,
    )


# %%
# One query
# ---------
#
# :class:`skfishermask.modal.ActiveLearner` is modAL's ``ActiveLearner``, corrected to run with
# current scikit-learn. It holds the classifier, the query strategy, and the labels so far. There
# are none yet, so its first batch *covers* the pool: the twenty digits to which all others are as
# similar as possible. That needs no labels and no network.

learner = ActiveLearner(make_net(), query_strategy=FisherMaskSampler(random_state=0))
first, instances = learner.query(X_pool, n_instances=20)
torch.manual_seed(0)
learner.teach(instances, y_pool[first])
print(f"accuracy with 20 labels: {learner.score(X_test, y_test):.3f}")

# %%
# The labelled digits leave the pool. Then the learner is asked which twenty it would like to know
# next. The strategy returns their rows in the pool and, as metrics, the *gain* of each: by how much
# it lowered the objective of FisherMask when it was chosen.

X_left, y_left = np.delete(X_pool, first, axis=0), np.delete(y_pool, first)
indices, instances, gains = learner.query(X_left, n_instances=20, return_metrics=True)

figure, axes = plt.subplots(2, 10, figsize=(9, 2.4), layout="constrained")
for ax, image, gain in zip(axes.flat, instances, gains, strict=True):
    ax.imshow(image.reshape(8, 8), cmap="gray_r")
    ax.set_title(f"{gain:.2g}", fontsize=9)
    ax.set_axis_off()
figure.suptitle("The second batch, in the order chosen, with its gains", fontsize=11)
plt.show()

# %%
# Now a person would look at the pictures and type the digits. We look the labels up instead, and
# teach them: the learner adds them to those it has and trains again.

torch.manual_seed(1)
learner.teach(instances, y_left[indices])
print(f"accuracy with {len(learner.X_training)} labels: {learner.score(X_test, y_test):.3f}")

# %%
# The loop, and two other strategies
# ----------------------------------
#
# An active-learning loop repeats these steps. A strategy is any function of the learner, the pool
# and the number of instances, so we can compare three: random choice; modAL's entropy sampling,
# which takes the digits with the least certain predicted class; and FisherMask. Every strategy
# starts from the same covering batch and trains with the same seeds. ``batch_size=256`` lets
# FisherMask read the pool in larger portions than the 32 that the network is trained with: the
# choice is the same, and comes sooner.


rng = np.random.default_rng(0)


def random_sampling(learner, X_pool, n_instances=1):
    return rng.choice(len(X_pool), n_instances, replace=False)


def learning_curve(query_strategy, seed, n_queries=5, n_instances=20):
    X_left, y_left = X_pool, y_pool
    indices, _ = FisherMaskSampler(random_state=seed).query(X_pool, n_instances)
    learner = ActiveLearner(make_net(), query_strategy)
    scores = []
    for step in range(n_queries + 1):
        if step > 0:
            indices, _ = learner.query(X_left, n_instances=n_instances)
        torch.manual_seed(100 * seed + step)
        learner.teach(X_left[indices], y_left[indices])
        scores.append(learner.score(X_test, y_test))
        X_left, y_left = np.delete(X_left, indices, axis=0), np.delete(y_left, indices)
    return scores


strategies = {
    "random": random_sampling,
    "entropy": entropy_sampling,
    "FisherMask": FisherMaskSampler(batch_size=256, random_state=0),
}
seeds = range(4)
curves = {
    name: np.array([learning_curve(strategy, seed) for seed in seeds])
    for name, strategy in strategies.items()
}

# %%
# One run says little, because luck in the first labels and in training moves a curve as much as the
# strategy does. So there are four of each. The line is their mean, the band one standard error.

# sphinx_gallery_thumbnail_number = 2
styles = {"random": ("0.4", "o"), "entropy": ("#d55e00", "s"), "FisherMask": ("#0072b2", "D")}
n_labels = 20 * np.arange(1, 7)

figure, ax = plt.subplots(figsize=(7, 4.2), layout="constrained")
for name, curve in curves.items():
    colour, marker = styles[name]
    mean = curve.mean(axis=0)
    error = curve.std(axis=0, ddof=1) / np.sqrt(len(curve))
    ax.plot(n_labels, mean, color=colour, marker=marker, markersize=5, label=name)
    ax.fill_between(n_labels, mean - error, mean + error, color=colour, alpha=0.15, lw=0)
ax.set(xlabel="labels", ylabel="test accuracy", xticks=n_labels)
ax.grid(alpha=0.3)
ax.spines[["top", "right"]].set_visible(False)
ax.legend(frameon=False)
plt.show()

print("labels     " + "".join(f"{n:>7}" for n in n_labels))
for name, curve in curves.items():
    print(f"{name:<11}" + "".join(f"{score:7.3f}" for score in curve.mean(axis=0)))

# %%
# FisherMask is ahead from the first query on, and with 60 labels it is above what random choice
# reaches with 120. Entropy sampling is behind random choice at first: with few labels the network
# is unsure about many digits that look alike, and entropy takes them all. A batch of FisherMask is
# chosen together, so it does without the repetitions;
# :doc:`/auto_examples/plot_inside_fishermask` shows how.
#
# This is one small example. How much there is to save depends on the data, the network and the size
# of the batch; :doc:`/label_efficiency` has larger ones. For experiments of your own you need not
# write the loop: see :doc:`/auto_examples/plot_compare_strategies`.
