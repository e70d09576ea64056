"""Kinds of labels: how `fit` takes them, and how predictions come back in their form."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import torch
from sklearn.base import is_classifier
from sklearn.metrics import accuracy_score, r2_score
from sklearn.preprocessing import LabelEncoder
from sklearn.utils import check_array
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_consistent_length, column_or_1d

from skfishermask.data import (
    Data,
    Estimator,
    Labels,
    check_classes,
    check_finite,
    check_known,
    check_no_lists_of_labels,
    check_no_missing_labels,
    input_arrays,
    is_net,
    likelihood_name,
)
from skfishermask.fisher import LIKELIHOODS, Likelihood


class Target(Protocol):
    """A kind of labels."""

    classes: np.ndarray | None = None  # what an estimator calls its ``classes_``
    n_outputs: int  # that a network needs for such labels

    def encode(self, X: Data, y: Labels) -> np.ndarray | None:
        """Check labels, and return them as a network is trained on them."""

    def decode(self, means: np.ndarray) -> np.ndarray:
        """Return labels of the kind and shape given to `encode`, from predicted means."""

    def score(self, y: Labels, predicted: np.ndarray, sample_weight: Labels = None) -> float:
        """Return the score of predicted labels, as scikit-learn's mixins define it."""


class Classes(Target):
    """One class a sample, of any type of labels."""

    def encode(self, X: Data, y: Labels) -> np.ndarray | None:
        """Return class numbers; None for a Dataset that has them itself."""
        if y is None:
            # PyTorch declares no length for a Dataset.
            own = np.asarray([int(X[i][1]) for i in range(len(X))])
            self.classes = check_classes(np.unique(own))
            if self.classes.tolist() != list(range(len(self.classes))):
                raise ValueError(
                    "A Dataset given without y must have the labels 0 to C - 1, found "
                    f"{self.classes.tolist()}."
                )
            encoded = None
        else:
            check_no_missing_labels(y)
            y = _one_dimensional(y)
            check_finite(y, "y")
            try:
                check_classification_targets(y)
            except ValueError as error:
                raise ValueError(
                    f'{error} For labels that are numbers: likelihood="gaussian", or a '
                    "NeuralNetRegressor as estimator."
                ) from error
            check_consistent_length(*input_arrays(X), y)
            encoder = LabelEncoder().fit(y)
            self.classes = check_classes(encoder.classes_)
            encoded = encoder.transform(y).astype("int64")
        self.n_outputs = len(self.classes)
        return encoded

    def decode(self, means: np.ndarray) -> np.ndarray:
        """Return the most probable classes."""
        assert self.classes is not None
        labels: np.ndarray = self.classes[means.argmax(axis=1)]
        return labels

    def score(self, y: Labels, predicted: np.ndarray, sample_weight: Labels = None) -> float:
        """Return the accuracy."""
        return float(accuracy_score(y, predicted, sample_weight=sample_weight))


class PositionClasses(Target):
    """A class number for each position of a sample, (n, ...); `ignore_index` where it has none."""

    def __init__(self, ignore_index: int) -> None:
        self._ignore_index = ignore_index

    def encode(self, X: Data, y: Labels) -> np.ndarray:
        """Return these as they are: the network's outputs decide which classes there are."""
        numbers = np.asarray(y)
        if numbers.dtype.kind not in "iu":
            raise ValueError(
                "Expected class numbers, 0 to C - 1, as labels of positions, found "
                f"{numbers.dtype} of shape {numbers.shape}."
            )
        check_consistent_length(*input_arrays(X), numbers)
        classes = check_classes(np.unique(numbers[numbers != self._ignore_index]))
        self.classes, self.n_outputs = classes, int(classes.max()) + 1
        return numbers.astype("int64")

    def decode(self, means: np.ndarray) -> np.ndarray:
        """Return the most probable class of each position."""
        labels: np.ndarray = means.argmax(axis=1)
        return labels

    def score(self, y: Labels, predicted: np.ndarray, sample_weight: Labels = None) -> float:
        """Return the accuracy over positions that have a label."""
        y = np.asarray(y)
        _check_shape(y, predicted)
        known = y != self._ignore_index
        weights = np.broadcast_to(_column(sample_weight, y), y.shape)[known]
        return float(np.average(predicted[known] == y[known], weights=weights))


class Indicators(Target):
    """Several labels a sample: 0 or 1 each, or NaN where it is not known, (n, L)."""

    def encode(self, X: Data, y: Labels) -> np.ndarray | None:
        """Return them as floating-point numbers; None for a Dataset that has them itself."""
        if y is None:
            return None
        known = _as_numbers(y, "float32")
        check_known(np.where(np.isnan(known), 0, known))
        is_missing = np.isnan(known)
        others = known[~is_missing & ~np.isin(known, (0, 1))]
        if known.ndim != 2 or len(others) > 0:
            kind = "continuous values" if (others % 1 != 0).any() else "values"
            values = f" and {kind} such as {others[0]:.6g}" if len(others) > 0 else ""
            raise ValueError(
                "Expected several labels a sample, y of shape (n, n_labels) with 0 and 1, found "
                f"shape {known.shape}{values}. For one class a sample: a NeuralNetClassifier "
                "with CrossEntropyLoss."
            )
        if is_missing.all():
            raise ValueError("Expected a known label in y, found NaN alone.")
        check_consistent_length(*input_arrays(X), known)
        self.n_outputs = known.shape[1]
        self.classes = np.arange(self.n_outputs)
        return known

    def decode(self, means: np.ndarray) -> np.ndarray:
        """Return one where a label is more probable than not."""
        present: np.ndarray = (means > 0.5).astype("int64")
        return present

    def score(self, y: Labels, predicted: np.ndarray, sample_weight: Labels = None) -> float:
        """Return the share of samples with all known labels right."""
        y = np.asarray(y, dtype="float64")
        _check_shape(y, predicted)
        right = ((predicted == y) | np.isnan(y)).all(axis=1)
        return float(np.average(right, weights=sample_weight))


class Numbers(Target):
    """One number a sample, or several: (n,) or (n, n_targets)."""

    def encode(self, X: Data, y: Labels) -> np.ndarray | None:
        """Return them as (n, n_targets); None for a Dataset that has them itself."""
        self._is_flat = False
        if y is None:
            return None
        numbers = _as_numbers(y, "float64")
        check_known(numbers)
        check_consistent_length(*input_arrays(X), numbers)
        self._is_flat = numbers.ndim == 1
        numbers = numbers.reshape(len(numbers), -1)
        self.n_outputs = numbers.shape[1]
        return numbers

    def decode(self, means: np.ndarray) -> np.ndarray:
        """Return the means."""
        return means.reshape(-1) if self._is_flat else means

    def score(self, y: Labels, predicted: np.ndarray, sample_weight: Labels = None) -> float:
        """Return the coefficient of determination, R^2."""
        return float(r2_score(y, predicted, sample_weight=sample_weight))


# The likelihoods that have a kind of labels of their own.
_KINDS = ("categorical", "bernoulli", "gaussian")


def kind_of_labels(likelihood: str | Likelihood, net: Estimator) -> str:
    """Return the likelihood that has labels of this kind; of others by the kind of net.

    Raises ValueError if neither the user's parameter nor the net, if one was given, tells.
    """
    if isinstance(likelihood, str) and likelihood == "auto":
        likelihood = likelihood_name(net) if is_net(net) else "categorical"
    kind = LIKELIHOODS[likelihood] if isinstance(likelihood, str) else type(likelihood)
    for name in _KINDS:
        if issubclass(kind, LIKELIHOODS[name]):
            return name
    if net is None:
        raise ValueError(
            f"Without a net as estimator, likelihood is one of {_KINDS}, found {likelihood!r}."
        )
    return "categorical" if is_classifier(net) else "gaussian"


def target_of(name: str, y: Labels, ignore_index: int | None = None) -> Target:
    """Return the kind of labels y of a likelihood, named as by `kind_of_labels`.

    `ignore_index` is that of PyTorch's ``CrossEntropyLoss``; None: no labels of positions.
    """
    check_no_lists_of_labels(y)
    if name == "gaussian":
        return Numbers()
    if name == "bernoulli":
        return Indicators()
    if isinstance(y, torch.Tensor):
        y = y.numpy(force=True)
    has_positions = isinstance(y, np.ndarray) and y.ndim > 1 and y.shape[1] > 1
    if ignore_index is not None and has_positions and y.dtype.kind in "iu":
        return PositionClasses(ignore_index)
    return Classes()


@contextmanager
def refusing_other_shapes(target: Target) -> Iterator[None]:
    """Raise ValueError where PyTorch would broadcast outputs to numbers of another shape."""
    if not isinstance(target, Numbers):
        yield
        return
    begin = "Using a target size"
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", begin)
            yield
    except UserWarning as error:
        if not str(error).startswith(begin):
            raise
        raise ValueError(f"the network has outputs of another shape than y. {error}") from error


def _as_numbers(y: Labels, dtype: str) -> np.ndarray:
    """Return labels as numbers, NaN and infinity among them; ValueError at names."""
    options = {"ensure_2d": False, "ensure_all_finite": False, "input_name": "y"}
    try:
        numbers: np.ndarray = check_array(y, dtype=dtype, **options)
    except ValueError as error:
        values = np.asarray(y, dtype=object).ravel()
        name = next((str(value) for value in values if isinstance(value, str)), None)
        if name is None:
            raise
        raise ValueError(
            f"Expected numbers in y, found names such as {name!r}. For classes, leave likelihood "
            "out; for several names a sample, expected 0 and 1 of shape (n, n_labels), as "
            "sklearn.preprocessing.MultiLabelBinarizer makes of them."
        ) from error
    return numbers


def _one_dimensional(y: Labels) -> np.ndarray:
    try:
        flat: np.ndarray = column_or_1d(y, warn=True)
    except ValueError as error:
        raise ValueError(
            f'{error} For several labels a sample: likelihood="bernoulli", or a net with '
            "BCEWithLogitsLoss as estimator; for several numbers a sample: "
            'likelihood="gaussian", or a NeuralNetRegressor.'
        ) from error
    return flat


def _check_shape(y: np.ndarray, predicted: np.ndarray) -> None:
    """Raise ValueError unless labels have the shape of predictions: they would be broadcast."""
    if y.shape != predicted.shape:
        raise ValueError(
            f"Expected y of shape {predicted.shape}, like what is predicted for X, got shape "
            f"{y.shape}."
        )


def _column(weights: Labels, y: np.ndarray) -> np.ndarray:
    values = np.ones(len(y)) if weights is None else np.asarray(weights, dtype="float64")
    return values.reshape(-1, *[1] * (y.ndim - 1))
