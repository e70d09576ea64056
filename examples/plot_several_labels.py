"""
Several labels a sample
=======================

A photograph shows a beach *and* a boat; a text is about two subjects. Each label is present or not,
the network has a logit for each, and its criterion is the binary cross entropy. A query needs no
more than that.
"""

# %%
# Samples with several labels
# ---------------------------
#
# Generated, with eight labels of which a sample has two in the mean.

import numpy as np
import torch
from sklearn.datasets import make_multilabel_classification
from sklearn.metrics import f1_score
from skorch import NeuralNet
from torch import nn

from skfishermask import FisherMaskSampler

X, y = make_multilabel_classification(900, 20, n_classes=8, n_labels=2, random_state=0)
X = (X / X.max()).astype("float32")
X_test, y_test, X, y = X[600:], y[600:], X[:600], y[:600]


class Network(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 8))


net = NeuralNet(
    Network,
    criterion=nn.BCEWithLogitsLoss,
    optimizer=torch.optim.Adam,
    lr=0.01,
    max_epochs=60,
    batch_size=32,
    train_split=None,
    verbose=0,
)

# %%
# Rounds of queries
# -----------------

labeled = np.arange(40)
for _ in range(4):
    sampler = FisherMaskSampler(net, random_state=0).fit(X[labeled], y[labeled])
    score = f1_score(y_test, sampler.predict(X_test), average="micro", zero_division=0)
    print(f"{len(labeled)} samples with labels: F1 {score:.2f}")
    pool = np.setdiff1d(np.arange(len(X)), labeled)
    indices, _ = sampler.query(X[pool], n_instances=20, X_labeled=X[labeled])
    labeled = np.append(labeled, pool[indices])

# %%
# Each label has a probability of its own.

print(sampler.predict_proba(X_test[:2]).round(2))

# %%
# Missing labels
# --------------
#
# Labels that were not looked for in a sample are NaN, and the criterion leaves
# them out.


class KnownLabels(nn.BCEWithLogitsLoss):
    def forward(self, input, target):
        known = ~target.isnan()
        return super().forward(input[known], target[known])


partly = y.astype("float32")
partly[::2, :4] = np.nan
sampler = FisherMaskSampler(net.set_params(criterion=KnownLabels), random_state=0)
sampler.fit(X[labeled], partly[labeled])
print(f"accuracy over known labels: {sampler.score(X, partly):.2f}")
