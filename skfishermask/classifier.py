"""A scikit-learn classifier around a skorch net: labels of any type, checks, casts, one seed."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Self

import numpy as np
import torch
from sklearn.base import BaseEstimator, clone
from sklearn.linear_model import SGDClassifier
from sklearn.pipeline import Pipeline
from sklearn.utils import ClassifierTags, RegressorTags, Tags, check_random_state, get_tags
from sklearn.utils.metaestimators import available_if
from sklearn.utils.validation import check_is_fitted, has_fit_parameter, validate_data

from skfishermask.data import (
    Data,
    Estimator,
    Labels,
    NetModule,
    Relabeled,
    UserValue,
    as_rows,
    cast,
    check_criterion_fits,
    check_finite,
    check_holds_samples,
    check_labels_fit,
    check_no_module,
    check_no_text,
    counted,
    default_net,
    explained,
    has_columns,
    has_own_dataset,
    has_transformers,
    ignore_index_of,
    innermost,
    is_binary,
    is_in_file,
    is_linear,
    is_multi_input,
    is_net,
    is_numeric,
    is_ragged,
    likelihood_of,
    n_rows,
    residual_variance,
    to_logits_of,
    unwrap,
    warn_of_outputs,
    with_labels,
)
from skfishermask.fisher import Likelihood
from skfishermask.jacobian import ToOutputs, seeded
from skfishermask.parameters import Seed, check_parameters
from skfishermask.targets import Classes, kind_of_labels, refusing_other_shapes, target_of


def _check_wraps_net(estimator: Estimator) -> None:
    """Raise TypeError at an estimator without a net."""
    if not hasattr(estimator, "fit"):  # none, or no estimator
        return
    net = innermost(estimator)
    if not is_net(net) and not is_linear(net):
        kind = type(net).__name__
        if isinstance(net, SGDClassifier):
            kind = f"{kind}(loss={net.loss!r})"
        raise TypeError(
            "Expected a skorch classifier, LogisticRegression or SGDClassifier(loss='log_loss') as "
            f"estimator, found {kind}, which has no gradients to query by. Leave estimator out: a "
            f"small network of the sampler's own queries, and {type(net).__name__} is trained on "
            "the answers."
        )


def _check_fit_params(net: Estimator, fit_params: Mapping[str, UserValue]) -> None:
    """Raise TypeError at weights of samples for a net."""
    if "sample_weight" in fit_params and not has_fit_parameter(net, "sample_weight"):
        raise TypeError(
            f"The fit of {type(net).__name__} takes no sample_weight. Classes are weighted by the "
            "criterion, as in criterion__weight=torch.tensor([1.0, 5.0])."
        )


def _dtype_of(module: torch.nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype


def _is_complex(X: Data) -> bool:
    return isinstance(X, np.ndarray) and X.dtype.kind == "c"


class NetEstimator(BaseEstimator):
    """What `FisherMaskSampler` is besides a query strategy: a classifier, or a regressor.

    The subclass has the parameters.
    """

    estimator: Estimator
    likelihood: str | Likelihood
    to_logits: ToOutputs | None
    random_state: Seed

    def fit(self, X: Data, y: Labels = None, **fit_params: UserValue) -> Self:
        """Fit a clone of the estimator.

        Parameters
        ----------
        X : array-like, DataFrame, sparse matrix, tensor, dict of arrays or Dataset
            Training samples. Arrays of floating-point numbers are cast to the dtype of the
            network; integers (tokens, say) are left as they are.
        y : array-like of shape (n_samples,), (n_samples, n_outputs) or (n_samples, ...)
            Classes, labels of any type; several labels a sample, 0 or 1 (NaN where the criterion
            leaves missing ones out); numbers, one or several a sample; or a class number a
            position: by `likelihood`. May be None for a Dataset that gives them itself, classes
            as numbers from 0.
        **fit_params : dict
            Passed to the estimator's ``fit``.

        Returns
        -------
        Self
            The classifier itself.

        Raises
        ------
        ValueError
            If the data are not numbers, not finite or not of equal length, if there are fewer
            than two classes, or if the labels are not of the kind of the estimator's criterion.
        """
        check_no_module(self.estimator)
        _check_wraps_net(self.estimator)
        check_parameters(self)
        X_given = X
        X = self._check_input(X, reset=True)
        y = self._encode_labels(X, y)
        if self.estimator is None:
            if isinstance(X, torch.utils.data.Dataset):
                raise ValueError(
                    "The default network takes arrays: give a skorch classifier as estimator, for "
                    f"samples of a {type(X).__name__}."
                )
            estimator = default_net(np.shape(X), self._target.n_outputs, self._likelihood_name())
            check_labels_fit(estimator, y)
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
        _check_fit_params(net, fit_params)
        with ExitStack() as stack:
            if self.random_state is not None:
                seed = check_random_state(self.random_state).randint(2**31 - 1)
                stack.enter_context(seeded(seed))
            # Inside of the seed: what reads samples again to explain an error draws from it.
            stack.enter_context(
                explained(
                    "Complex data not supported by the network"
                    if _is_complex(X)
                    else "The estimator cannot be fitted to these samples, which the network must "
                    "take",
                    X,
                    self._outputs_hint(y),
                )
            )
            if isinstance(X, torch.utils.data.Dataset) and y is not None:
                X = Relabeled(X, y)  # a net that sets samples aside by class looks at y, too
            if is_linear(net) and y is not None:
                y = self.classes_[y]  # as they were given: class_weight names them
            stack.enter_context(refusing_other_shapes(self._target))
            self.estimator_ = estimator.fit(X, y, **fit_params)
            self._variance = None
            if y is not None and not self._has_probabilities():
                self._variance = residual_variance(y, self.estimator_.predict(X))
            if not fit_params:  # which prediction has not
                warn_of_outputs(self.estimator_, X)
        # By reference, as nearest neighbours do: a query takes them for its labelled samples.
        self._X_training = X_given
        return self

    def _outputs_hint(self, y: np.ndarray | None) -> str:
        if not isinstance(self._target, Classes):
            return ""
        n_classes = len(self.classes_)
        return f", with an output for each of {n_classes} classes{counted(self.classes_, y)}"

    def _likelihood_name(self) -> str:
        return kind_of_labels(self.likelihood, innermost(self.estimator))

    def _encode_labels(self, X: Data, y: Labels) -> np.ndarray | None:
        net, name = innermost(self.estimator), self._likelihood_name()
        if y is None and not isinstance(X, torch.utils.data.Dataset):
            raise ValueError(
                f"{type(self).__name__} requires y to be passed, but the target y is None."
            )
        if is_binary(net) and name == "bernoulli":
            name = "categorical"
        if isinstance(self.likelihood, str) or is_linear(net):
            check_criterion_fits(net, name)
        self._target = target_of(name, y, ignore_index_of(net) if is_net(net) else None)
        if is_net(net) and y is not None:
            check_labels_fit(net, y)
        encoded = self._target.encode(X, y)
        if self._target.classes is not None:
            self.classes_ = self._target.classes
        elif hasattr(self, "classes_"):
            del self.classes_
        numbers: np.ndarray | None = cast(encoded, lambda _: self._input_dtype(X, reset=True))
        return numbers

    def _check_input(self, X: Data, *, reset: bool = False) -> Data:
        """Check data against those of `fit`, and cast them to what the estimator takes."""
        check_holds_samples(X, "X")
        if reset:
            self._forget_shapes()
        net, in_pipeline = innermost(self.estimator), isinstance(self.estimator, Pipeline)
        own_dataset, by_sklearn = (
            is_net(net) and has_own_dataset(net),
            in_pipeline or is_linear(net),
        )
        transforms = has_transformers(self.estimator)
        if (transforms or own_dataset) and not is_numeric(X, lists=transforms):
            # What the transformers, or a dataset of the user's, know to read is not looked into.
            if len(getattr(X, "shape", ())) == 2:
                validate_data(self, X, reset=reset, skip_check_array=True)
            return X
        has_own_kind = isinstance(X, torch.utils.data.Dataset | torch.Tensor) or is_multi_input(X)
        has_own_kind |= has_columns(X) and not hasattr(X, "__array__")
        is_complex = self.estimator is not None and _is_complex(X)
        if has_own_kind or (not by_sklearn and (is_complex or is_in_file(X))):
            X = as_rows(X, "X", has_own_dataset=own_dataset)
            if n_rows(X) == 0:
                raise ValueError("Found 0 samples in X, expected at least one.")
            check_finite(X, "X")
            if hasattr(X, "shape"):
                self._check_sample_shape(tuple(X.shape[1:]), reset=reset)
                if reset and len(X.shape) > 1:
                    self.n_features_in_ = X.shape[1]
            return self._cast(X, reset=reset)
        check_no_text(X, "X")
        tags, is_frame = get_tags(self).input_tags, has_columns(X)
        if is_ragged(X):
            as_rows(X, "X")  # raises an error that says what to do
        X = validate_data(
            self,
            X,
            reset=reset,
            # Whether sparse data become dense is for a pipeline's transformers to say.
            accept_sparse=by_sklearn,
            allow_nd=True,
            dtype=None if in_pipeline else "numeric",
            ensure_all_finite=False,
        )
        if is_frame and not X.flags.writeable:
            X = X.copy()  # pandas 3 returns read-only arrays, of which PyTorch warns
        if not tags.allow_nan:
            check_finite(X, "X")
        self._check_sample_shape(X.shape[1:], reset=reset)
        return X if in_pipeline else self._cast(as_rows(X, "X"), reset=reset)

    def __skfishermask_checked__(self, X: Data) -> Data:
        return self._check_input(X)

    def __skfishermask_training__(self) -> Data:
        return self._X_training

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

    def _cast(self, X: Data, *, reset: bool) -> Data:
        """Cast floating-point numbers to the dtype of the network, all to that of the default."""
        if is_linear(innermost(self.estimator)):
            return X
        of_any_kind = self.estimator is None
        return cast(X, lambda array: self._input_dtype(array, reset=reset), of_any_kind=of_any_kind)

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

    def _has_probabilities(self) -> bool:
        return self._likelihood_name() != "gaussian"

    @available_if(_has_probabilities)  # type: ignore[untyped-decorator]
    def predict_proba(self, X: Data) -> np.ndarray:
        """Predict probabilities, where labels are classes.

        Parameters
        ----------
        X : array-like, DataFrame, sparse matrix, tensor, dict of arrays or Dataset
            Samples, as in :meth:`fit`.

        Returns
        -------
        ndarray of shape (n_samples, n_classes), (n_samples, n_labels) or (n_samples, C, ...)
            Of the classes, in the order of `classes_`: outputs of the network beyond the classes
            seen in :meth:`fit` are left out, and the others scaled to sum to one. Of several
            labels a sample, that each is present. Of positions, of all C outputs.
        """
        check_is_fitted(self)
        p = self._means(X)
        if not isinstance(self._target, Classes):
            return p
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

    def _means(self, X: Data) -> np.ndarray:
        """Predict the mean of each label: probabilities, or numbers."""
        X = with_labels(self._check_input(X))
        with explained("The network cannot read X", X):
            means: np.ndarray
            if isinstance(self._target, Classes):
                means = self.estimator_.predict_proba(X)
            else:
                # skorch knows probabilities of one class a sample alone.
                unwrapped = unwrap(self.estimator_)
                net = unwrapped.net
                model = likelihood_of(net, self.likelihood)
                to_outputs = to_logits_of(net, self.to_logits, model)
                outputs = net.forward_iter(unwrapped.transform(X))
                means = torch.cat([model.mean(to_outputs(batch)) for batch in outputs]).numpy()
        bad = ~np.isfinite(means).reshape(len(means), -1).all(axis=1)
        if bad.any():
            raise ValueError(
                f"The network's output is not finite, first in row {int(bad.argmax())} of X."
            )
        return means

    def predict(self, X: Data) -> np.ndarray:
        """Predict labels.

        Parameters
        ----------
        X : array-like, DataFrame, sparse matrix, tensor, dict of arrays or Dataset
            Samples, as in :meth:`fit`.

        Returns
        -------
        ndarray of shape (n_samples,), (n_samples, n_outputs) or (n_samples, ...)
            Labels of the kind and shape given to :meth:`fit`.
        """
        check_is_fitted(self)
        if not self._has_probabilities():
            return self._target.decode(self._means(X))
        net, p = unwrap(self.estimator_).net, self.predict_proba(X)
        if is_binary(net):  # It has a threshold of its own.
            labels: np.ndarray = self.classes_[(p[:, 1] > net.threshold).astype(int)]
            return labels
        return self._target.decode(p)

    def score(self, X: Data, y: Labels, sample_weight: Labels = None) -> float:
        """Compute the score of the predictions.

        Parameters
        ----------
        X : array-like, DataFrame, sparse matrix, tensor, dict of arrays or Dataset
            Samples, as in :meth:`fit`.
        y : array-like
            Their labels.
        sample_weight : array-like of shape (n_samples,), default=None
            Weights of the samples.

        Returns
        -------
        float
            R^2 of numbers; else accuracy: of several labels a sample, the share of samples with
            all known labels right; of positions, over those that have a label.
        """
        return self._target.score(y, self.predict(X), sample_weight)

    def __sklearn_is_fitted__(self) -> bool:
        # A bare query strategy has fitted attributes too, of its last query.
        return hasattr(self, "estimator_")

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        name = self._likelihood_name()
        tags.target_tags.required = True
        if name == "gaussian":
            tags.estimator_type, tags.regressor_tags = "regressor", RegressorTags()
            tags.target_tags.multi_output = True
        else:
            tags.estimator_type, tags.classifier_tags = "classifier", ClassifierTags()
            if name == "bernoulli":
                tags.classifier_tags = ClassifierTags(multi_class=False, multi_label=True)
                tags.target_tags.single_output, tags.target_tags.multi_output = False, True
        if self.estimator is not None:
            inner, net = get_tags(self.estimator), innermost(self.estimator)
            is_pipeline = isinstance(self.estimator, Pipeline)
            # A pipeline calls itself sparse only where its last step is, which a network is not.
            steps = [step for _, step in self.estimator.steps] if is_pipeline else [net]
            first = next((step for step in steps if step not in (None, "passthrough")), None)
            tags.input_tags.sparse = first is not None and get_tags(first).input_tags.sparse
            tags.input_tags.allow_nan = is_pipeline and inner.input_tags.allow_nan
            if tags.classifier_tags and is_binary(net):
                tags.classifier_tags.multi_class = False
            elif tags.classifier_tags and is_linear(net):
                tags.classifier_tags.multi_class = get_tags(net).classifier_tags.multi_class
        return tags
