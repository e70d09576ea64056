"""ThreeClust of CDALBench, where one of three clusters has labels that nothing predicts.

Run from the root of the repository::

    python -m benchmarks.study.three_clusters --seeds 50

T. Werner, J. Burchert, M. Stubbemann, L. Schmidt-Thieme, "A Cross-Domain Benchmark for Active
Learning", NeurIPS 2024, arXiv 2408.00426: two labels to begin with, one of each class, then one a
query up to 102; a linear net, which goes on training with every label (NAdam at a rate of 0.001,
until the loss of a validation set rises). The score is the mean accuracy over the curve; what they
report of 50 runs is `THEIRS`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from scipy.special import log_softmax, softmax
from sklearn.preprocessing import minmax_scale
from torch import nn

from benchmarks.common.fast_heads import FastNet
from benchmarks.common.networks import ArrayBatches, Linear
from benchmarks.study.heads import ALONE
from benchmarks.study.results import PUBLISHED
from benchmarks.study.strategies import STRATEGIES
from skfishermask import active_learning_curve

FILE = Path("benchmarks/results/foreign/three_clusters.csv")
# Mean and standard deviation.
THEIRS = {
    "random": (0.672, 0.07),
    "margin": (0.669, 0.09),
    "BADGE": (0.524, 0.09),
    "k-center": (0.698, 0.06),
    "TypiClust": (0.697, 0.06),
}
COMPARED = [*THEIRS, ALONE, PUBLISHED]
CENTERS = [(0, 0), (4, 3), (0, 6), (4, 3)]  # two for each class; they share one
N_EACH, N_TEST, N_VALID, N_QUERIES = 150, 120, 96, 100
RATE, BATCH, BETAS, EPSILON, DECAY = 0.001, 32, (0.9, 0.999), 1e-8, 0.004
# Epochs of the first training, which does not end early, and of each other.
N_FIRST, N_EPOCHS = 50, 100


def draw(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw the samples, in random order."""
    X = np.concatenate([rng.normal(center, 1, (N_EACH, 2)) for center in CENTERS])
    order = rng.permutation(len(X))
    return X[order], np.repeat([1, 0], 2 * N_EACH)[order]


class NAdam:
    """torch.optim.NAdam in NumPy, which takes a tenth of the time with six parameters."""

    def __init__(self, parameters: np.ndarray) -> None:
        self.parameters, self.steps, self.product = parameters.copy(), 0, 1.0
        self.mean, self.square = np.zeros((2, *parameters.shape))

    def step(self, gradient: np.ndarray) -> None:
        self.steps += 1
        now, after = (
            BETAS[0] * (1 - 0.5 * 0.96 ** (t * DECAY)) for t in (self.steps, self.steps + 1)
        )
        self.product *= now
        self.mean += (1 - BETAS[0]) * (gradient - self.mean)
        self.square += (1 - BETAS[1]) * (gradient**2 - self.square)
        scale = np.sqrt(self.square / (1 - BETAS[1] ** self.steps)) + EPSILON
        step = (1 - now) / (1 - self.product) * gradient
        step = step + after / (1 - self.product * after) * self.mean
        self.parameters = self.parameters - RATE * step / scale


class FineTuned(FastNet):
    """A linear net that goes on from the weights that it had with one label less.

    Parameters
    ----------
    module, **kwargs
        As in skorch.
    validation : tuple of ndarray
        Samples and labels: training ends when their loss rises.
    seed : int, default=0
        Of the weights and the batches.
    """

    # By seed and samples: a net with one label more goes on from there.
    _trained: ClassVar[dict[tuple[int, bytes], NAdam]] = {}

    def __init__(
        self, module: Any, *args: Any, validation: Any = None, seed: int = 0, **kwargs: Any
    ) -> None:
        super().__init__(module, *args, **kwargs)
        self.validation = validation
        self.seed = seed

    def solve(self, X: np.ndarray, y: np.ndarray) -> None:
        output = self.module_.output
        weight = torch.as_tensor(self.train(X, y).parameters)
        with torch.no_grad():
            output.weight.copy_(weight[:-1].T)
            output.bias.copy_(weight[-1])

    def train(self, X: np.ndarray, y: np.ndarray) -> NAdam:
        """Return the optimizer after the training on these labels, and on each fewer, in order."""
        key = (self.seed, X.tobytes())
        if key not in self._trained:
            rng = np.random.default_rng([self.seed, len(X)])
            if len(X) == 2:
                self._trained.clear()
                bound = X.shape[1] ** -0.5
                optimizer = NAdam(rng.uniform(-bound, bound, (X.shape[1] + 1, 2)))
                n_epochs, patient = N_FIRST, True
            else:
                optimizer, n_epochs, patient = self.train(X[:-1], y[:-1]), N_EPOCHS, False
                optimizer = copy_of(optimizer)
            self._epochs(optimizer, X, y, rng, n_epochs, patient)
            self._trained[key] = optimizer
        return self._trained[key]

    def _epochs(
        self,
        optimizer: NAdam,
        X: np.ndarray,
        y: np.ndarray,
        rng: np.random.Generator,
        n_epochs: int,
        patient: bool,
    ) -> None:
        inputs, targets = with_one(X), np.eye(2)[y]
        valid, labels = with_one(self.validation[0]), self.validation[1]
        best = np.inf
        for _ in range(n_epochs):
            order = rng.permutation(len(X))
            # A last batch that is smaller is dropped.
            for rows in np.split(order, range(BATCH, len(X), BATCH))[: max(1, len(X) // BATCH)]:
                errors = softmax(inputs[rows] @ optimizer.parameters, axis=1) - targets[rows]
                optimizer.step(inputs[rows].T @ errors / len(rows))
            logs = log_softmax(valid @ optimizer.parameters, axis=1)
            loss = -logs[np.arange(len(labels)), labels].mean()
            if loss >= best and not patient:
                break
            best = min(best, loss)


def with_one(X: np.ndarray) -> np.ndarray:
    return np.column_stack([X, np.ones(len(X))]).astype(float)


def copy_of(optimizer: NAdam) -> NAdam:
    copied = NAdam(optimizer.parameters)
    vars(copied).update({k: v + 0 for k, v in vars(optimizer).items()})
    return copied


def run(name: str, seed: int, n_queries: int = N_QUERIES) -> np.ndarray:
    """Return the accuracies of a strategy's curve."""
    rng = np.random.default_rng(seed)
    X, y = draw(rng)
    # They scale the test set by itself.
    X = np.concatenate([minmax_scale(X[:N_TEST]), minmax_scale(X[N_TEST:])]).astype("float32")
    rows = np.arange(len(X))
    test, valid, pool = np.split(rows, [N_TEST, N_TEST + N_VALID])
    net = FineTuned(
        Linear,
        module__shape=(2,),
        module__n_classes=2,
        criterion=nn.CrossEntropyLoss,
        train_split=None,
        callbacks="disable",
        iterator_valid=ArrayBatches,
        verbose=0,
        validation=(X[valid], y[valid]),
        seed=seed,
    )
    result = active_learning_curve(
        net,
        X,
        y,
        query_strategy=STRATEGIES[name],
        n_initial=np.array([rng.choice(pool[y[pool] == c]) for c in (0, 1)]),
        n_instances=1,
        n_queries=n_queries,
        cv=[(pool, test)],
        random_state=seed,
    )
    return result["test_score"][0]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--strategies", nargs="+", default=COMPARED, choices=COMPARED)
    parser.add_argument("--out", type=Path, default=FILE)
    options = parser.parse_args()
    columns = ["strategy", "seed", "score"]
    table = pd.read_csv(options.out) if options.out.exists() else pd.DataFrame(columns=columns)
    for seed in range(options.seeds):
        for name in options.strategies:
            if ((table.strategy == name) & (table.seed == seed)).any():
                continue
            row = (name, seed, round(float(run(name, seed).mean()), 5))
            new = pd.DataFrame([row], columns=columns)
            table = pd.concat([table, new], ignore_index=True) if len(table) else new
            options.out.parent.mkdir(parents=True, exist_ok=True)
            table.to_csv(options.out, index=False)
    print(table.groupby("strategy", sort=False).score.agg(["mean", "std", "count"]).round(3))


if __name__ == "__main__":
    main()
