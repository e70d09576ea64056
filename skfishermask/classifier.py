"""A scikit-learn classifier around a skorch net: labels of any type, checks, casts, one seed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Self

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import LabelEncoder
from sklearn.utils import Tags, check_random_state, get_tags
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import (
    check_consistent_length,
    check_is_fitted,
    column_or_1d,
    validate_data,
)

from skfishermask.data import (
    Data,
    Estimator,
    Labels,
    NetModule,
    Relabeled,
    Whatever,
    as_rows,
    check_classes,
    check_finite,
    check_holds_samples,
    check_no_gaps,
    check_no_module,
    check_no_text,
    counted,
    default_net,
    image_hint,
    innermost,
    is_binary,
    is_several,
    is_text,
    map_inputs,
    n_rows,
    odd_sample,
    parts_of,
    unwrap,
)
from skfishermask.jacobian import seeded
from skfishermask.parameters import Seed, check_parameters

# Samples of a Dataset that are read to find an odd one.
_LOOKED_AT = 10_000


@contextmanager
def _explained(what: str, X: Data, classes: str = "") -> Iterator[None]:
    """Raise what PyTorch says about unfit data as an estimator's ValueError or TypeError.

    An IndexError is explained by `classes`, too, and of a Dataset the odd sample is named.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if isinstance(X, torch.utils.data.Dataset):
            note = odd_sample(X, np.arange(min(n_rows(X), _LOOKED_AT)), "X")
        else:
            note = image_hint(X)
        if note:
            error.add_note(note)
        if "n_splits" in str(error):  # scikit-learn's, asked by skorch
            error.add_note(
                "The net sets a part of the labels aside to validate on. With few labels give it "
                "train_split=None."
            )
        if not isinstance(error, RuntimeError | IndexError | TypeError):
            raise
        kind = TypeError if isinstance(error, TypeError) else ValueError
        reason = classes if isinstance(error, IndexError) else ""
        explained = kind(f"{what}{reason}: {error}")
        for note in getattr(error, "__notes__", []):
            explained.add_note(note)
        raise explained from error


def _dtype_of(module: torch.nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype


class NetClassifier(ClassifierMixin, BaseEstimator):
    """What `FisherMaskSampler` is besides a query strategy.

    A subclass stores the parameters in its ``__init__``.

    Parameters
    ----------
    estimator : skorch classifier, or a Pipeline or search object around one, or None
        The classifier to wrap; None: a small default network made from the data.
    random_state : int, RandomState or None
        For :meth:`fit`.
    """

    estimator: Estimator
    random_state: Seed

    def fit(self, X: Data, y: Labels = None, **fit_params: Whatever) -> Self:
        """Fit a clone of the estimator.

        Parameters
        ----------
        X : array-like, DataFrame, sparse matrix, tensor, dict of arrays or Dataset
            Training samples. Arrays of floating-point numbers are cast to the dtype of the
            network; integers (tokens, say) are left as they are.
        y : array-like of shape (n_samples,)
            Labels of any type. May be None for a Dataset that gives labels 0 to C - 1 itself.
        **fit_params : dict
            Passed to the estimator's ``fit``.

        Returns
        -------
        Self
            The classifier itself.

        Raises
        ------
        ValueError
            If the data are not numbers, not finite or not of equal length, or if there are
            fewer than two classes.
        """
        check_no_module(self.estimator)
        check_parameters(self)
        X = self._check_input(X, reset=True)
        y = self._encode_labels(X, y)
        if self.estimator is None:
            if isinstance(X, torch.utils.data.Dataset):
                raise ValueError(
                    "The default network takes arrays: give a skorch classifier as estimator, for "
                    f"samples of a {type(X).__name__}."
                )
            estimator = default_net(np.shape(X), len(self.classes_))
        else:
            estimator = clone(self.estimator)
        net = innermost(estimator)
        if is_binary(net) and y is not None:
            y = y.astype("float32")
            if len(self.classes_) != 2:
                raise ValueError(
                    "NeuralNetBinaryClassifier is a binary classifier: expected 2 classes, found "
                    f"{len(self.classes_)}. Only binary classification is supported."
                )
        with ExitStack() as stack:
            if self.random_state is not None:
                seed = check_random_state(self.random_state).randint(2**31 - 1)
                stack.enter_context(seeded(seed))
            # Inside of the seed: what reads samples again to explain an error draws from it.
            stack.enter_context(
                _explained(
                    "The estimator cannot be fitted to these samples, which the network must take",
                    X,
                    f", with an output for each of {len(self.classes_)} classes"
                    f"{counted(self.classes_, y)}",
                )
            )
            if isinstance(X, torch.utils.data.Dataset) and y is not None:
                X = Relabeled(X, y)  # a net that sets samples aside by class looks at y, too
            self.estimator_ = estimator.fit(X, y, **fit_params)
        return self

    def _encode_labels(self, X: Data, y: Labels) -> np.ndarray | None:
        if y is None and isinstance(X, torch.utils.data.Dataset):
            # PyTorch declares no length for it.
            own = np.asarray([int(X[i][1]) for i in range(len(X))])  # type: ignore[arg-type]
            self.classes_ = check_classes(np.unique(own))
            if self.classes_.tolist() != list(range(len(self.classes_))):
                raise ValueError(
                    "A Dataset given without y must have the labels 0 to C - 1, found "
                    f"{self.classes_.tolist()}."
                )
            return None
        if y is None:
            raise ValueError(
                f"{type(self).__name__} requires y to be passed, but the target y is None."
            )
        check_no_gaps(y)
        y = column_or_1d(y, warn=True)
        check_finite(y, "y")
        check_classification_targets(y)
        check_consistent_length(*parts_of(X), y)
        encoder = LabelEncoder().fit(y)
        self.classes_ = check_classes(encoder.classes_)
        encoded: np.ndarray = encoder.transform(y).astype("int64")
        return encoded

    def _check_input(self, X: Data, *, reset: bool = False, casts: bool = True) -> Data:
        """Check data against those of `fit`, and cast them to what the estimator takes."""
        check_holds_samples(X, "X")
        if reset:
            self._forget_shapes()
        if is_several(X) or isinstance(X, torch.utils.data.Dataset | torch.Tensor):
            X = as_rows(X, "X")
            if n_rows(X) == 0:
                raise ValueError("Found 0 samples in X, expected at least one.")
            check_finite(X, "X")
            if isinstance(X, torch.Tensor):
                self._check_sample_shape(tuple(X.shape[1:]), reset=reset)
                if reset and X.dim() > 1:
                    self.n_features_in_ = X.shape[1]
            return self._cast(X, reset=reset, casts=casts)
        if isinstance(self.estimator, Pipeline) and is_text(X):
            return X
        check_no_text(X, "X")
        if isinstance(self.estimator, Pipeline) and hasattr(X, "dtypes"):
            # The transformers know what to do with columns of any type.
            validate_data(self, X, reset=reset, skip_check_array=True)
            return X
        tags, is_frame = get_tags(self).input_tags, hasattr(X, "iloc")
        X = validate_data(
            self,
            X,
            reset=reset,
            # Whether sparse data become dense is for a pipeline's transformers to say.
            accept_sparse=isinstance(self.estimator, Pipeline),
            allow_nd=True,
            dtype=None if isinstance(self.estimator, Pipeline) else "numeric",
            ensure_all_finite=False,
        )
        if is_frame and not X.flags.writeable:
            X = X.copy()  # pandas 3 hands out read-only arrays, of which PyTorch warns
        if not tags.allow_nan:
            check_finite(X, "X")
        self._check_sample_shape(X.shape[1:], reset=reset)
        if isinstance(self.estimator, Pipeline):
            return X
        return self._cast(X, reset=reset, casts=casts)

    def __skfishermask_checked__(self, X: Data) -> Data:
        # A query casts batch by batch, and so a memory map stays one.
        return self._check_input(X, casts=False)

    def _forget_shapes(self) -> None:
        self._sample_shape: tuple[int, ...] | None = None
        for name in ("n_features_in_", "feature_names_in_"):
            if hasattr(self, name):
                delattr(self, name)

    def _check_sample_shape(self, shape: tuple[int, ...], *, reset: bool) -> None:
        if reset:
            self._sample_shape = shape
        elif self._sample_shape not in (None, shape):
            raise ValueError(
                f"X has samples of shape {shape}, but {type(self).__name__} is expecting "
                f"samples of shape {self._sample_shape} as input."
            )

    def _cast(self, X: Data, *, reset: bool, casts: bool) -> Data:
        """Cast floating-point numbers to the dtype of the network, all to that of the default."""
        if is_several(X):
            return map_inputs(X, lambda _, part: self._cast(part, reset=reset, casts=casts))
        if not isinstance(X, np.ndarray | torch.Tensor):
            return X
        is_float = X.dtype.kind == "f" if isinstance(X, np.ndarray) else X.is_floating_point()
        if (not is_float and self.estimator is not None) or (is_float and not casts):
            return X
        dtype = self._input_dtype(X, reset=reset)
        if isinstance(X, torch.Tensor):
            return X.to(dtype)
        # NumPy has no bfloat16.
        wide = torch.float32 if dtype == torch.bfloat16 else dtype
        return X.astype(str(wide).removeprefix("torch."), copy=False)

    def _input_dtype(self, X: Data, *, reset: bool) -> torch.dtype:
        """Find the floating-point dtype that the network takes."""
        if not reset:
            return _dtype_of(NetModule(unwrap(self.estimator_).net))
        net = innermost(self.estimator)
        module = getattr(net, "module", None)
        if isinstance(module, torch.nn.Module):
            return _dtype_of(module)
        net = clone(net) if net is not None else default_net(np.shape(X), 2)
        # Its initial weights are not wanted: only its dtype.
        with seeded(0):
            return _dtype_of(NetModule(net.initialize()))

    def predict_proba(self, X: Data) -> np.ndarray:
        """Predict class probabilities.

        Parameters
        ----------
        X : array-like, DataFrame, sparse matrix, tensor, dict of arrays or Dataset
            Samples, as in :meth:`fit`.

        Returns
        -------
        ndarray of shape (n_samples, n_classes)
            In the order of `classes_`. Outputs of the network beyond the classes seen in
            :meth:`fit` are left out, and the others scaled to sum to one.
        """
        check_is_fitted(self)
        X = self._check_input(X)
        if isinstance(X, torch.utils.data.Dataset):
            # skorch wants labels of it, which it then does not look at.
            X = Relabeled(X, np.zeros(n_rows(X), dtype="int64"))
        with _explained("The network cannot read X", X):
            p: np.ndarray = self.estimator_.predict_proba(X)
        bad = ~np.isfinite(p).all(axis=1)
        if bad.any():
            raise ValueError(
                f"The network's output is not finite, first in row {int(bad.argmax())} of X."
            )
        n_classes = len(self.classes_)
        if p.shape[1] < n_classes:
            raise ValueError(
                f"The network has {p.shape[1]} outputs, expected one for each of the {n_classes} "
                "classes."
            )
        if p.shape[1] > n_classes:
            p = p[:, :n_classes]
            p = p / np.maximum(p.sum(axis=1, keepdims=True), np.finfo(p.dtype).tiny)
        return p

    def predict(self, X: Data) -> np.ndarray:
        """Predict class labels.

        Parameters
        ----------
        X : array-like, DataFrame, sparse matrix, tensor, dict of arrays or Dataset
            Samples, as in :meth:`fit`.

        Returns
        -------
        ndarray of shape (n_samples,)
            Labels, as they were given to :meth:`fit`.
        """
        check_is_fitted(self)
        net, p = unwrap(self.estimator_).net, self.predict_proba(X)
        # A binary net has a threshold of its own.
        chosen = (p[:, 1] > net.threshold).astype(int) if is_binary(net) else p.argmax(axis=1)
        labels: np.ndarray = self.classes_[chosen]
        return labels

    def __sklearn_is_fitted__(self) -> bool:
        # A bare query strategy has fitted attributes too, of its last query.
        return hasattr(self, "estimator_")

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        if self.estimator is not None:
            inner = get_tags(self.estimator)
            is_pipeline = isinstance(self.estimator, Pipeline)
            # A pipeline calls itself sparse only where its last step is, which a network is not.
            steps = [step for _, step in self.estimator.steps] if is_pipeline else []
            first = next((step for step in steps if step not in (None, "passthrough")), None)
            tags.input_tags.sparse = first is not None and get_tags(first).input_tags.sparse
            tags.input_tags.allow_nan = is_pipeline and inner.input_tags.allow_nan
            if is_binary(innermost(self.estimator)):
                tags.classifier_tags.multi_class = False
        return tags
