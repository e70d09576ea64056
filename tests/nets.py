"""Small skorch nets, trained for a moment on the digits, of every output convention."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from skorch import NeuralNetBinaryClassifier, NeuralNetClassifier
from torch import nn

from skfishermask import PUBLISHED

# Small masks and all samples for the diagonal: quick, and the same for any order of the pool.
# FisherMask alone: coverage of the inputs has its own tests.
SMALL = PUBLISHED | {"mask_fraction": 160, "n_mask_samples": None, "random_state": 0}


@cache
def digits() -> tuple[np.ndarray, np.ndarray]:
    X, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(X))
    return (X[order] / 16).astype("float32"), y[order]


def mlp(n_outputs: int = 10, *last: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, n_outputs), *last)


def options(**more: Any) -> dict[str, Any]:
    made = {"train_split": None, "verbose": 0, "max_epochs": 8, "lr": 0.4}
    # The table of epochs is made even where it is not shown, and takes a third of the time.
    made["callbacks__print_log"] = None
    # A pool of a hundred is read in two batches.
    sizes = {} if "batch_size" in more else {"batch_size": 32, "iterator_valid__batch_size": 64}
    return made | sizes | more


def logits_net(**more: Any) -> NeuralNetClassifier:
    torch.manual_seed(0)
    return NeuralNetClassifier(mlp(), criterion=nn.CrossEntropyLoss, **options(**more))


def probabilities_net(**more: Any) -> NeuralNetClassifier:
    torch.manual_seed(0)
    return NeuralNetClassifier(mlp(10, nn.Softmax(1)), **options(**more))


def binary_net(**more: Any) -> NeuralNetBinaryClassifier:
    torch.manual_seed(0)
    return NeuralNetBinaryClassifier(mlp(1), **options(**more))


def fitted(net: Any, n: int = 60) -> Any:
    X, y = digits()
    y = (y[:n] > 4).astype("float32") if isinstance(net, NeuralNetBinaryClassifier) else y[:n]
    return net.fit(X[:n], y)
