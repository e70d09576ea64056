"""Heads that are fitted in milliseconds, as skorch nets: any query strategy takes them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.special import log_softmax
from skorch import NeuralNetClassifier
from torch import nn
from torch.nn import functional as F

from benchmarks.common.networks import ArrayBatches, Linear, SmallMLP

# Of inputs with a mean square of 1 around their mean.
PENALTIES = 10.0 ** np.arange(-5, 2)
# Keeps the intercepts of classes without a label finite.
INTERCEPT_PENALTY = 1e-3
# Penalties are tried from the largest down, until the loss has grown this often.
N_WORSE = 3
FEW = 60  # labels, up to which there are more folds
N_STEPS = 300


class FastNet(NeuralNetClassifier):
    """A net that replaces skorch's training by epochs and batches by a method `solve`."""

    def fit_loop(self, X: Any, y: Any = None, epochs: Any = None, **fit_params: Any) -> FastNet:
        self.check_data(X, y)
        self.solve(np.asarray(X, "float32"), np.asarray(y, "int64"))
        return self

    def solve(self, X: np.ndarray, y: np.ndarray) -> None:
        """Set the weights of the module, which has been initialized."""
        raise NotImplementedError


class RidgeNet(FastNet):
    """A linear head, penalty |W|^2 chosen by cross-validation (log loss) on its labels.

    Parameters
    ----------
    module, **kwargs
        As in skorch. The module has a linear layer `output` on the flattened inputs.
    penalty : float or None, default=None
        Of inputs with a mean square of 1; None: one of `PENALTIES`.

    Attributes
    ----------
    penalty_ : float
        What it was fitted with.
    """

    def __init__(self, module: Any, *args: Any, penalty: float | None = None, **kwargs: Any):
        super().__init__(module, *args, **kwargs)
        self.penalty = penalty

    def solve(self, X: np.ndarray, y: np.ndarray) -> None:
        X = X.reshape(len(X), -1)
        output = self.module_.output
        targets = np.eye(output.out_features)[y]
        mean = X.mean(0)
        scale = max(float(np.sqrt(((X - mean) ** 2).sum(1).mean())), 1e-12)
        # Rotating the inputs changes no ridge solution; few labels span few dimensions.
        U, sizes, axes = np.linalg.svd((X - mean) / scale, full_matrices=False)
        Z = U * sizes
        self.penalty_ = self.penalty or choose_penalty(Z, targets)
        weight, bias = ridge(Z, targets, self.penalty_, max_iter=100)
        weight = axes.T @ weight / scale
        with torch.no_grad():
            output.weight.copy_(torch.as_tensor(weight.T))
            output.bias.copy_(torch.as_tensor(bias - mean @ weight))


class FullBatchNet(FastNet):
    """A net trained by the optimizer on all samples at once.

    It ends when nearly all training samples are right and the loss is below 0.1, at the latest
    after `N_STEPS`.
    """

    def solve(self, X: np.ndarray, y: np.ndarray) -> None:
        inputs, targets = torch.as_tensor(X), torch.as_tensor(y)
        self.module_.train()
        for step in range(N_STEPS):
            self.optimizer_.zero_grad()
            logits = self.module_(inputs)
            loss = F.cross_entropy(logits, targets)
            if (
                step % 10 == 0
                and loss < 0.1
                and (logits.argmax(1) == targets).sum() >= 0.99 * len(y)
            ):
                break
            loss.backward()
            self.optimizer_.step()


def ridge(
    Z: np.ndarray,
    targets: np.ndarray,
    penalty: float,
    start: tuple[np.ndarray, np.ndarray] | None = None,
    max_iter: int = 25,
) -> tuple[np.ndarray, np.ndarray]:
    """Minimize summed log loss + penalty/2 |W|^2 by L-BFGS, from `start` if given.

    Parameters
    ----------
    Z : ndarray of shape (n, k)
        Inputs, in directions that are uncorrelated: by their sizes the problem is scaled.
    targets : ndarray of shape (n, n_classes)
        One-hot labels.
    penalty : float
        Above 0.
    start : tuple of ndarray, optional
        Weights (k, n_classes) and intercepts (n_classes,).
    max_iter : int, default=25
        Iterations, at most.
    """
    n, k = Z.shape
    shape = (k + 1, targets.shape[1])
    inputs = np.column_stack([Z, np.ones(n)])
    penalties = np.append(np.full(k, penalty), INTERCEPT_PENALTY)
    # p (1 - p) is at most 1/4, so that all curvatures are about 1.
    steps = 1 / np.sqrt((inputs**2).sum(0) / 4 + penalties)
    inputs = (inputs * steps).astype("float32")
    ridges = (penalties * steps**2)[:, None]

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        V = flat.reshape(shape)
        logs = log_softmax(inputs @ V.astype("float32"), axis=1)
        value = -(logs * targets).sum() + (ridges * V**2).sum() / 2
        slope = inputs.T @ (np.exp(logs) - targets).astype("float32") + ridges * V
        return float(value), slope.ravel()

    first = np.zeros(shape) if start is None else np.vstack(start) / steps[:, None]
    options = {"maxiter": max_iter, "gtol": 1e-3}
    found = minimize(loss, first.ravel(), jac=True, method="L-BFGS-B", options=options).x
    found = found.reshape(shape) * steps[:, None]
    return found[:-1], found[-1]


def choose_penalty(Z: np.ndarray, targets: np.ndarray) -> float:
    """Return the one of `PENALTIES` with the smallest log loss in folds stratified by class."""
    n_folds = 5 if len(Z) <= FEW else 3
    order = np.random.default_rng(0).permutation(len(Z))
    order = order[np.argsort(targets[order].argmax(1), kind="stable")]
    folds = np.empty(len(Z), int)
    folds[order] = np.arange(len(Z)) % n_folds
    losses = np.zeros(len(PENALTIES))
    for fold in range(n_folds):
        test = folds == fold
        found, previous, n_worse = None, np.inf, 0
        for i in reversed(range(len(PENALTIES))):
            found = ridge(Z[~test], targets[~test], PENALTIES[i], found)
            loss = -(log_softmax(Z[test] @ found[0] + found[1], axis=1) * targets[test]).sum()
            n_worse = n_worse + 1 if loss > previous else 0
            previous = loss
            losses[i] += loss
            if n_worse == N_WORSE:
                losses[:i] = np.inf
                break
    return float(PENALTIES[losses.argmin()])


FAST_NETS: dict[str, tuple[type[FastNet], type[nn.Module]]] = {
    "ridge": (RidgeNet, Linear),
    "mlp16 full batch": (FullBatchNet, SmallMLP),
}


def make_fast_net(name: str, shape: tuple[int, ...], n_classes: int, device: str) -> FastNet:
    """Return the net of a name in `FAST_NETS`, not fitted."""
    kind, module = FAST_NETS[name]
    return kind(
        module,
        module__shape=shape,
        module__n_classes=n_classes,
        criterion=nn.CrossEntropyLoss,
        optimizer=torch.optim.Adam,
        optimizer__fused=True,
        lr=0.01,
        train_split=None,
        callbacks="disable",
        iterator_valid=ArrayBatches,
        iterator_valid__batch_size=2048,
        device=device,
        verbose=0,
    )
