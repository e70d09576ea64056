"""Which samples a learning curve starts from."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

import numpy as np
from sklearn.base import is_classifier
from sklearn.utils import check_consistent_length, check_random_state

from skfishermask.data import (
    Data,
    Estimator,
    Labels,
    check_labels_fit,
    check_no_lists_of_labels,
    innermost,
    input_arrays,
    n_rows,
    take_rows,
)
from skfishermask.first_batch import first_batch
from skfishermask.parameters import MethodParameters, Settings


def check_counts(**counts: object) -> None:
    """Raise ValueError, with its name, for what is not an int of at least 1."""
    for name, value in counts.items():
        if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
            raise ValueError(f"Expected {name} to be an int of at least 1, found {value!r}.")


def check_labels(estimator: Estimator, X: Data, y: Labels) -> np.ndarray:
    """Return labels as an array.

    Raises ValueError unless they are for X, and of the kind that the estimator is trained on.
    """
    check_no_lists_of_labels(y)
    labels: np.ndarray = np.asarray(y)
    is_column = labels.ndim == 2 and labels.shape[1] == 1 and is_classifier(estimator)
    if labels.ndim == 0 or is_column:
        raise ValueError(f"Expected y of shape (n_samples,), found shape {labels.shape}.")
    check_consistent_length(*input_arrays(X), labels)
    check_labels_fit(innermost(estimator), labels)
    return labels


def initial_samples(
    n_initial: Data,
    initial: str,
    estimator: Estimator,
    X: Data,
    y: np.ndarray,
    splits: Sequence[tuple[np.ndarray, np.ndarray]],
    seeds: Sequence[int],
) -> list[np.ndarray]:
    """Return the rows to start from, ascending, in the training part of each split.

    `n_initial` says how many, or which: for all splits, or for each. A number of them is chosen
    stratified by the classes y, or by coverage of X alone, for which the estimator's transformers
    are fitted to the training part; with a seed for each split. Raises ValueError if a number is
    out of range, or rows do not fit the splits.
    """
    if initial not in ("random", "coverage"):
        raise ValueError(f'Expected initial to be "random" or "coverage", found {initial!r}.')
    if not hasattr(n_initial, "__len__"):
        check_counts(n_initial=n_initial)
        starts = []
        for i, (train, _) in enumerate(splits):
            if len(train) < n_initial:
                raise ValueError(
                    f"Expected n_initial of at most {len(train)}, the samples in the training part "
                    f"of split {i}, found {n_initial}."
                )
            rng = np.random.RandomState(seeds[i])
            if initial == "coverage":
                settings = Settings(MethodParameters(), None, rng)
                covering, _ = first_batch(estimator, take_rows(X, train), n_initial, settings)
                drawn = covering.indices
            else:
                drawn = _stratified(y[train], n_initial, rng)
            starts.append(np.sort(train[drawn]))
    else:
        of_each = len(n_initial) and np.ndim(n_initial[0]) == 1
        rows = list(n_initial) if of_each else [n_initial] * len(splits)
        if len(rows) != len(splits):
            raise ValueError(
                f"Expected n_initial with an array for each of the {len(splits)} splits, found "
                f"{len(rows)}."
            )
        starts = [np.unique(np.asarray(row)) for row in rows]
        if len({len(start) for start in starts}) > 1 or len(starts[0]) == 0:
            raise ValueError(
                "Expected n_initial with the same number of different rows, at least one, for "
                f"every split, found {[len(start) for start in starts]}."
            )
        for i, (start, (train, _)) in enumerate(zip(starts, splits, strict=True)):
            outside = np.setdiff1d(start, train)
            if len(outside):
                raise ValueError(
                    f"Row {outside[0]} of n_initial is not in the training part of split {i}; "
                    "expected all initial samples there."
                )
    return starts


def _stratified(y: np.ndarray, n: int, rng: np.random.RandomState) -> np.ndarray:
    """Draw positions in proportion to the classes, with one of each class where n allows."""
    classes, counts = np.unique(y, return_counts=True)
    if n < len(classes):
        return np.sort(rng.permutation(len(y))[:n])
    share = np.ones(len(classes), dtype=int)
    order = rng.permutation(len(classes))  # ties between classes fall either way
    for _ in range(n - len(classes)):
        # The class that lacks most of its proportional share gets the next one.
        lack = np.where(share < counts, counts * n / len(y) - share, -np.inf)
        share[order[lack[order].argmax()]] += 1
    drawn = [
        rng.permutation(np.flatnonzero(y == c))[:m] for c, m in zip(classes, share, strict=True)
    ]
    return np.sort(np.concatenate(drawn))


def random_sampling(learner: Estimator, X_pool: Data, n_instances: int = 1) -> np.ndarray:
    """Return rows drawn at random: a query strategy."""
    # The global generator, which is seeded for the call.
    shuffled: np.ndarray = check_random_state(None).permutation(n_rows(X_pool))
    return shuffled[:n_instances]


def check_budget(
    n_initial: int,
    n_instances: int,
    n_queries: int,
    splits: list[tuple[np.ndarray, np.ndarray]],
) -> None:
    """Raise ValueError if a split has fewer training samples than will be labelled."""
    needed = n_initial + n_queries * n_instances
    smallest = min(len(train) for train, _ in splits)
    if needed > smallest:
        raise ValueError(
            f"n_initial + n_queries * n_instances is {needed}, but a split has only {smallest} "
            "training samples."
        )
