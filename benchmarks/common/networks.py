"""The networks that are measured, and how those of the label-efficiency study are trained."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from skorch import NeuralNetClassifier
from skorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Subset


class MLP(nn.Module):
    """One hidden layer."""

    def __init__(self, shape: tuple[int, ...], n_classes: int, n_hidden: int = 64) -> None:
        super().__init__()
        hidden = nn.Linear(int(np.prod(shape)), n_hidden)
        self.features = nn.Sequential(nn.Flatten(), hidden, nn.ReLU())
        self.output = nn.Linear(n_hidden, n_classes)

    def forward(self, X: Tensor) -> Tensor:
        return self.output(self.features(X))


class Linear(nn.Module):
    """The output layer alone: a linear head on the inputs."""

    def __init__(self, shape: tuple[int, ...], n_classes: int) -> None:
        super().__init__()
        self.output = nn.Linear(int(np.prod(shape)), n_classes)

    def forward(self, X: Tensor) -> Tensor:
        return self.output(X.flatten(1))


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


class _Block(nn.Module):
    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(n_out)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(n_out)
        self.shortcut = nn.Sequential()
        if stride != 1 or n_in != n_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(n_in, n_out, 1, stride, bias=False), nn.BatchNorm2d(n_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(h)) + self.shortcut(x))


class CifarResNet18(nn.Module):
    """ResNet-18 for 32 x 32 images; width 16 is about the size of the authors' one."""

    def __init__(self, width: int = 16, n_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        widths = [width, width, 2 * width, 4 * width, 8 * width]
        self.layers = nn.Sequential(
            *(
                nn.Sequential(_Block(a, b, 1 if i == 0 else 2), _Block(b, b, 1))
                for i, (a, b) in enumerate(pairwise(widths))
            )
        )
        self.linear = nn.Linear(8 * width, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layers(F.relu(self.bn1(self.conv1(x))))
        return self.linear(h.mean((2, 3)))


class ResNet18(CifarResNet18):
    """The CIFAR-style ResNet-18 of the FisherMask authors, for any number of channels."""

    def __init__(self, shape: tuple[int, ...], n_classes: int) -> None:
        super().__init__(n_classes=n_classes)
        self.n_missing = 3 // shape[0] if 3 % shape[0] == 0 else 1
        # Convolutions of few channels train twice as fast on a CPU.
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, X: Tensor) -> Tensor:
        # Training in bfloat16 takes half the time where the processor knows it; queries do not.
        with torch.autocast(X.device.type, dtype=torch.bfloat16, enabled=self.training):
            return super().forward(X.repeat(1, self.n_missing, 1, 1)).float()


class _SelfAttention(nn.Module):
    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.output = nn.Linear(width, width)

    def forward(self, h: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (
            layer(h).unflatten(2, (self.n_heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.output(h.transpose(1, 2).flatten(2))


class _TextBlock(nn.Module):
    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.attention = _SelfAttention(width, n_heads)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, h: Tensor, bias: Tensor) -> Tensor:
        h = self.norm1(h + self.attention(h, bias))
        return self.norm2(h + self.down(F.gelu(self.up(h))))


class MaskedText(nn.Module):
    """A text network in the manner of BERT: padding is masked, the first token is classified."""

    def __init__(
        self, n_tokens: int, length: int, width: int, n_heads: int, n_layers: int, n_classes: int
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(n_tokens, width, padding_idx=0)
        self.positions = nn.Embedding(length, width)
        self.norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList(_TextBlock(width, n_heads) for _ in range(n_layers))
        self.pooler = nn.Linear(width, width)
        self.output = nn.Linear(width, n_classes)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        steps = torch.arange(tokens.shape[1], device=tokens.device)
        h = self.norm(self.tokens(tokens) + self.positions(steps))
        bias = (1 - mask[:, None, None].to(h.dtype)) * torch.finfo(h.dtype).min
        for layer in self.layers:
            h = layer(h, bias)
        return self.output(torch.tanh(self.pooler(h[:, 0])))


class SequenceEncoder(nn.Module):
    """PyTorch's own encoder; it takes samples first and may see positions first inside."""

    def __init__(self, width: int, n_layers: int, n_classes: int, batch_first: bool) -> None:
        super().__init__()
        self.batch_first = batch_first
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, n_layers, enable_nested_tensor=False)
        self.output = nn.Linear(width, n_classes)

    def forward(self, X: Tensor) -> Tensor:
        if self.batch_first:
            return self.output(self.encoder(X).mean(1))
        return self.output(self.encoder(X.transpose(0, 1)).mean(0))


class Recurrent(nn.Module):
    """Tokens, one recurrent layer ("GRU" or "LSTM"), and its last state classified."""

    def __init__(self, kind: str, n_tokens: int, width: int, n_classes: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(n_tokens, width)
        self.cells = getattr(nn, kind)(width, width, batch_first=True)
        self.output = nn.Linear(width, n_classes)

    def forward(self, tokens: Tensor) -> Tensor:
        states, _ = self.cells(self.tokens(tokens))
        return self.output(states[:, -1])


class SmallMLP(MLP):
    """16 hidden units, which makes thousands of queries on a CPU affordable."""

    def __init__(self, shape: tuple[int, ...], n_classes: int) -> None:
        super().__init__(shape, n_classes, n_hidden=16)


NETWORKS = {"linear": Linear, "mlp16": SmallMLP, "mlp": MLP, "cnn": CNN, "resnet18": ResNet18}


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
        rows: Any = slice(None)
        if isinstance(dataset, Subset):
            dataset, rows = dataset.dataset, dataset.indices
        self.X = torch.as_tensor(dataset.X)[rows]
        self.y = torch.zeros(len(self.X)) if dataset.y is None else torch.as_tensor(dataset.y)[rows]
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
        batch_size=32,  # with larger ones few labels are too few steps for running statistics
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
