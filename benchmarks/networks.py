"""The networks of the label-efficiency study, and how they are trained."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from skorch import NeuralNetClassifier
from skorch.callbacks import Callback
from torch import Tensor, nn

from tests.networks import CifarResNet18


class MLP(nn.Module):
    """One hidden layer of 64 units."""

    def __init__(self, shape: tuple[int, ...], n_classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Flatten(), nn.Linear(int(np.prod(shape)), 64), nn.ReLU())
        self.output = nn.Linear(64, n_classes)

    def forward(self, X: Tensor) -> Tensor:
        return self.output(self.features(X))


class CNN(nn.Module):
    """Two convolutions with pooling, a hidden layer of 32 units and the output layer.

    Images of 16 pixels and more are halved first, which is what makes hundreds of trainings on a
    CPU affordable. 4,910 parameters for images of 8 x 8 pixels, 7,470 for 28 x 28.
    """

    def __init__(self, shape: tuple[int, ...], n_classes: int) -> None:
        super().__init__()
        channels, height, width = shape
        halve = min(height, width) >= 16
        if halve:
            height, width = height // 2, width // 2
        self.features = nn.Sequential(
            nn.AvgPool2d(2) if halve else nn.Identity(),
            nn.Conv2d(channels, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(16 * (height // 4) * (width // 4), 32),
            nn.ReLU(),
        )
        self.output = nn.Linear(32, n_classes)

    def forward(self, X: Tensor) -> Tensor:
        return self.output(self.features(X))


class ResNet18(CifarResNet18):
    """The CIFAR-style ResNet-18 of the FisherMask authors, for any number of channels."""

    def __init__(self, shape: tuple[int, ...], n_classes: int) -> None:
        super().__init__(n_classes=n_classes)
        self.n_missing = 3 // shape[0] if 3 % shape[0] == 0 else 1

    def forward(self, X: Tensor) -> Tensor:
        return super().forward(X.repeat(1, self.n_missing, 1, 1))


NETWORKS = {"mlp": MLP, "cnn": CNN, "resnet18": ResNet18}


class UntilAccuracy(Callback):
    """End training after the first epoch in which the training accuracy reaches a value."""

    def __init__(self, accuracy: float = 0.99) -> None:
        self.accuracy = accuracy

    def on_epoch_begin(self, net: Any, **kwargs: Any) -> None:
        self.n_right_, self.n_seen_ = 0, 0

    def on_batch_end(
        self, net: Any, batch: Any = None, training: bool = False, y_pred: Any = None, **kwargs: Any
    ) -> None:
        if training:
            labels = batch[1].to(y_pred.device)
            self.n_right_ += int((y_pred.argmax(1) == labels).sum())
            self.n_seen_ += len(labels)

    def on_epoch_end(self, net: Any, **kwargs: Any) -> None:
        if self.n_right_ >= self.accuracy * self.n_seen_:
            raise KeyboardInterrupt  # what skorch's own EarlyStopping does


class ArrayBatches:
    """Batches by indexing whole arrays: collating single samples would take as long as training."""

    def __init__(self, dataset: Any, batch_size: int, shuffle: bool = False) -> None:
        self.X = torch.as_tensor(dataset.X)
        self.y = torch.zeros(len(self.X)) if dataset.y is None else torch.as_tensor(dataset.y)
        self.batch_size = batch_size
        self.shuffle = shuffle

    def __len__(self) -> int:
        return -(-len(self.X) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        n = len(self.X)
        order = torch.randperm(n) if self.shuffle else torch.arange(n)
        for rows in order.split(self.batch_size):
            yield self.X[rows], self.y[rows]


def make_net(
    network: str, shape: tuple[int, ...], n_classes: int, device: str
) -> NeuralNetClassifier:
    """A net that trains from scratch until 99% of its training samples are right.

    That, and Adam, is the authors' way; at most 200 epochs.
    """
    small = network != "resnet18"
    return NeuralNetClassifier(
        NETWORKS[network],
        module__shape=shape,
        module__n_classes=n_classes,
        criterion=nn.CrossEntropyLoss,
        optimizer=torch.optim.Adam,
        optimizer__fused=True,
        lr=0.01 if small else 0.001,
        max_epochs=200,
        batch_size=32 if small else 128,
        train_split=None,
        callbacks=[UntilAccuracy()],
        callbacks__print_log=None,
        callbacks__train_loss=None,
        callbacks__valid_loss=None,
        callbacks__valid_acc=None,
        iterator_train=ArrayBatches,
        iterator_train__shuffle=True,
        iterator_valid=ArrayBatches,
        iterator_valid__batch_size=256,
        device=device,
        verbose=0,
    )


class SeveralTrainings(ClassifierMixin, BaseEstimator):
    """Several nets trained on the same samples; a query asks the first one.

    Scoring them all takes the noise of a single training out of a comparison of strategies.
    """

    def __init__(self, estimator: Any = None, n_trainings: int = 2) -> None:
        self.estimator = estimator
        self.n_trainings = n_trainings

    def fit(self, X: Any, y: Any) -> SeveralTrainings:
        self.estimators_ = [clone(self.estimator).fit(X, y) for _ in range(self.n_trainings)]
        self.estimator_ = self.estimators_[0]
        self.classes_ = self.estimator_.classes_
        return self

    def predict_proba(self, X: Any) -> np.ndarray:
        return self.estimator_.predict_proba(X)

    def predict(self, X: Any) -> np.ndarray:
        return self.estimator_.predict(X)
