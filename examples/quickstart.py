"""Active learning on real images: FisherMask beside random and entropy sampling.

From the 1,797 handwritten digits that come with scikit-learn, a small convolutional network
learns with 20 labels first and 20 more after every query. Each strategy starts from the same
labels and the same initial weights, for several seeds. At the end a table says how accurate each
was and how many labels it needed for what random sampling reached, and a picture shows the
learning curves.

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


class SmallConvNet(nn.Module):
    """Two convolutions with pooling and a linear output layer: 3,130 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
        )
        self.output = nn.Linear(64, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.output(self.features(images))


def make_net() -> NeuralNetClassifier:
    return NeuralNetClassifier(
        SmallConvNet,
        criterion=nn.CrossEntropyLoss,
        optimizer=torch.optim.Adam,
        lr=0.01,
        max_epochs=60,
        batch_size=32,
        train_split=None,
        verbose=0,
        device="cuda" if torch.cuda.is_available() else "cpu",
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
    images = (images / 16).astype("float32").reshape(-1, 1, 8, 8)
    X_pool, X_test, y_pool, y_test = train_test_split(
        images, digits, test_size=500, stratify=digits, random_state=seed
    )
    # The same labels first, and the same initial weights, for every strategy.
    first = np.random.default_rng(seed).choice(len(X_pool), n_instances, replace=False)
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
    budget, wanted = n_labeled[-1], means["random"][-1]
    print(f"\nLabels for the accuracy that random reaches with {budget} ({wanted:.3f}):")
    for name, mean in means.items():
        needed = labels_needed(n_labeled, mean, wanted)
        if name != "random" and needed is None:
            print(f"  {name}: not reached with {budget}")
        elif name != "random":
            print(f"  {name}: {needed:.0f}, {1 - needed / budget:.0%} of the labels saved")


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
        title="Handwritten digits, small convolutional network",
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
    parser.add_argument("--queries", type=int, default=6, help="queries in a run (default: 6)")
    parser.add_argument("--n-instances", type=int, default=20, help="labels a query (default: 20)")
    parser.add_argument("--picture", type=Path, default=Path("output/quickstart.png"))
    options = parser.parse_args()
    if options.seeds < 2:
        parser.error("--seeds must be at least 2: the picture shows a standard error")

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
    print(f"\nLearning curves: {options.picture.resolve()}")


if __name__ == "__main__":
    main()
