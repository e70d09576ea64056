"""
Numbers instead of classes
==========================

Which samples should be measured next, where a label is a number? With a regressor the same query
answers that: the likelihood follows the network's criterion.
"""

# %%
# A table
# -------
#
# Friedman's function of five of ten features, with noise, scaled as networks like it.

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import make_friedman1
from skorch import NeuralNetRegressor
from torch import nn

from skfishermask import ActiveLearningCurveDisplay, FisherMaskSampler, active_learning_curve

X, y = make_friedman1(600, noise=0.5, random_state=0)
X, y = X.astype("float32") - 0.5, ((y - y.mean()) / y.std()).astype("float32")


class Network(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 1))


net = NeuralNetRegressor(
    Network,
    optimizer=torch.optim.Adam,
    lr=0.02,
    max_epochs=100,
    batch_size=32,
    train_split=None,
    verbose=0,
)

# %%
# A sampler around a regressor is a regressor
# -------------------------------------------

sampler = FisherMaskSampler(net, random_state=0).fit(X[:60], y[:60])
indices, instances = sampler.query(X[60:500], n_instances=20, X_labeled=X[:60])
print(f"R^2 {sampler.score(X[500:], y[500:]):.2f}, next: {indices[:5]} ...")

# %%
# Against random sampling
# -----------------------
#
# Whether a strategy saves labels on your data, a learning curve tells. Two splits, as here, are too
# few to decide.

options = {
    "n_initial": 20,
    "n_instances": 20,
    "n_queries": 3,
    "cv": 2,
    "scoring": "r2",
    "random_state": 0,
}
wrapped = FisherMaskSampler(net, random_state=0)
curves = {
    "FisherMask": active_learning_curve(wrapped, X, y, query_strategy=wrapped, **options),
    "random": active_learning_curve(wrapped, X, y, query_strategy="random", **options),
}
for name, curve in curves.items():
    print(name, np.round(curve["test_score"].mean(0), 2))
ActiveLearningCurveDisplay.from_results(curves)
plt.show()
