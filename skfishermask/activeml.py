"""FisherMask as a query strategy of scikit-activeml."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.utils.validation import check_is_fitted, has_fit_parameter
from skorch import NeuralNet, NeuralNetClassifier, NeuralNetRegressor
from torch import nn

from skfishermask.compat import StrOptions
from skfishermask.data import (
    Data,
    Estimator,
    Labels,
    Unwrapped,
    is_fitted,
    unwrap,
)
from skfishermask.jacobian import seeded
from skfishermask.parameters import (
    MethodParameters,
    Seed,
    Settings,
    at_least_one,
    parameter,
    with_method_parameters,
)
from skfishermask.query import Result, run_first_batch, run_query

try:
    import skactiveml
    from skactiveml.base import (
        SingleAnnotatorPoolQueryStrategy,
        SkactivemlClassifier,
        SkactivemlRegressor,
    )
    from skactiveml.classifier import SkorchClassifier
    from skactiveml.regressor import SkorchRegressor
    from skactiveml.utils import (
        MISSING_LABEL,
        check_equal_missing_label,
        check_scalar,
        check_type,
        is_labeled,
    )
except ImportError as error:
    raise ImportError(
        f"skfishermask.activeml needs scikit-activeml 1.0 or later ({error}). Install it with\n"
        '    pip install "scikit-activeml>=1.0"'
    ) from error

__all__ = ["FisherMask"]

# What the labels may be, as scikit-activeml 1.1 names it.
_ONE, _ANNOTATION = "single-output", "single-annotator"
_TARGETS = frozenset(
    (task, target, _ANNOTATION)
    for task, target in [
        ("classification", _ONE),
        ("classification", "multi-label"),
        ("regression", _ONE),
    ]
)
_WRAPPERS = (SkactivemlClassifier, SkactivemlRegressor)
_REGRESSORS = (SkactivemlRegressor, NeuralNetRegressor)


@with_method_parameters
@dataclass(eq=False, repr=False)
class FisherMask(MethodParameters, SingleAnnotatorPoolQueryStrategy):
    r"""FisherMask, with the interface of a pool-based scikit-activeml query strategy.

    It picks what :class:`skfishermask.FisherMaskSampler` picks: greedily, the batch that most
    reduces :math:`\mathrm{tr}(M^{-1} F)`, where F is the mean Fisher information of all samples
    in the network's most informative parameters, and M that of the labelled samples and the
    batch; by default on features of the inputs in place of gradients (`coverage_share`).

    Parameters
    ----------
    missing_label : scalar, str, None or np.nan, default=np.nan
        Stands for a missing label in `y`.
    random_state : int, RandomState or None, default=None
        For every draw, those of a refit included. As everywhere in scikit-activeml, an int is not
        the seed itself: the seed is made from it and the number of unlabelled samples. None draws
        from the global random states.
    <method parameters>
    net_batch_size : int or None, default=None
        Samples per pass through the network; None: the net's own. It is the sampler's
        `batch_size`, which in scikit-activeml is the number of samples to query.
    target_type : {"auto", "single-output"}, default="auto"
        What a label is: one class or number a sample; ``"auto"``: what `clf` takes.

    Attributes
    ----------
    mask_ : ParameterMask
        The mask of the last query.
    fisher_diagonal_ : dict of str to Tensor, or None
        Diagonal Fisher information in the last query, where the mask looks at it.
    query_info_ : dict
        Seconds and sizes of the last query.

    See Also
    --------
    skfishermask.FisherMaskSampler : Says more about the parameters and attributes.

    Notes
    -----
    With a :class:`skactiveml.classifier.SklearnClassifier` around a skorch net, labels reach the
    net in the dtype of `y`. PyTorch's losses want integers, so use an integer `missing_label`,
    such as -1, there: with NaN the labels are floats, the net's ``fit`` fails, and
    scikit-activeml makes a warning of that.

    References
    ----------
    S. Gul, M. Elmahallawy, S. Madria, A. Tripathy, "FisherMask: Enhancing Neural Network
    Labeling Efficiency in Image Classification Using Fisher Information", arXiv 2411.05752.
    The objective is that of BAIT: J. T. Ash, S. Goel, A. Krishnamurthy, S. Kakade, "Gone
    Fishing: Neural Active Learning with Fisher Embeddings", NeurIPS 2021.

    Examples
    --------
    >>> import numpy as np
    >>> import torch
    >>> from skactiveml.classifier import SkorchClassifier
    >>> from skfishermask.activeml import FisherMask
    >>> X = np.random.default_rng(0).normal(size=(60, 4)).astype("float32")
    >>> y = (X[:, 0] > 0).astype("float64")
    >>> y[20:] = np.nan
    >>> options = {"train_split": None, "verbose": 0}
    >>> clf = SkorchClassifier(
    ...     torch.nn.Linear(4, 2), neural_net_param_dict=options, classes=[0, 1]
    ... )
    >>> strategy = FisherMask(coverage_share=0, random_state=0)
    >>> indices, utilities = strategy.query(X, y, clf, batch_size=3, return_utilities=True)
    >>> indices.shape, utilities.shape
    ((3,), (3, 60))
    >>> bool((np.nanargmax(utilities, axis=1) == indices).all())
    True
    """

    missing_label: Labels = MISSING_LABEL
    random_state: Seed = parameter(None, "random_state")
    _: KW_ONLY
    net_batch_size: int | None = parameter(None, at_least_one(), None)
    target_type: str = parameter("auto", StrOptions({"auto", _ONE}))

    @property
    def _target_capabilities(self) -> frozenset[tuple[str, str, str]]:
        return _TARGETS

    def query(
        self,
        X: Data,
        y: Labels,
        clf: Estimator,
        fit_clf: bool = True,
        sample_weight: Data = None,
        candidates: Data = None,
        batch_size: int = 1,
        return_utilities: bool = False,
    ) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        """Choose the samples to label next.

        Without any label and a fitted `clf` it is a first batch, which covers the inputs; so where
        all labels are of one class, and `clf` cannot be fitted to one. A query that fails leaves
        the strategy as it was.

        Parameters
        ----------
        X : array-like of shape (n_samples, ...)
            All samples, labelled and unlabelled: rows of features, images, and so on.
        y : array-like of shape (n_samples,) or (n_samples, n_labels)
            Their labels, `missing_label` where there is none. Of several labels a sample some may
            be missing: it is labelled where one is known.
        clf : classifier or regressor
            A ``SkorchClassifier`` or ``SkorchRegressor``, or a ``SklearnClassifier`` or
            ``SklearnRegressor`` around a skorch net, a logistic regression of scikit-learn or a
            Pipeline or search object with one. A fitted skorch net by itself will do too, unless
            it is to be fitted.
        fit_clf : bool, default=True
            Fit a clone of `clf` on the labelled samples first, seeded by `random_state`. False:
            `clf` is fitted.
        sample_weight : array-like of shape (n_samples,), default=None
            Weights for that fit, where the classifier's ``fit`` takes them. Not used if
            `fit_clf` is False.
        candidates : None or array-like, default=None
            What to choose from. None: the unlabelled samples. Of shape (n_candidates,): their
            rows in `X`, which may be labelled, as one answered by another annotator is. Of more
            dimensions: the samples themselves.
        batch_size : int, default=1
            Number of samples to choose.
        return_utilities : bool, default=False
            Return the utilities too, which takes about as long again as the choice.

        Returns
        -------
        query_indices : ndarray of shape (batch_size,), int64
            The chosen samples in the order chosen: rows of `X`, or of `candidates` where these
            are samples.
        utilities : ndarray of shape (batch_size, n_samples) or (batch_size, n_candidates)
            In row i, the decrease of the objective by each candidate if it were chosen given
            the i samples before; only if `return_utilities`. NaN for samples that are no
            candidates, chosen before or left out by `max_candidates`. The sample chosen has
            the largest one of its row, up to ties, except where `coverage_share`
            chose it or `oversample` dropped a better one.

        Raises
        ------
        TypeError
            If there is no skorch net in `clf`, or `sample_weight` is given and its
            ``fit`` does not take it.
        sklearn.exceptions.NotFittedError
            If there are labels and `clf` is not fitted, or its fit failed.
        ValueError
            If labels are of a kind that `clf` cannot be fitted to.
        """
        with _unchanged_by_errors(self):
            # The base class knows one label a sample.
            several = np.asarray(y) if self.target_type == "auto" and _is_wide(y) else None
            y = y if several is None else _first_known(several, self.missing_label)
            X, y, candidates, batch_size, return_utilities = self._validate_data(
                X, y, candidates, batch_size, return_utilities, reset=True
            )
            labels = y if several is None else several
            X_candidates, rows = self._transform_candidates(candidates, X, y)
            self._check_target(clf)
            check_scalar(fit_clf, "fit_clf", bool)
            settings = Settings(self, self.net_batch_size, self.random_state_)
            if fit_clf:
                # Others do not know what a missing label is.
                check_type(clf, "clf", *_WRAPPERS)
                self._check_fit(clf, labels)
            indices: np.ndarray = np.empty(0, dtype="int64")
            of_candidates: np.ndarray | None = np.empty((0, len(X_candidates)))
            if batch_size > 0:  # else the candidates are exhausted
                is_known = is_labeled(y, missing_label=self.missing_label_)
                is_first = not is_known.any() and (fit_clf or not is_fitted(clf))
                if fit_clf and not is_first:
                    clf = self._fit_clone(clf, X, labels, sample_weight)
                    # A net can be fitted to one class, other classifiers cannot.
                    is_first = not _could_be_fitted(clf) and len({*y[is_known].tolist()}) == 1
                known = (X[is_known], labels[is_known]) if is_known.any() else (None, None)
                asked = X_candidates, batch_size, settings
                result = _run(clf, known, asked, is_first, return_utilities)
                self.mask_, self.fisher_diagonal_ = result.mask, result.diagonal
                self.query_info_ = result.info
                indices, of_candidates = result.indices, result.utilities
        if rows is not None:
            indices = rows[indices]
        if of_candidates is None or not return_utilities:
            return indices
        if rows is None:
            return indices, of_candidates
        utilities = np.full((len(indices), len(X)), np.nan)
        utilities[:, rows] = of_candidates
        return indices, utilities

    def _check_target(self, clf: Estimator) -> None:
        """Raise ValueError if labels of `clf` are of no kind known here, or otherwise missing."""
        if hasattr(clf, "missing_label"):
            check_equal_missing_label(clf.missing_label, self.missing_label_)
        task = "regression" if isinstance(clf, _REGRESSORS) else "classification"
        fitted = getattr(clf, "target_spec_", None)  # from scikit-activeml 1.1 on
        target = (
            (task, getattr(clf, "target_type", "auto"), _ANNOTATION)
            if fitted is None
            else (fitted.task, fitted.target_type, fitted.annotation_type)
        )
        kinds = {target[1]} - {"auto"} or {_ONE}
        if self.target_type != "auto":
            kinds |= {self.target_type}
        if len(kinds) > 1 or (target[0], *kinds, target[2]) not in _TARGETS:
            raise ValueError(
                f"{type(self).__name__} does not support target capability {target}, "
                f"which {type(clf).__name__} has: expected one of {sorted(_TARGETS)}, with "
                f"target_type={self.target_type!r}."
            )

    def _check_fit(self, clf: Estimator, y: np.ndarray) -> None:
        """Raise ValueError if scikit-activeml takes several labels for several annotators."""
        if y.ndim == 2 and not hasattr(clf, "target_type"):
            raise ValueError(
                f"Expected one label a sample, found y of shape {y.shape}, which scikit-activeml "
                f"{skactiveml.__version__} takes for that of several annotators. For several "
                "labels a sample give a fitted skorch net, and fit_clf=False."
            )

    def _fit_clone(
        self, clf: Estimator, X: np.ndarray, y: np.ndarray, sample_weight: Data
    ) -> Estimator:
        weights = {} if sample_weight is None else {"sample_weight": sample_weight}
        if weights and not has_fit_parameter(clf, "sample_weight"):
            # SklearnClassifier would leave them out without a word.
            raise TypeError(
                f"sample_weight was given, but the fit of {type(clf).__name__} or of what it wraps "
                "does not take it."
            )
        seed = self.random_state_.randint(2**31 - 1)
        with nullcontext() if self.random_state is None else seeded(seed):
            clf = clone(clf).fit(X, y, **weights)
        self._check_target(clf)
        return clf


def _run(
    clf: Estimator,
    known: tuple[Data, Labels],
    asked: tuple[Data, int, Settings],
    is_first: bool,
    wants_utilities: bool,
) -> Result:
    """Choose a batch with a classifier and the labelled samples, known as X and y."""
    if is_first:
        return run_first_batch(clf, *asked, known[0], wants_utilities=wants_utilities)
    unwrapped = Unwrapped(*_unwrap(clf), *known)
    return run_query(unwrapped, *asked, wants_utilities=wants_utilities)


def _is_wide(y: Labels) -> bool:
    return np.ndim(y) == 2 and np.shape(y)[1] > 1


def _first_known(y: np.ndarray, missing_label: Labels) -> np.ndarray:
    """Return one of several labels a sample, a known one if there is one."""
    known = is_labeled(y, missing_label=missing_label)
    first: np.ndarray = y[np.arange(len(y)), known.argmax(axis=1)]
    return first


@contextmanager
def _unchanged_by_errors(strategy: FisherMask) -> Iterator[None]:
    before = dict(strategy.__dict__)
    try:
        yield
    except BaseException:
        strategy.__dict__.clear()
        strategy.__dict__.update(before)
        raise


def _could_be_fitted(clf: Estimator) -> bool:
    # SklearnClassifier makes a warning of an exception in the fit of what it wraps.
    return getattr(clf, "is_fitted_", True)


def _unwrap(clf: Estimator) -> tuple[NeuralNet, list[Callable[[Data], Data]]]:
    """Find the fitted net, in scikit-activeml's wrappers too, and the transformers before it."""
    while isinstance(clf, _WRAPPERS):
        if isinstance(clf, SkorchClassifier | SkorchRegressor):
            check_is_fitted(clf, "neural_net_")
            cast = partial(np.asarray, dtype=clf.sample_dtype)
            return _as_skorch_net(clf), [cast]
        if "estimator" not in clf.get_params(deep=False):
            break
        check_is_fitted(clf)
        if not _could_be_fitted(clf):
            raise NotFittedError(
                f"The fit of the estimator in this {type(clf).__name__} failed; its warning says "
                "why."
            )
        clf = clf.estimator_
    unwrapped = unwrap(clf)
    return unwrapped.net, unwrapped.transformers


def _as_skorch_net(clf: Estimator) -> NeuralNet:
    """Make a net of skorch's own kind of a wrapper's net, with the very same module."""
    net, is_regressor = clf.neural_net_, isinstance(clf, SkorchRegressor)
    nonlinearity: Callable[[torch.Tensor], torch.Tensor] | Literal["auto"] = "auto"
    if clf.forward_outputs is not None:
        name, (index, transform) = next(iter(clf.forward_outputs.items()))
        if index != 0:
            raise ValueError(
                "Expected the predictions to come from the first output of the module, found "
                f"forward_outputs with {name!r} from output {index}."
            )
        cross_entropy = isinstance(net.criterion_, nn.CrossEntropyLoss)
        # It is softmax where "auto" is that too, and the criterion for numbers is of the output.
        if not (is_regressor or (cross_entropy and isinstance(transform, nn.Softmax))):
            nonlinearity = transform
    elif isinstance(net.criterion_, nn.NLLLoss):
        nonlinearity = torch.exp  # skorch's own convention is probabilities
    reading = ("batch_size", "dataset", "device", "iterator_valid")
    options = {
        name: value
        for name, value in net.get_params(deep=False).items()
        if name.split("__")[0] in reading
    }
    return (NeuralNetRegressor if is_regressor else NeuralNetClassifier)(
        net.module_,
        criterion=net.criterion_,
        predict_nonlinearity=nonlinearity,
        callbacks="disable",
        verbose=0,
        **options,
    ).initialize()
