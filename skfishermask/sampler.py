"""FisherMask as a query strategy, and as a scikit-learn classifier that can query."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from numbers import Integral, Real
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import LabelEncoder
from sklearn.utils import check_random_state, get_tags
from sklearn.utils._param_validation import HasMethods, Interval, StrOptions
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import (
    check_consistent_length,
    check_is_fitted,
    column_or_1d,
    validate_data,
)

from skfishermask._guard import seeded
from skfishermask._rows import (
    Relabeled,
    as_rows,
    check_finite,
    is_mapping,
    n_rows,
    parts_of,
    take_rows,
)
from skfishermask._skorch import is_binary
from skfishermask.default import default_net
from skfishermask.directions import Weighting
from skfishermask.mask import MASK_STRATEGIES, MaskStrategy
from skfishermask.query import EMBEDDING_DTYPES, Query
from skfishermask.unwrap import innermost, unwrap


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Raise what PyTorch says about unfit data as an estimator's ValueError or TypeError."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, IndexError, TypeError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{what}: {error}") from error


class FisherMaskSampler(ClassifierMixin, BaseEstimator):
    r"""Query strategy that picks the batch which most reduces the inverse Fisher information.

    Called with a fitted skorch classifier it is a query strategy in modAL's manner. Fitted, it
    is a scikit-learn classifier around one, with a :meth:`query` method beside ``predict``.

    It ranks the network's parameters by their diagonal Fisher information, keeps a mask of
    the most informative ones, describes each candidate x by the Fisher embedding V(x) of its
    masked gradients, and greedily picks the batch that most reduces
    :math:`\mathrm{tr}(M^{-1} F)`, where F is the mean Fisher information of all samples and
    :math:`M = M_0 + \sum V(x)^\top V(x)` over the batch.

    Parameters
    ----------
    estimator : skorch classifier, or a Pipeline or search object around one, default=None
        The classifier to wrap; :meth:`fit` fits a clone of it. None: a small default network
        made from the data. As a bare query strategy none is needed.
    mask : {"global", "per_layer", "relative", "random", "output_layer", "all"}, \
            default="global"
        Which parameters to look at, see :meth:`skfishermask.ParameterMask.from_diagonal`.
        ``"output_layer"`` is BAIT.
    mask_fraction : float, int or "auto", default="auto"
        Size of the mask. A float in (0, 1] is the share of all parameters (the authors use
        0.002), an int is the number itself, ``"auto"`` the larger of 0.2 % of all parameters
        and twice the output layer, at most 10,000.
    n_mask_samples : int or None, default=1024
        Number of samples, drawn from the labelled ones and the pool, for the diagonal Fisher
        information; None takes all.
    weighting : {"probability", "none"}, default="probability"
        ``"none"`` leaves class probabilities out of the embedding, as the authors' code does.
    n_directions : int, float or None, default=None
        Rows of V(x). None: exact. An int: so many leading ones; a float in (0, 1): as many as
        keep that share of the trace. The cost of everything falls in proportion.
    target : {"pool", "identity"}, default="pool"
        F in the objective: the mean Fisher information of labelled and pool samples, or the
        identity matrix.
    use_labeled : bool, default=True
        Let the Fisher matrix of the labelled samples into M_0.
    regularization : float, default=1.0
        The multiple of the identity matrix in M_0.
    oversample : float, default=1.0
        Pick so many times `n_instances` forward, then drop the ones whose removal costs
        least. BAIT uses 2.
    entropy_share : float, default=0.0
        Share of the batch, in [0, 1], that is taken by largest predictive entropy first; the
        rest is picked greedily given these.
    max_candidates : int or None, default=None
        Embed at most so many pool samples, drawn at random.
    batch_size : int or None, default=None
        Samples per pass through the network; None: the net's own.
    embedding_dtype : {"float32", "float16", "bfloat16"}, default="float32"
        Storage of V; computation is in float32 at least.
    random_state : int, RandomState or None, default=None
        For every draw. An int makes :meth:`fit` and queries reproducible, without touching
        global random state. None leaves :meth:`fit` to the global random states.
    verbose : int, default=0
        1 shows progress bars.

    Attributes
    ----------
    estimator_ : estimator
        The fitted clone of `estimator`, or the default network.
    classes_ : ndarray of shape (n_classes,)
        Class labels.
    n_features_in_ : int
        Length of the second axis of X in :meth:`fit`.
    feature_names_in_ : ndarray of shape (n_features_in_,)
        Column names, where X had them.
    mask_ : ParameterMask
        The mask of the last query.
    fisher_diagonal_ : dict of str to Tensor, or None
        Diagonal Fisher information in the last query; None for the masks ``"random"``,
        ``"output_layer"`` and ``"all"``, which do not look at it.
    query_info_ : dict
        Of the last query: ``"seconds"`` (a dict by step), ``"n_candidates"`` (N),
        ``"n_labeled"``, ``"n_directions"`` (r), ``"mask_size"`` (k) and ``"embedding_bytes"``.

    See Also
    --------
    fisher_mask_sampling : The same as a function.

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
    >>> from skorch import NeuralNetClassifier
    >>> from skfishermask import FisherMaskSampler
    >>> X = np.random.default_rng(0).normal(size=(60, 4)).astype("float32")
    >>> y = (X[:, 0] > 0).astype("int64")
    >>> net = NeuralNetClassifier(
    ...     torch.nn.Linear, module__in_features=4, module__out_features=2,
    ...     criterion=torch.nn.CrossEntropyLoss, train_split=None, verbose=0,
    ... ).fit(X[:20], y[:20])
    >>> fishermask = FisherMaskSampler(random_state=0)
    >>> indices, gains = fishermask(net, X[20:], n_instances=3, X_labeled=X[:20])
    >>> indices.shape, gains.shape
    ((3,), (3,))

    As a classifier, here with the default network:

    >>> sampler = FisherMaskSampler(random_state=0).fit(X[:20], np.where(y[:20], "yes", "no"))
    >>> indices, instances = sampler.query(X[20:], n_instances=3)
    >>> instances.shape, sampler.classes_.tolist()
    ((3, 4), ['no', 'yes'])
    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        "estimator": [HasMethods(["fit", "predict_proba"]), None],
        "mask": [StrOptions(set(MASK_STRATEGIES))],
        "mask_fraction": [
            Interval(Real, 0, 1, closed="right"),
            Interval(Integral, 1, None, closed="left"),
            StrOptions({"auto"}),
        ],
        "n_mask_samples": [Interval(Integral, 1, None, closed="left"), None],
        "weighting": [StrOptions({"probability", "none"})],
        "n_directions": [
            Interval(Real, 0, 1, closed="neither"),
            Interval(Integral, 1, None, closed="left"),
            None,
        ],
        "target": [StrOptions({"pool", "identity"})],
        "use_labeled": ["boolean"],
        "regularization": [Interval(Real, 0, None, closed="neither")],
        "oversample": [Interval(Real, 1, None, closed="left")],
        "entropy_share": [Interval(Real, 0, 1, closed="both")],
        "max_candidates": [Interval(Integral, 1, None, closed="left"), None],
        "batch_size": [Interval(Integral, 1, None, closed="left"), None],
        "embedding_dtype": [StrOptions(set(EMBEDDING_DTYPES))],
        "random_state": ["random_state"],
        "verbose": ["verbose"],
    }

    def __init__(
        self,
        estimator: Any = None,
        *,
        mask: MaskStrategy = "global",
        mask_fraction: float | int | Literal["auto"] = "auto",
        n_mask_samples: int | None = 1024,
        weighting: Weighting = "probability",
        n_directions: int | float | None = None,
        target: str = "pool",
        use_labeled: bool = True,
        regularization: float = 1.0,
        oversample: float = 1.0,
        entropy_share: float = 0.0,
        max_candidates: int | None = None,
        batch_size: int | None = None,
        embedding_dtype: str = "float32",
        random_state: int | np.random.RandomState | None = None,
        verbose: int = 0,
    ) -> None:
        self.estimator = estimator
        self.mask = mask
        self.mask_fraction = mask_fraction
        self.n_mask_samples = n_mask_samples
        self.weighting = weighting
        self.n_directions = n_directions
        self.target = target
        self.use_labeled = use_labeled
        self.regularization = regularization
        self.oversample = oversample
        self.entropy_share = entropy_share
        self.max_candidates = max_candidates
        self.batch_size = batch_size
        self.embedding_dtype = embedding_dtype
        self.random_state = random_state
        self.verbose = verbose

    def __call__(
        self, classifier: Any, X_pool: Any, n_instances: int = 1, *, X_labeled: Any = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Choose a batch from the pool, in the manner of a modAL query strategy.

        Parameters
        ----------
        classifier : estimator
            A fitted skorch classifier, or a modAL learner, Pipeline or search object that
            holds one. A pipeline's transformers are applied to the pool first.
        X_pool : array-like, dict of arrays or Dataset of length N
            The unlabelled samples: whatever the classifier's ``predict`` takes.
        n_instances : int, default=1
            Number of samples to choose.
        X_labeled : array-like, dict of arrays or Dataset, optional
            The labelled samples. None: the learner's ``X_training`` where it keeps one, else
            there are none.

        Returns
        -------
        indices : ndarray of shape (n_instances,), int64
            Rows of `X_pool` in the order chosen.
        gains : ndarray of shape (n_instances,), float64
            Decrease of the objective when each was chosen.

        Raises
        ------
        TypeError
            If there is no skorch classifier inside `classifier`.
        sklearn.exceptions.NotFittedError
            If it is not fitted.
        ValueError
            If the pool is empty, `n_instances` is not between 1 and its length, or the
            network's output is not finite.
        MemoryError
            If the embedding or the Fisher matrices would not fit into memory.
        """
        self._validate_params()
        unwrapped = unwrap(classifier)
        if X_labeled is None:
            X_labeled = unwrapped.X_training
        query = Query(
            self,
            unwrapped.net,
            unwrapped.transform(X_pool),
            None if X_labeled is None else unwrapped.transform(X_labeled),
            n_instances,
        )
        indices, gains = query.run()
        self.mask_ = query.mask
        self.fisher_diagonal_ = query.diagonal
        self.query_info_ = query.info
        return indices, gains

    def fit(self, X: Any, y: Any = None, **fit_params: Any) -> FisherMaskSampler:
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
        FisherMaskSampler
            The sampler itself.

        Raises
        ------
        ValueError
            If the data are not numbers, not finite or not of equal length, or if there are
            fewer than two classes.
        """
        self._validate_params()
        X = self._check_input(X, reset=True)
        y = self._encode_labels(X, y)
        if self.estimator is None:
            estimator = default_net(np.empty(np.shape(X)), len(self.classes_))
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
            stack.enter_context(
                _explained(
                    "The estimator cannot be fitted to these samples. The network must take them, "
                    f"and have outputs for {len(self.classes_)} classes"
                )
            )
            if isinstance(X, torch.utils.data.Dataset) and y is not None:
                X, y = Relabeled(X, y), None
            if self.random_state is not None:
                device = torch.device(getattr(net, "device", None) or "cpu")
                seed = check_random_state(self.random_state).randint(2**31 - 1)
                stack.enter_context(seeded(seed, [device] if device.type == "cuda" else []))
            self.estimator_ = estimator.fit(X, y, **fit_params)
        return self

    def _encode_labels(self, X: Any, y: Any) -> np.ndarray | None:
        if y is None and isinstance(X, torch.utils.data.Dataset):
            own = np.asarray([int(X[i][1]) for i in range(len(X))])  # type: ignore[arg-type]
            self.classes_ = np.unique(own)
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
        y = column_or_1d(y, warn=True)
        check_finite(y, "y")
        check_classification_targets(y)
        check_consistent_length(*parts_of(X), y)
        encoder = LabelEncoder().fit(y)
        if len(encoder.classes_) < 2:
            raise ValueError(
                "Expected at least 2 classes in y, found "
                f"{len(encoder.classes_)} class: {encoder.classes_.tolist()}."
            )
        self.classes_ = encoder.classes_
        encoded: np.ndarray = encoder.transform(y).astype("int64")
        return encoded

    def _check_input(self, X: Any, *, reset: bool = False) -> Any:
        """Check data against those of `fit`, and cast them to what the estimator takes."""
        if reset:
            self._forget_shapes()
        if is_mapping(X) or isinstance(X, torch.utils.data.Dataset | torch.Tensor):
            X = as_rows(X, "X")
            if n_rows(X) == 0:
                raise ValueError("Found 0 samples in X, expected at least one.")
            check_finite(X, "X")
            if isinstance(X, torch.Tensor):
                self._check_sample_shape(tuple(X.shape[1:]), reset=reset)
                if reset and X.dim() > 1:
                    self.n_features_in_ = X.shape[1]
            return self._cast(X, reset=reset)
        if isinstance(self.estimator, Pipeline) and hasattr(X, "dtypes"):
            # The transformers know what to do with columns of any type.
            validate_data(self, X, reset=reset, skip_check_array=True)
            return X
        tags = get_tags(self).input_tags
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
        if not tags.allow_nan:
            check_finite(X, "X")
        self._check_sample_shape(X.shape[1:], reset=reset)
        return X if isinstance(self.estimator, Pipeline) else self._cast(X, reset=reset)

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

    def _cast(self, X: Any, *, reset: bool) -> Any:
        """Cast floating-point numbers to the dtype of the network, all to that of the default."""
        if is_mapping(X):
            return {key: self._cast(part, reset=reset) for key, part in X.items()}
        if not isinstance(X, np.ndarray | torch.Tensor):
            return X
        is_float = X.dtype.kind == "f" if isinstance(X, np.ndarray) else X.is_floating_point()
        if not is_float and self.estimator is not None:
            return X
        dtype = self._input_dtype(X, reset=reset)
        if isinstance(X, torch.Tensor):
            return X.to(dtype)
        # NumPy has no bfloat16.
        wide = torch.float32 if dtype == torch.bfloat16 else dtype
        return X.astype(str(wide).removeprefix("torch."), copy=False)

    def _input_dtype(self, X: Any, *, reset: bool) -> torch.dtype:
        """Find the floating-point dtype that the network takes."""
        if not reset:
            module = unwrap(self.estimator_).net.module_
        else:
            net = innermost(self.estimator)
            module = getattr(net, "module", None)
            if not isinstance(module, torch.nn.Module):
                net = clone(net) if net is not None else default_net(np.empty(np.shape(X)), 2)
                # Its initial weights are not wanted: only its dtype.
                with seeded(0, []):
                    module = net.initialize().module_
        dtype: torch.dtype = next(module.parameters()).dtype
        return dtype

    def predict_proba(self, X: Any) -> np.ndarray:
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
        with _explained("The network cannot read X"):
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

    def predict(self, X: Any) -> np.ndarray:
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

    def query(
        self,
        X_pool: Any,
        n_instances: int = 1,
        *,
        X_labeled: Any = None,
        return_metrics: bool = False,
    ) -> tuple[Any, ...]:
        """Choose a batch from the pool with the fitted estimator.

        Parameters
        ----------
        X_pool : array-like, DataFrame, sparse matrix, tensor, dict of arrays or Dataset
            The unlabelled samples, N of them.
        n_instances : int, default=1
            Number of samples to choose.
        X_labeled : same kinds as `X_pool`, optional
            The labelled samples; None: there are none.
        return_metrics : bool, default=False
            Return the gains too.

        Returns
        -------
        indices : ndarray of shape (n_instances,), int64
            Rows of `X_pool` in the order chosen.
        instances : same type as `X_pool`
            Those rows; of a Dataset, a ``Subset``.
        gains : ndarray of shape (n_instances,), float64
            Decrease of the objective when each was chosen; only if `return_metrics`.
        """
        check_is_fitted(self)
        indices, gains = self(self, X_pool, n_instances, X_labeled=X_labeled)
        instances = take_rows(X_pool, indices)
        return (indices, instances, gains) if return_metrics else (indices, instances)

    def __sklearn_is_fitted__(self) -> bool:
        # A bare query strategy has fitted attributes too, of its last query.
        return hasattr(self, "estimator_")

    def __sklearn_tags__(self) -> Any:
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


def fisher_mask_sampling(
    classifier: Any,
    X_pool: Any,
    n_instances: int = 1,
    *,
    X_labeled: Any = None,
    **parameters: Any,
) -> tuple[np.ndarray, np.ndarray]:
    """Choose a batch by FisherMask: the function form, in modAL's manner.

    Parameters
    ----------
    classifier, X_pool, n_instances, X_labeled
        See :class:`FisherMaskSampler`.
    **parameters
        Parameters of :class:`FisherMaskSampler`.

    Returns
    -------
    indices : ndarray of shape (n_instances,), int64
        Rows of `X_pool` in the order chosen.
    gains : ndarray of shape (n_instances,), float64
        Decrease of the objective when each was chosen.

    Examples
    --------
    With modAL, parameters can be fixed by a partial function::

        from functools import partial
        ActiveLearner(net, query_strategy=partial(fisher_mask_sampling, oversample=2.0))
    """
    sampler = FisherMaskSampler(**parameters)
    return sampler(classifier, X_pool, n_instances, X_labeled=X_labeled)
