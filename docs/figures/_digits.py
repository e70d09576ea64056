"""The network and data behind the figures: a small convolutional network on digits."""

import numpy as np
import torch
from sklearn.datasets import load_digits
from skorch import NeuralNetClassifier
from torch import nn


def network():
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def fitted(n_labeled):
    """Return a net trained on the first digits of a shuffle, and the other digits."""
    images, digits = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    images = (images[order] / 16).astype("float32").reshape(-1, 1, 8, 8)
    torch.manual_seed(0)
    net = NeuralNetClassifier(
        network(),
        criterion=nn.CrossEntropyLoss,
        optimizer=torch.optim.Adam,
        lr=0.01,
        max_epochs=60,
        batch_size=32,
        train_split=None,
        verbose=0,
    )
    net.fit(images[:n_labeled], digits[order][:n_labeled])
    return net, images[:n_labeled], images[n_labeled:]
