"""Learning curves of query strategies: how accurate with how many labels."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sized
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from numbers import Integral
from types import FrameType
from typing import Literal, TypeAlias

import numpy as np
import torch
from joblib import Parallel, delayed, effective_n_jobs
from sklearn.base import BaseEstimator, clone, is_classifier
from sklearn.metrics import check_scoring
from sklearn.model_selection import check_cv
from sklearn.utils import check_random_state

from skfishermask.data import (
    Data,
    Estimator,
    Labels,
    UserValue,
    check_no_module,
    check_rows,
    explaining_fit,
    take_rows,
)
from skfishermask.evaluation.checkpoint import Checkpoint, Record
from skfishermask.evaluation.description import describe, fingerprint
from skfishermask.evaluation.initial_labels import (
    check_budget,
    check_counts,
    check_labels,
    initial_samples,
    random_sampling,
)
from skfishermask.jacobian import seeded
from skfishermask.progress import progress_bar

# A query strategy in modAL's manner: (learner, X_pool, n_instances=...) -> indices, or a pair.
Strategy: TypeAlias = Callable[..., Data]
# (estimator, X, y) -> a number, or several by their names.
Scorer: TypeAlias = Callable[[Estimator, Data, Labels], float | Mapping[str, float]]
# What a seed is for: draws for one purpose must not depend on those for another.
_INITIAL, _FIT, _QUERY = range(3)


def active_learning_curve(
    estimator: Estimator,
    X: Data,
    y: Labels,
    *,
    query_strategy: Strategy | Literal["random"],
    n_initial: Data,
    n_instances: int,
    n_queries: int,
    initial: Literal["random", "coverage"] = "random",
    cv: UserValue = None,
    groups: Labels = None,
    scoring: UserValue = None,
    n_jobs: int | None = None,
    random_state: int | np.random.RandomState | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    return_indices: bool = False,
    verbose: int = 0,
) -> dict[str, np.ndarray]:
    """Score an estimator as a query strategy adds to its labels, over the splits of the data.

    In every split the training part is the pool. The estimator is trained on a few initial
    samples of it and scored on the test part; then the strategy queries a batch, its labels are
    added, a new clone of the estimator is trained on all labels so far and scored, and so on.

    Seeds depend on `random_state`, the split and the query alone. So two calls with the same
    int and different strategies start from the same samples and, as long as the estimator has
    no ``random_state`` of its own, from the same initial weights: compare them split by split.

    Parameters
    ----------
    estimator : classifier or regressor
        Anything scikit-learn can clone that has ``fit``, such as a skorch net, a Pipeline or a
        :class:`FisherMaskSampler`. A clone is trained from scratch after every query. Give a
        skorch net the module's class: with an instance of it every training starts from the
        weights of that instance.
    X : array-like, DataFrame, sparse matrix, tensor, dict of arrays or Dataset of n_samples rows
        The samples: what the estimator takes, strings through a pipeline included.
    y : array-like of shape (n_samples,) or (n_samples, ...)
        Their labels: classes, numbers, or several of either a sample. The strategy sees only
        those that it asked for.
    query_strategy : callable or "random"
        Called as ``query_strategy(learner, X_pool, n_instances=n_instances)``, as in modAL. It
        returns the chosen rows of `X_pool`, or a tuple of them and anything else. The learner
        has the fitted ``estimator``, ``X_training``, ``y_training``, ``predict``,
        ``predict_proba`` and ``score``. Random draws must come from NumPy's, PyTorch's or
        Python's global generator, which are seeded for the call, or from a ``random_state``
        parameter that is an int or None.
    n_initial : int, or array-like of int
        Number of initial labels, drawn stratified by class and at least one of each class where
        there is one class a sample; or
        the rows of `X` to start from, which must be in the training part of every split; or a
        sequence with such an array for each split.
    n_instances : int
        Number of labels added by a query.
    n_queries : int
        Number of queries.
    initial : {"random", "coverage"}, default="random"
        How a number of initial samples is chosen: at random, or such that they cover the inputs,
        as a :class:`FisherMaskSampler` without labels does, with the estimator's transformers
        fitted to the training part.
    cv : int, cross-validation splitter, iterable of (train, test), or None, default=None
        As in :func:`~sklearn.model_selection.cross_validate`; None: 5 folds, stratified for a
        classifier. A :class:`~sklearn.model_selection.StratifiedShuffleSplit` gives any number
        of repeats.
    groups : array-like of shape (n_samples,) or None, default=None
        For a splitter that keeps groups together, such as a ``GroupKFold``.
    scoring : str, callable, list, tuple, dict or None, default=None
        As in :func:`~sklearn.model_selection.cross_validate`.
    n_jobs : int or None, default=None
        Number of splits run at the same time, in processes of their own.
    random_state : int, RandomState or None, default=None
        For the initial samples, the training and the queries.
    checkpoint : path-like or None, default=None
        A folder, made if missing, where each step is recorded as it ends. A run that was killed
        and is called again goes on from there and ends in the same numbers. So do more queries
        or more splits: what the folder has is not computed again. A second process with the same
        folder waits until the first one ends, and reads what that has computed.
    return_indices : bool, default=False
        Return which samples were labelled.
    verbose : int, default=0
        1 shows a progress bar.

    Returns
    -------
    dict
        ``n_labeled``
            ndarray of shape (n_queries + 1,), int64: numbers of labels.
        ``test_score``
            ndarray of shape (n_splits, n_queries + 1), float64: scores on the test part. With
            several scorers ``test_<name>`` for each instead.
        ``fit_time``
            ndarray of shape (n_splits, n_queries + 1), float64: seconds.
        ``query_time``
            ndarray of shape (n_splits, n_queries), float64: seconds.
        ``indices``
            ndarray of shape (n_splits, n_labeled[-1]), int64: rows of `X` in the order in
            which they were labelled; only if `return_indices`.

    Raises
    ------
    ValueError
        If a number is out of range, a split has too few training samples, the strategy returns
        anything but `n_instances` different rows, or `checkpoint` holds another run or a damaged
        file.
    TypeError
        If `query_strategy` is not callable; with a `checkpoint` also if the strategy, the estimator
        or the scoring holds something without a value, such as an open file or a lock, so that
        another one could not be told from it.
    RuntimeError
        If another writer changes a file of `checkpoint` meanwhile, where the file system has no
        locks, or if the call is made by a strategy inside a run with the same folder.

    See Also
    --------
    ActiveLearningCurveDisplay : Draws the results.

    Notes
    -----
    Numbers are the same bit for bit where arithmetic is: on one machine, with one number of
    threads. PyTorch's sums can depend on it, so set ``OMP_NUM_THREADS=1`` to compare runs with
    different `n_jobs`.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from sklearn.linear_model import LogisticRegression
    >>> from skfishermask import active_learning_curve
    >>> X, y = load_iris(return_X_y=True)
    >>> result = active_learning_curve(
    ...     LogisticRegression(), X, y, query_strategy="random",
    ...     n_initial=6, n_instances=10, n_queries=3, cv=5, random_state=0,
    ... )
    >>> result["n_labeled"].tolist()
    [6, 16, 26, 36]
    >>> result["test_score"].shape
    (5, 4)
    """
    check_counts(n_instances=n_instances, n_queries=n_queries)
    strategy = _as_strategy(query_strategy)
    check_no_module(estimator)
    check_rows(X, "X")
    y = check_labels(estimator, X, y)
    has_classes = is_classifier(estimator) and y.ndim == 1
    # Splitters count the samples; they do not look at them.
    rows = check_cv(cv, y, classifier=has_classes).split(np.zeros(len(y)), y, groups)
    splits = [(np.asarray(train), np.asarray(test)) for train, test in rows]
    scorer = check_scoring(estimator, scoring=scoring)
    seed = int(check_random_state(random_state).randint(2**31 - 1))

    classes = y if has_classes else np.zeros(len(y))
    find_starts = cache(partial(initial_samples, n_initial, initial, estimator, X, classes, splits))
    starts = find_starts(_initial_seeds(seed, splits))
    check_budget(len(starts[0]), n_instances, n_queries, splits)
    kept: Checkpoint | None = None
    with ExitStack() as stack:
        if checkpoint is not None:
            values = {"estimator": estimator, "query_strategy": query_strategy, "scoring": scoring}
            description = {name: describe(value, name) for name, value in values.items()}
            description |= {"X": fingerprint(X), "y": fingerprint(y)}
            description |= {"n_instances": n_instances, "initial": initial}
            kept = stack.enter_context(Checkpoint(checkpoint, description))
            seed = kept.seed(seed, is_given=isinstance(random_state, Integral))
            starts = find_starts(_initial_seeds(seed, splits))
        run = _Run(estimator, strategy, scorer, n_instances, n_queries, seed, kept)
        tasks = [(i, *splits[i], start) for i, start in enumerate(starts)]
        total = len(tasks) * (n_queries + 1)
        bar = stack.enter_context(
            progress_bar(total, "Learning curve", "training", is_shown=bool(verbose))
        )
        records = run.splits(X, y, tasks, n_jobs, bar.update)
    return _gather(records, starts, n_instances, n_queries, return_indices=return_indices)


def _as_strategy(query_strategy: Strategy | Literal["random"]) -> Strategy:
    if query_strategy == "random":
        return random_sampling
    if not callable(query_strategy):
        raise TypeError(
            'Expected query_strategy to be "random" or a callable '
            f"(learner, X_pool, n_instances) -> indices, found {query_strategy!r}."
        )
    return query_strategy


def _seed_of(seed: int, split: int, step: int, purpose: int) -> int:
    return int(np.random.SeedSequence([seed, split, step, purpose]).generate_state(1)[0])


def _initial_seeds(seed: int, splits: Sized) -> tuple[int, ...]:
    return tuple(_seed_of(seed, i, 0, _INITIAL) for i in range(len(splits)))


@contextmanager
def _interruptible() -> Iterator[None]:
    """Raise KeyboardInterrupt at the end if there was a Ctrl-C that the code inside swallowed.

    skorch takes it for the wish to end training early, and half-trained networks are no result.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before, interrupted = signal.getsignal(signal.SIGINT), False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        interrupted = True
        if callable(before):
            before(number, frame)

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if interrupted:
        raise KeyboardInterrupt


class _Learner:
    """What a query strategy sees: a modAL learner, as far as strategies use one."""

    def __init__(
        self, estimator: Estimator, query_strategy: Strategy, X: Data, y: np.ndarray
    ) -> None:
        self.estimator = estimator
        self.query_strategy = query_strategy
        self.X_training = X
        self.y_training = y

    def predict(self, X: Data) -> Labels:
        return self.estimator.predict(X)

    def predict_proba(self, X: Data) -> Data:
        return self.estimator.predict_proba(X)

    def score(self, X: Data, y: Labels) -> float:
        score: float = self.estimator.score(X, y)
        return score


@dataclass
class _Run:
    """One call: what is the same for all splits."""

    estimator: Estimator
    strategy: Strategy
    scorer: Scorer
    n_instances: int
    n_queries: int
    seed: int
    kept: Checkpoint | None

    def splits(
        self,
        X: Data,
        y: np.ndarray,
        tasks: list[tuple[int, np.ndarray, np.ndarray, np.ndarray]],
        n_jobs: int | None,
        progress: Callable[[int], object],
    ) -> list[list[Record]]:
        """Return the records of all splits, which may run at the same time."""
        if effective_n_jobs(n_jobs) == 1:
            return [self.split(X, y, *task, progress) for task in tasks]
        records = []
        parallel = Parallel(n_jobs=n_jobs, return_as="generator")
        for of_split in parallel(delayed(self.split)(X, y, *task) for task in tasks):
            records.append(of_split)
            progress(self.n_queries + 1)
        return records

    def split(
        self,
        X: Data,
        y: np.ndarray,
        number: int,
        train: np.ndarray,
        test: np.ndarray,
        start: np.ndarray,
        progress: Callable[[int], object] | None = None,
    ) -> list[Record]:
        """Return the record of every step: scores, seconds, and the rows chosen after it."""
        identity: dict[str, object] = {
            "training samples": fingerprint(train),
            "test samples": fingerprint(test),
            "initial samples": fingerprint(start),
        }
        records = [] if self.kept is None else self.kept.read(number, identity)
        records = records[: self.n_queries + 1]
        if len(records) <= self.n_queries and records and records[-1]["chosen"] is None:
            records.pop()  # It was the last step of a shorter run, which chose nothing after it.
        X_test, y_test = take_rows(X, test), y[test]
        if progress is not None:
            progress(len(records))
        while len(records) <= self.n_queries:
            labeled = np.concatenate([start, *(np.asarray(r["chosen"], int) for r in records)])
            with _interruptible():
                record = self._step(X, y, number, len(records), train, labeled, X_test, y_test)
            records.append(record)
            if self.kept is not None:
                self.kept.write(number, identity, records)
            if progress is not None:
                progress(1)
        return records

    def _step(
        self,
        X: Data,
        y: np.ndarray,
        number: int,
        step: int,
        train: np.ndarray,
        labeled: np.ndarray,
        X_test: Data,
        y_test: np.ndarray,
    ) -> Record:
        X_labeled, y_labeled = take_rows(X, labeled), y[labeled]
        with seeded(_seed_of(self.seed, number, step, _FIT)):
            began = time.perf_counter()
            with explaining_fit(self.estimator, X_labeled, y_labeled):
                fitted = clone(self.estimator).fit(X_labeled, y_labeled)
            fit_time = time.perf_counter() - began
            scores = self.scorer(fitted, X_test, y_test)
        record: Record = {
            "score": {k: float(v) for k, v in scores.items()}
            if isinstance(scores, Mapping)
            else float(scores),
            "fit_time": fit_time,
            "query_time": None,
            "chosen": None,
        }
        if step < self.n_queries:
            # Sorted, so that nothing depends on the splitter's order.
            pool = np.setdiff1d(train, labeled)
            strategy = self.strategy
            if isinstance(strategy, BaseEstimator):
                strategy = clone(strategy)
            learner = _Learner(fitted, strategy, X_labeled, y_labeled)
            X_pool = take_rows(X, pool)
            with seeded(_seed_of(self.seed, number, step, _QUERY)):
                began = time.perf_counter()
                chosen = strategy(learner, X_pool, n_instances=self.n_instances)
                record["query_time"] = time.perf_counter() - began
            record["chosen"] = pool[self._checked(chosen, len(pool))].tolist()
        return record

    def _checked(self, chosen: Data, n_pool: int) -> np.ndarray:
        if isinstance(chosen, tuple) and len(chosen) == 2:
            chosen = chosen[0]
        if isinstance(chosen, torch.Tensor):
            chosen = chosen.numpy(force=True)
        rows = np.asarray(chosen)
        good = (
            rows.shape == (self.n_instances,)
            and rows.dtype.kind in "iu"
            and len(np.unique(rows)) == len(rows)
            and rows.min() >= 0
            and rows.max() < n_pool
        )
        if not good:
            raise ValueError(
                f"Expected the query strategy to return {self.n_instances} different rows of a "
                f"pool of {n_pool}, found {rows!r}."
            )
        return rows


def _named(score: float | dict[str, float]) -> dict[str, float]:
    return score if isinstance(score, dict) else {"score": score}


def _gather(
    records: list[list[Record]],
    starts: list[np.ndarray],
    n_instances: int,
    n_queries: int,
    *,
    return_indices: bool,
) -> dict[str, np.ndarray]:
    result: dict[str, np.ndarray] = {
        "n_labeled": len(starts[0]) + n_instances * np.arange(n_queries + 1, dtype=np.int64)
    }
    for name in _named(records[0][0]["score"]):
        result[f"test_{name}"] = np.array([[_named(r["score"])[name] for r in s] for s in records])
    result["fit_time"] = np.array([[r["fit_time"] for r in s] for s in records])
    result["query_time"] = np.array([[r["query_time"] for r in s[:n_queries]] for s in records])
    if return_indices:
        result["indices"] = np.array(
            [
                [*start.tolist(), *(row for r in s[:n_queries] for row in r["chosen"] or ())]
                for start, s in zip(starts, records, strict=True)
            ],
            dtype=np.int64,
        )
    return result
