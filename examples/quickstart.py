"""Active learning on real images: FisherMask beside random and entropy sampling.

A small network learns the 1,797 handwritten digits that come with scikit-learn. The first 20 that
are labelled cover the images: FisherMask chooses them without a label. Then each strategy asks for
20 more at a time, from the same first labels and the same initial weights, for several seeds. At
the end a table says how accurate each was, a sentence says by how much FisherMask was ahead of
random sampling and how far that differs between seeds, and a picture shows the learning curves.

Run it with ``make demo``, or ``python examples/quickstart.py --help`` for what can be changed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from modAL.uncertainty import entropy_sampling
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from skorch import NeuralNetClassifier
from torch import nn
from tqdm.auto import tqdm

from skfishermask import FisherMaskSampler
from skfishermask.modal import ActiveLearner


class SmallNetwork(nn.Sequential):
    """One hidden layer: 2,410 parameters."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def make_net() -> NeuralNetClassifier:
    return NeuralNetClassifier(
        SmallNetwork,
        criterion=nn.CrossEntropyLoss,
        optimizer=torch.optim.Adam,
        lr=0.01,
        max_epochs=40,
        batch_size=32,
        train_split=None,
        verbose=0,
    )


def make_strategy(name: str, seed: int):
    if name == "FisherMask":
        return FisherMaskSampler(batch_size=256, random_state=seed)
    if name == "entropy":
        return entropy_sampling
    rng = np.random.default_rng(seed)

    def random_sampling(learner, X_pool, n_instances=1):
        return rng.choice(len(X_pool), n_instances, replace=False)

    return random_sampling


def learning_curve(name, seed, n_queries, n_instances, progress):
    """Test accuracy after each training, from `n_instances` labels to all that are queried."""
    images, digits = load_digits(return_X_y=True)
    images = (images / 16).astype("float32")
    X_pool, X_test, y_pool, y_test = train_test_split(
        images, digits, test_size=500, stratify=digits, random_state=seed
    )
    # The same first batch, which covers the images, and the same initial weights for all.
    first, _ = FisherMaskSampler(random_state=seed).query(X_pool, n_instances)
    torch.manual_seed(seed)
    learner = ActiveLearner(
        make_net(), make_strategy(name, seed), X_training=X_pool[first], y_training=y_pool[first]
    )
    X_pool, y_pool = np.delete(X_pool, first, axis=0), np.delete(y_pool, first)
    accuracy = [learner.score(X_test, y_test)]
    progress.update()
    for query in range(n_queries):
        indices, instances = learner.query(X_pool, n_instances=n_instances)
        torch.manual_seed(1000 * seed + query)
        learner.teach(instances, y_pool[indices])  # Here a person would label them.
        X_pool, y_pool = np.delete(X_pool, indices, axis=0), np.delete(y_pool, indices)
        accuracy.append(learner.score(X_test, y_test))
        progress.update()
    return accuracy


def labels_needed(n_labeled, accuracy, wanted):
    """Labels at which a mean learning curve first reaches an accuracy, interpolated."""
    best = np.maximum.accumulate(accuracy)
    if best[-1] < wanted:
        return None
    return float(np.interp(wanted, best, n_labeled))


def print_table(n_labeled, curves):
    print(f"\nTest accuracy, mean of {len(next(iter(curves.values())))} seeds (best in a row: *)\n")
    print("labels  " + "".join(f"{name:>14}" for name in curves))
    means = {name: np.mean(c, axis=0) for name, c in curves.items()}
    for i, n in enumerate(n_labeled):
        best = max(mean[i] for mean in means.values())
        cells = (f"{m[i]:.3f}{'*' if m[i] == best else ' '}" for m in means.values())
        print(f"{n:>6}  " + "".join(f"{cell:>14}" for cell in cells))


def what_was_seen(n_labeled, curves):
    """Return a sentence: whether FisherMask was ahead of random sampling, seed by seed."""
    ahead = np.subtract(curves["FisherMask"], curves["random"])[:, 1:].mean(axis=1)
    n, mean, error = len(ahead), ahead.mean(), ahead.std(ddof=1) / np.sqrt(len(ahead))
    if abs(mean) <= 2 * error:
        verdict = "could not be told from random sampling"
    else:
        verdict = f"was {'more' if mean > 0 else 'less'} accurate than random sampling"
    sentence = (
        f"FisherMask {verdict}: by {100 * mean:+.1f} points on average over the queries "
        f"(standard error {100 * error:.1f}; {100 * ahead.min():+.1f} to {100 * ahead.max():+.1f} "
        f"in {n} seeds)"
    )
    random, fishermask = (np.mean(curves[name], axis=0) for name in ("random", "FisherMask"))
    needed = labels_needed(n_labeled, fishermask, random[-1])
    if mean > 2 * error and needed is not None:
        sentence += f", and with {needed:.0f} labels as accurate as random with {n_labeled[-1]}"
    return f"{sentence}."


def save_picture(n_labeled, curves, path):
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    styles = {
        "random": ("0.45", "o"),
        "entropy": ("tab:orange", "s"),
        "FisherMask": ("tab:blue", "D"),
    }
    for name, runs in curves.items():
        mean, error = np.mean(runs, axis=0), np.std(runs, axis=0, ddof=1) / np.sqrt(len(runs))
        colour, marker = styles[name]
        axes.plot(n_labeled, mean, color=colour, marker=marker, markersize=4, label=name)
        axes.fill_between(n_labeled, mean - error, mean + error, color=colour, alpha=0.15, lw=0)
    axes.set(
        xlabel="labelled images",
        ylabel="test accuracy",
        title="Handwritten digits, a network with one hidden layer",
        xticks=n_labeled,
    )
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(title=f"mean and standard error\nof {len(runs)} seeds", frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", type=int, default=4, help="number of seeds (default: 4)")
    parser.add_argument("--queries", type=int, default=5, help="queries in a run (default: 5)")
    parser.add_argument("--n-instances", type=int, default=20, help="labels a query (default: 20)")
    parser.add_argument("--picture", type=Path, default=Path("output/quickstart.png"))
    options = parser.parse_args()
    if options.seeds < 2:
        parser.error("--seeds must be at least 2: the picture shows a standard error")
    # So small a network gains nothing from more, and threads that wait for each other take long.
    torch.set_num_threads(1)

    names = ["random", "entropy", "FisherMask"]
    total = len(names) * options.seeds * (options.queries + 1)
    with tqdm(total=total, unit="training") as progress:
        curves = {}
        for name in names:
            progress.set_description(f"{name:<10}")
            curves[name] = [
                learning_curve(name, seed, options.queries, options.n_instances, progress)
                for seed in range(options.seeds)
            ]
    n_labeled = options.n_instances * np.arange(1, options.queries + 2)
    print_table(n_labeled, curves)
    save_picture(n_labeled, curves, options.picture)
    print(f"\n{what_was_seen(n_labeled, curves)}")
    print(f"The picture: {options.picture.resolve()}")
    print("To read next: README.md, and examples/plot_first_steps.py, this loop step by step.")


if __name__ == "__main__":
    main()
