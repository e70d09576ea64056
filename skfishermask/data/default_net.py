"""The network that is made where the user gave none."""

from __future__ import annotations

import torch
from skorch import NeuralNet, NeuralNetClassifier, NeuralNetRegressor
from torch import Tensor, nn


class SmallMLP(nn.Module):
    """One hidden layer, in float64: small networks are quick enough, and tables are float64."""

    def __init__(self, n_features: int, n_outputs: int, n_hidden: int = 100) -> None:
        super().__init__()
        self.hidden = nn.Linear(n_features, n_hidden, dtype=torch.float64)
        self.output = nn.Linear(n_hidden, n_outputs, dtype=torch.float64)

    def forward(self, X: Tensor) -> Tensor:
        """Return outputs (n, n_outputs) of samples (n, n_features) of any dtype."""
        h = torch.relu(self.hidden(X.to(self.hidden.weight.dtype)))
        outputs: Tensor = self.output(h)
        return outputs


class SmallCNN(nn.Module):
    """Two convolutions with pooling, the second twice as wide as the first, for small images."""

    def __init__(self, n_channels: int, n_outputs: int, width: int = 16) -> None:
        super().__init__()
        self.first = nn.Conv2d(n_channels, width, 3, padding=1)
        self.second = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.output = nn.Linear(2 * width * 2 * 2, n_outputs)

    def forward(self, X: Tensor) -> Tensor:
        """Return outputs (n, n_outputs) of images (n, C, H, W), or (n, H, W) of one channel."""
        h = X if X.dim() == 4 else X.unsqueeze(1)
        h = torch.relu(self.first(h.to(self.first.weight.dtype)))
        h = nn.functional.max_pool2d(h, 2, ceil_mode=True)
        h = torch.relu(self.second(h))
        h = nn.functional.adaptive_max_pool2d(h, 2)
        outputs: Tensor = self.output(h.flatten(1))
        return outputs


# Likelihood -> the kind of net, and its criterion.
_KINDS: dict[str, tuple[type[NeuralNet], type[nn.Module]]] = {
    "categorical": (NeuralNetClassifier, nn.CrossEntropyLoss),
    "bernoulli": (NeuralNet, nn.BCEWithLogitsLoss),
    "gaussian": (NeuralNetRegressor, nn.MSELoss),
}


def default_net(
    shape: tuple[int, ...], n_outputs: int, likelihood: str = "categorical"
) -> NeuralNet:
    """Make a small skorch net, not initialized, for samples of shape (n, ...).

    The outputs are classes, labels a sample or numbers a sample, by the likelihood. Raises
    ValueError unless the shape is (n, n_features), (n, H, W) or (n, C, H, W).
    """
    module: type[nn.Module]
    if len(shape) == 2:
        module, sizes = SmallMLP, {"module__n_features": shape[1]}
    elif len(shape) in (3, 4):
        module, sizes = SmallCNN, {"module__n_channels": shape[1] if len(shape) == 4 else 1}
    else:
        raise ValueError(
            "The default network takes X of shape (n, n_features), (n, height, width) or (n, "
            f"channels, height, width), found {shape}; give an estimator for other shapes."
        )
    kind, criterion = _KINDS[likelihood]
    return kind(
        module,
        module__n_outputs=n_outputs,
        criterion=criterion,
        optimizer=torch.optim.Adam,
        lr=0.01,
        max_epochs=50,
        batch_size=64,
        train_split=None,
        verbose=0,
        **sizes,
    )
