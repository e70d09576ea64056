"""Find the fitted skorch net inside an estimator, and the transformers before it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, runtime_checkable

import numpy as np
import skorch
import torch
from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.ensemble import BaseEnsemble
from sklearn.exceptions import NotFittedError
from sklearn.frozen import FrozenEstimator
from sklearn.multiclass import OneVsOneClassifier, OneVsRestClassifier, OutputCodeClassifier
from sklearn.multioutput import (
    ClassifierChain,
    MultiOutputClassifier,
    MultiOutputRegressor,
    RegressorChain,
)
from sklearn.pipeline import Pipeline
from sklearn.utils.validation import check_is_fitted

from skfishermask.data.diagnostics import missing_text_hint
from skfishermask.data.linear import is_linear, linear_inputs, linear_net
from skfishermask.data.net import check_net, check_no_module, has_own_dataset, is_net
from skfishermask.data.rows import has_columns, n_rows
from skfishermask.data.samples import check_no_text
from skfishermask.data.types import Data, Estimator, Labels

# Meta-estimators that fit several clones of one estimator.
_WRAP_SEVERAL = (
    *(BaseEnsemble, CalibratedClassifierCV, OneVsOneClassifier, OneVsRestClassifier),
    *(OutputCodeClassifier, ClassifierChain, RegressorChain),
    *(MultiOutputClassifier, MultiOutputRegressor),
)


@dataclass
class Unwrapped:
    """A fitted net, what lies between the user's data and it, and the learner's own data."""

    net: skorch.NeuralNet
    # In the order in which data go through them.
    transformers: list[Callable[[Data], Data]] = field(default_factory=list)
    X_training: Data = None  # labelled samples that a modAL learner or a fitted sampler keeps
    y_training: Labels = None  # a learner's labels of them
    variance: float | None = None  # residual, of a fitted sampler's labels that are numbers
    n_before: int = 0  # transformers that come before what keeps the samples

    @property
    def transform(self) -> Callable[[Data], Data]:
        """What gives the data as the net sees them, and knows nothing of the net."""
        return partial(_transformed, self.transformers)

    @property
    def training_inputs(self) -> Data:
        """The labelled samples that are kept, as the net sees them; None: there are none."""
        if self.X_training is None:
            return None
        return _transformed(self.transformers[self.n_before :], self.X_training)


@runtime_checkable
class Checking(Protocol):
    """An estimator around another one that checks samples before it passes them on."""

    def __skfishermask_checked__(self, X: Data) -> Data:
        """Return samples that are like those of the fit, or raise ValueError."""

    def __skfishermask_training__(self) -> Data:
        """Return the samples of the fit."""


def _transformed(transformers: list[Callable[[Data], Data]], X: Data) -> Data:
    for transformer in transformers:
        # Counted afterwards: a transformer names what is wrong with what has no rows.
        given, X = X, transformer(X)
        if n_rows(X) != n_rows(given):
            raise ValueError(
                f"Expected {n_rows(given)} rows from the steps before the network, found "
                f"{n_rows(X)}: a transformer that drops or adds samples would let others be chosen."
            )
    return X


def _wraps_one(estimator: Estimator) -> bool:
    """Return whether this is a meta-estimator that passes data unchanged to one other."""
    many_or_others = isinstance(estimator, _WRAP_SEVERAL) or hasattr(estimator, "transform")
    return hasattr(estimator, "estimator") and not many_or_others


def _transformers(pipeline: Pipeline) -> list[Estimator]:
    """List the steps before the last one, but for resamplers, which do nothing in prediction.

    They are called one by one: a pipeline of them alone would be asked whether it is fitted, which
    it cannot know where the last of them keeps no state.
    """
    return [step for _, step in pipeline.steps[:-1] if hasattr(step, "transform")]


def _levels(estimator: Estimator) -> Iterator[Estimator]:
    """Yield an estimator, and down to a net what pipelines end in or meta-estimators wrap."""
    yield estimator
    if isinstance(estimator, Pipeline):
        yield from _levels(estimator[-1])
    elif not is_net(estimator) and _wraps_one(estimator):
        yield from _levels(estimator.estimator)


def innermost(estimator: Estimator) -> Estimator:
    """Find what a pipeline ends in or a meta-estimator wraps, fitted or not."""
    return list(_levels(estimator))[-1]


def has_transformers(estimator: Estimator) -> bool:
    """Return whether samples come to a pipeline first, also inside search objects."""
    return any(isinstance(level, Pipeline) for level in _levels(estimator))


def unwrap(classifier: Estimator) -> Unwrapped:
    """Find the skorch net inside a classifier, or make one of a logistic regression inside.

    It may be in any nesting of modAL learners, scikit-learn pipelines, search objects, and
    meta-estimators with an ``estimator_``. Raises TypeError if there is none, NotFittedError if the
    classifier or a part of it is not fitted.
    """
    inner, X_training, y_training, variance = classifier, None, None, None
    n_before = 0
    transformers: list[Callable[[Data], Data]] = []
    while not is_net(inner):
        if hasattr(inner, "query_strategy") and hasattr(inner, "estimator"):
            if X_training is None:
                X_training, n_before = getattr(inner, "X_training", None), len(transformers)
                y_training = getattr(inner, "y_training", None)
            inner = inner.estimator
        elif isinstance(inner, Pipeline):
            check_is_fitted(inner)
            transformers += [step.transform for step in _transformers(inner)]
            inner = inner[-1]
        elif hasattr(inner, "best_estimator_"):
            inner = inner.best_estimator_
        elif isinstance(inner, FrozenEstimator):
            inner = inner.estimator
        elif _wraps_one(inner) and (check_is_fitted(inner) or hasattr(inner, "estimator_")):
            if isinstance(inner, Checking):
                if X_training is None:
                    X_training, n_before = inner.__skfishermask_training__(), len(transformers)
                transformers.append(inner.__skfishermask_checked__)
                variance = getattr(inner, "_variance", None)
            inner = inner.estimator_
        elif is_linear(inner):
            transformers.append(partial(linear_inputs, inner))
            inner = linear_net(inner)
        else:
            check_no_module(inner)
            kind = type(inner).__name__
            if inner is not classifier:
                kind = f"{kind} inside {type(classifier).__name__}"
            remedy = (
                "Give the net itself, fitted; without a net, FisherMaskSampler() fits a small one "
                "of its own to query with, and a classifier of any kind can be trained on the "
                "answers."
            )
            if hasattr(inner, "learner_list"):
                remedy = (
                    "A query reads one network: give one of its members, as in query_strategy="
                    "lambda committee, X, **more: fishermask(committee.learner_list[0], X, **more)."
                )
            raise TypeError(
                "Expected a skorch classifier, LogisticRegression or SGDClassifier(loss='log_loss')"
                f", alone or inside a modAL learner, a Pipeline or a search object, found {kind}. "
                f"{remedy}"
            )
    check_net(inner)
    return Unwrapped(inner, transformers, X_training, y_training, variance, n_before)


@dataclass
class Unfitted:
    """A net that is not fitted, and the transformers before it."""

    net: skorch.NeuralNet  # gives the dataset and the iterator that read samples
    transformers: list[Estimator]  # clones, in the order in which data go through them
    is_own: bool  # whether `net` is the user's: then integers may stand for tokens

    def fit_transform(self, X: Data) -> Data:
        """Fit the transformers to samples, and return these as the net would see them."""
        for transformer in self.transformers:
            try:
                X = transformer.fit_transform(X)
            except Exception as error:
                if hint := missing_text_hint(X, "X_pool"):
                    error.add_note(hint)
                error.add_note(
                    f"Without labels, {type(transformer).__name__} is fitted to X_pool alone: "
                    "transform the samples before the query where that does not do."
                )
                raise
        return self._inputs(X)

    def of_chunks(self) -> Callable[[Data], Data]:
        """Return what turns the chunks of a Dask array into what the net would see.

        Raises ValueError if there are transformers: they would be fitted to each chunk by itself.
        """
        if self.transformers:
            raise ValueError(
                f"{type(self.transformers[0]).__name__} is not fitted, and X_pool is a Dask array: "
                "fit the transformers to some of its rows before."
            )
        return self._inputs

    def transform(self, X: Data) -> Data:
        """Return further samples as the net would see them."""
        for transformer in self.transformers:
            X = transformer.transform(X)
        return self._inputs(X)

    def _inputs(self, X: Data) -> Data:
        if has_columns(X) and hasattr(X, "__array__") and not has_own_dataset(self.net):
            check_no_text(X, "X_pool")
            X = np.asarray(X)
        if self.is_own or not hasattr(X, "dtype"):
            return X
        if isinstance(X, torch.Tensor):
            return X if X.is_floating_point() else X.float()
        return X.astype("float32") if X.dtype.kind in "biu" else X


def unwrap_unfitted(estimator: Estimator) -> Unfitted:
    """Find what reads and transforms samples for an estimator that is not fitted.

    It is a skorch net, or one inside modAL learners, pipelines, search objects and
    meta-estimators. Without one, samples are read as arrays.
    """
    transformers: list[Estimator] = []
    while not is_net(estimator):
        if isinstance(estimator, Pipeline):
            transformers += map(clone, _transformers(estimator))
            estimator = estimator.steps[-1][1]
        elif hasattr(estimator, "estimator"):
            estimator = estimator.estimator
        else:
            reader = skorch.NeuralNet(torch.nn.Identity, torch.nn.MSELoss, batch_size=1024)
            return Unfitted(reader, transformers, is_own=False)
    return Unfitted(estimator, transformers, is_own=True)


def is_fitted(estimator: Estimator) -> bool:
    """Return whether scikit-learn takes an estimator for fitted."""
    try:
        check_is_fitted(estimator)
    except NotFittedError:
        return False
    return True


def has_no_labels(classifier: Estimator) -> bool:
    """Return whether this is a modAL learner without training data around an unfitted estimator."""
    if not (hasattr(classifier, "query_strategy") and hasattr(classifier, "estimator")):
        return False
    if getattr(classifier, "X_training", None) is not None:
        return False
    last = classifier.estimator
    while isinstance(last, Pipeline):
        last = last[-1]
    if is_net(last):
        # scikit-learn's check takes nets of older versions of skorch for fitted.
        return not getattr(last, "initialized_", False)
    return not is_fitted(last)
