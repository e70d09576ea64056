"""The ``ActiveLearner`` of modAL, corrected for current scikit-learn and pandas.

Nothing else in the package imports modAL: the sampler needs its conventions, not its code.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import torch
from sklearn.base import BaseEstimator
from sklearn.pipeline import Pipeline
from sklearn.utils import Tags, check_consistent_length, check_random_state, get_tags

from skfishermask.data import (
    Data,
    Labels,
    UserValue,
    check_finite,
    check_holds_samples,
    check_labels_fit,
    check_no_module,
    check_rows,
    explaining_fit,
    innermost,
    input_arrays,
    is_fitted,
    n_rows,
    stack_rows,
    take_rows,
    takes_missing_labels,
    warn_of_outputs,
)

try:
    from modAL.models import ActiveLearner as _ModALActiveLearner
    from modAL.uncertainty import uncertainty_sampling
except ImportError as error:
    raise ImportError(
        f"skfishermask.modal needs modAL, and modAL needs pandas ({error}). Install them with\n"
        "    pip install pandas\n"
        "    pip install --no-deps modAL-python==0.4.2.1\n"
        "--no-deps because modAL 0.4.2.1 asks for skorch==0.9.0, which does not work with current "
        "PyTorch and scikit-learn; modAL itself runs with the skorch that is installed."
    ) from error

__all__ = ["ActiveLearner"]


class ActiveLearner(_ModALActiveLearner):
    """The active learner of modAL, corrected for current scikit-learn and pandas.

    It is used as modAL's own, and differs in what does not work in modAL 0.4.2.1:

    - `fit` and `teach` run on scikit-learn 1.8 and later.
    - `query` calls the strategy once, lets its exceptions through, and takes only a tuple of two
      for (indices, metrics), so that an array of two indices stays two indices.
    - Rows of DataFrames, sparse matrices, tensors, lists, dicts of arrays and PyTorch datasets are
      taken and stacked as rows.
    - `clone`, `get_params`, `set_params` and ``repr`` work, and with them `cross_val_score`. The
      training data are no parameters: a clone starts without any.

    Parameters
    ----------
    estimator : estimator object
        The classifier or regressor to train. It is fitted in place, as modAL does.
    query_strategy : callable, default=None
        Called as ``query_strategy(learner, X_pool, *args, **kwargs)``. Returns the indices of the
        chosen rows, or the tuple (indices, metrics). None: the estimator, or what a Pipeline ends
        in, where that is a query strategy itself, as :class:`skfishermask.FisherMaskSampler` is;
        else ``modAL.uncertainty.uncertainty_sampling``.
    X_training : array-like, tensor, DataFrame, sparse matrix, list, dict or Dataset, default=None
        Initial training samples. If given, `estimator` is fitted at once.
    y_training : array-like of shape (n_samples,) or (n_samples, ...), default=None
        Labels of `X_training`: classes, numbers, or several of either a sample.
    bootstrap_init : bool, default=False
        Whether to fit the initial training data on a bootstrap sample of them.
    on_transformed : bool, default=False
        Whether strategies that measure distances use the samples as transformed by the pipeline.
    force_all_finite : bool, default=True
        Whether `fit` and `teach` refuse samples with NaN or infinity. Labels must be finite anyway,
        except several a sample, of which NaN stands for a missing one.
    **fit_kwargs : dict
        Passed to the initial fit of `estimator`.

    Attributes
    ----------
    X_training : same type as the samples given, or None
        The samples trained on so far.
    y_training : same type as the labels given, or None
        The labels of `X_training`.
    classes_ : ndarray of shape (n_classes,)
        The class labels of the fitted estimator.

    See Also
    --------
    skfishermask.FisherMaskSampler : The query strategy, and a learner that needs no modAL.

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn.linear_model import LogisticRegression
    >>> from skfishermask.modal import ActiveLearner
    >>> X = np.arange(10.0).reshape(-1, 1)
    >>> y = (X[:, 0] > 4).astype(int)
    >>> learner = ActiveLearner(LogisticRegression(), X_training=X[[0, 9]], y_training=y[[0, 9]])
    >>> indices, instances = learner.query(X, n_instances=2)
    >>> sorted(indices.tolist())
    [4, 5]
    >>> learner.teach(instances, y[indices])
    >>> learner.X_training.shape
    (4, 1)
    """

    def __init__(
        self,
        estimator: BaseEstimator,
        query_strategy: Callable[..., UserValue] | None = None,
        X_training: Data = None,
        y_training: Labels = None,
        bootstrap_init: bool = False,
        on_transformed: bool = False,
        force_all_finite: bool = True,
        **fit_kwargs: UserValue,
    ) -> None:
        check_no_module(estimator)
        check_holds_samples(X_training, "X_training")
        if y_training is not None:
            check_labels_fit(innermost(estimator), y_training)
        if query_strategy is None:
            last = estimator[-1] if isinstance(estimator, Pipeline) else estimator
            query_strategy = last if callable(last) else uncertainty_sampling
        super().__init__(
            estimator,
            query_strategy,
            X_training,
            y_training,
            bootstrap_init,
            on_transformed,
            **fit_kwargs,
        )
        # modAL would hand force_all_finite on to the estimator's fit, and does not store the other.
        self.bootstrap_init = bootstrap_init
        self.force_all_finite = force_all_finite

    @property
    def classes_(self) -> np.ndarray:
        """Class labels of the fitted estimator."""
        classes: np.ndarray = self.estimator.classes_
        return classes

    def __sklearn_is_fitted__(self) -> bool:
        return is_fitted(self.estimator)

    def __sklearn_tags__(self) -> Tags:
        # A learner is what its estimator is, so that cross-validation stratifies for a classifier.
        tags, inner = super().__sklearn_tags__(), get_tags(self.estimator)
        tags.estimator_type = inner.estimator_type
        tags.classifier_tags, tags.regressor_tags = inner.classifier_tags, inner.regressor_tags
        return tags

    def get_params(self, deep: bool = True) -> dict[str, object]:
        """Get the parameters, without the training data.

        Parameters
        ----------
        deep : bool, default=True
            Whether to add the parameters of `estimator`, such as ``estimator__lr``, and those of
            `query_strategy` if it has any.

        Returns
        -------
        dict
            Parameter names mapped to their values.
        """
        params: dict[str, object] = super().get_params(deep=deep)
        for name in ("X_training", "y_training"):
            del params[name]
        return params

    def fit(
        self, X: Data, y: Labels, bootstrap: bool = False, **fit_kwargs: UserValue
    ) -> ActiveLearner:
        """Forget the training data so far and train on these.

        Parameters
        ----------
        X : array-like, tensor, DataFrame, sparse matrix, list, dict or Dataset of n_samples rows
            The samples.
        y : array-like of shape (n_samples,) or (n_samples, ...)
            Their labels.
        bootstrap : bool, default=False
            Whether to fit on a bootstrap sample of them.
        **fit_kwargs : dict
            Passed to the fit method of the estimator.

        Returns
        -------
        ActiveLearner
            The learner itself.
        """
        self._check_training_data(X, y)
        self.X_training, self.y_training = X, y
        return self._fit_to_known(bootstrap=bootstrap, **fit_kwargs)

    def teach(
        self,
        X: Data,
        y: Labels,
        bootstrap: bool = False,
        only_new: bool = False,
        **fit_kwargs: UserValue,
    ) -> None:
        """Add samples to the training data and train on all of them.

        Parameters
        ----------
        X : array-like, tensor, DataFrame, sparse matrix, list, dict or Dataset of n_samples rows
            The new samples.
        y : array-like of shape (n_samples,) or (n_samples, ...)
            Their labels.
        bootstrap : bool, default=False
            Whether to fit on a bootstrap sample of the data.
        only_new : bool, default=False
            Whether to train on the new samples alone, without storing them.
        **fit_kwargs : dict
            Passed to the fit method of the estimator.
        """
        if only_new:
            self._check_training_data(X, y)
            self._fit_on_new(X, y, bootstrap=bootstrap, **fit_kwargs)
        else:
            self._add_training_data(X, y)
            self._fit_to_known(bootstrap=bootstrap, **fit_kwargs)

    def query(
        self,
        X_pool: Data,
        *query_args: UserValue,
        return_metrics: bool = False,
        **query_kwargs: UserValue,
    ) -> tuple[UserValue, ...]:
        """Choose from the pool by the strategy, calling it exactly once.

        Parameters
        ----------
        X_pool : array-like, tensor, DataFrame, sparse matrix, list, dict or Dataset
            The samples to choose from.
        *query_args : tuple
            Passed to the strategy.
        return_metrics : bool, default=False
            Whether to return what the strategy says about the chosen samples, such as their gains.
        **query_kwargs : dict
            Passed to the strategy, `n_instances` for example.

        Returns
        -------
        indices : array-like of int
            The chosen rows of `X_pool`, as the strategy returned them.
        instances : same type as `X_pool`
            Those rows.
        metrics : object
            Only if `return_metrics`; None if the strategy returns the indices alone.

        Warns
        -----
        UserWarning
            If `return_metrics` and the strategy returns the indices alone.
        """
        check_rows(X_pool, "X_pool")
        chosen = self.query_strategy(self, X_pool, *query_args, **query_kwargs)
        # modAL unpacks anything of two elements, an array of two indices too.
        is_pair = isinstance(chosen, tuple) and len(chosen) == 2
        indices, metrics = chosen if is_pair else (chosen, None)
        # NumPy takes a tensor of one index for that one index.
        rows = indices.numpy(force=True) if isinstance(indices, torch.Tensor) else indices
        instances = take_rows(X_pool, rows)
        if not return_metrics:
            return indices, instances
        if metrics is None:
            warnings.warn("The query strategy returned no metrics.", UserWarning, stacklevel=2)
        return indices, instances, metrics

    def _add_training_data(self, X: Data, y: Labels) -> None:
        self._check_training_data(X, y)
        if self.X_training is None:
            self.X_training, self.y_training = X, y
        else:
            # One assignment, so that a failure leaves samples and labels in step.
            self.X_training, self.y_training = (
                stack_rows(self.X_training, X),
                stack_rows(self.y_training, y),
            )

    def _fit_to_known(self, bootstrap: bool = False, **fit_kwargs: UserValue) -> ActiveLearner:
        return self._fit_on_new(self.X_training, self.y_training, bootstrap, **fit_kwargs)

    def _fit_on_new(
        self, X: Data, y: Labels, bootstrap: bool = False, **fit_kwargs: UserValue
    ) -> ActiveLearner:
        if bootstrap:
            # The global generator, as in modAL: its users repeat a run by np.random.seed.
            n_samples = n_rows(X)
            drawn = check_random_state(None).randint(n_samples, size=n_samples)
            X, y = take_rows(X, drawn), take_rows(y, drawn)
        with explaining_fit(self.estimator, X, y):
            self.estimator.fit(X, y, **fit_kwargs)
        if not fit_kwargs:  # which prediction has not
            warn_of_outputs(self.estimator, X)
        return self

    def _check_training_data(self, X: Data, y: Labels) -> None:
        check_holds_samples(X, "X")
        if y is None:
            raise ValueError("y is None; expected one label for each sample in X.")
        check_consistent_length(*input_arrays(X), y)
        net = innermost(self.estimator)
        check_labels_fit(net, y)
        if not takes_missing_labels(net):
            check_finite(y, "y")
        if self.force_all_finite:
            check_finite(X, "X")
