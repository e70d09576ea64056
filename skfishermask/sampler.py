"""FisherMask as a query strategy, and as a scikit-learn classifier that can query."""

from __future__ import annotations

import os
from functools import partial
from numbers import Integral, Real
from typing import Any, ClassVar, Literal

import numpy as np
from sklearn.utils._param_validation import HasMethods, Interval, StrOptions
from sklearn.utils.validation import check_is_fitted

from skfishermask.classifier import NetClassifier
from skfishermask.data import (
    DaskPool,
    active_client,
    check_no_loader,
    check_no_module,
    is_dask,
    take_rows,
    unwrap,
)
from skfishermask.fisher import MASK_STRATEGIES, MaskStrategy, ToLogits, Weighting
from skfishermask.query import Query
from skfishermask.selection import EMBEDDING_DTYPES


class FisherMaskSampler(NetClassifier):
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
    mask : {"global", "per_layer", "relative", "random", "output_layer", "all"}, default="global"
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
    lazy : bool, default=False
        Bring candidates up to date only when their last known gain would win: much less to read,
        and nearly always the same batch. False proves every pick.
    entropy_share : float, default=0.0
        Share of the batch, in [0, 1], that is taken by largest predictive entropy first; the
        rest is picked greedily given these.
    max_candidates : int or None, default=None
        Embed at most so many pool samples, drawn at random.
    batch_size : int or None, default=None
        Samples per pass through the network; None: the net's own.
    to_logits : callable or None, default=None
        Maps what the net's ``infer`` gives to logits (n, C), such as ``lambda out: out["scores"]``.
        None: by the net's criterion and ``predict_nonlinearity``, of a tuple the first element, of
        an output with ``logits`` (Hugging Face) these.
    embedding_dtype : {"float32", "float16", "bfloat16", "float64"}, default="float32"
        Storage of V; computation is in float32 at least.
    memory_share : float, default=0.5
        Share of the free memory, in (0, 1], that V may take. A larger V goes to a scratch file,
        which the selection reads again for every few picks and which is gone afterwards. With
        CUDA, V may first take that share of the card's memory, then of the host's.
    scratch_folder : str, path-like or None, default=None
        Where the scratch file goes: best a fast local disk. None: the system's temporary
        folder, which on some systems is memory.
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
    feature_names_in_ : ndarray of shape (`n_features_in_`,)
        Column names, where X had them.
    mask_ : ParameterMask
        The mask of the last query.
    fisher_diagonal_ : dict of str to Tensor, or None
        Diagonal Fisher information in the last query; None for the masks ``"random"``,
        ``"output_layer"`` and ``"all"``, which do not look at it.
    query_info_ : dict
        Of the last query: ``"seconds"`` (a dict by step), ``"n_candidates"`` (N),
        ``"n_labeled"``, ``"n_directions"`` (r), ``"mask_size"`` (k), ``"embedding_bytes"`` and
        ``"embedding_storage"``: ``"memory"`` (the card's, with CUDA), ``"host memory"``,
        ``"scratch file"`` or ``"cluster"``. ``"dimensions"`` are those that the choice was made in:
        k, or the number of rows where these are fewer. ``"objective"`` has tr(M^-1 F) before the
        batch and after it, and ``"candidates_read"`` counts how often a candidate's embedding was
        read, beside the start. On a Dask cluster also ``"n_workers"``, ``"n_chunks"``,
        ``"round_trips"`` of the selection, and ``"bytes_moved"`` between this process and the
        workers (a dict by phase).

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
        "lazy": ["boolean"],
        "entropy_share": [Interval(Real, 0, 1, closed="both")],
        "max_candidates": [Interval(Integral, 1, None, closed="left"), None],
        "batch_size": [Interval(Integral, 1, None, closed="left"), None],
        "to_logits": [callable, None],
        "embedding_dtype": [StrOptions(set(EMBEDDING_DTYPES))],
        "memory_share": [Interval(Real, 0, 1, closed="right")],
        "scratch_folder": [str, os.PathLike, None],
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
        lazy: bool = False,
        entropy_share: float = 0.0,
        max_candidates: int | None = None,
        batch_size: int | None = None,
        to_logits: ToLogits | None = None,
        embedding_dtype: str = "float32",
        memory_share: float = 0.5,
        scratch_folder: str | os.PathLike[str] | None = None,
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
        self.lazy = lazy
        self.entropy_share = entropy_share
        self.max_candidates = max_candidates
        self.batch_size = batch_size
        self.to_logits = to_logits
        self.embedding_dtype = embedding_dtype
        self.memory_share = memory_share
        self.scratch_folder = scratch_folder
        self.random_state = random_state
        self.verbose = verbose

    def _validate_params(self) -> None:
        check_no_module(self.estimator)
        super()._validate_params()

    def __call__(
        self, classifier: Any, X_pool: Any, n_instances: int = 1, *, X_labeled: Any = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Choose a batch from the pool, in the manner of a modAL query strategy.

        Parameters
        ----------
        classifier : estimator
            A fitted skorch classifier, or a modAL learner, Pipeline or search object that
            holds one. A pipeline's transformers are applied to the pool first.
        X_pool : array-like, dict or tuple of arrays, Dataset or dask.array of length N
            The unlabelled samples: whatever the classifier's ``predict`` takes. A Dask array is
            embedded where its chunks are, on the cluster of the active client if there is one.
        n_instances : int, default=1
            Number of samples to choose.
        X_labeled : array-like, dict or tuple of arrays or Dataset, optional
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
            If the Fisher matrices would not fit into memory, or the embedding neither there
            nor into `scratch_folder`, or not into the workers' memory.
        ConnectionError
            If the Dask cluster that holds the pool is gone.
        """
        self._validate_params()
        for X, name in ((X_pool, "X_pool"), (X_labeled, "X_labeled")):
            check_no_loader(X, name)
        unwrapped = unwrap(classifier)
        if X_labeled is None:
            X_labeled = unwrapped.X_training
        if is_dask(X_labeled):
            X_labeled = np.asarray(X_labeled)
        if X_labeled is not None:
            X_labeled = unwrapped.transform(X_labeled)
        kind: Any = Query
        if is_dask(X_pool):
            X_pool = DaskPool(X_pool, unwrapped.transform)
            client = active_client(X_pool.array)
            if client is not None:
                from skfishermask.cluster import ClusterQuery

                kind = partial(ClusterQuery, client=client)
        else:
            X_pool = unwrapped.transform(X_pool)
        query = kind(self, unwrapped.net, X_pool, X_labeled, n_instances)
        indices, gains = query.run()
        self.mask_ = query.mask
        self.fisher_diagonal_ = query.diagonal
        self.query_info_ = query.info
        return indices, gains

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
        X_pool : array-like, DataFrame, sparse matrix, tensor, dict of arrays, Dataset or dask.array
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
    >>> import numpy as np
    >>> import torch
    >>> from skorch import NeuralNetClassifier
    >>> from skfishermask import fisher_mask_sampling
    >>> X = np.random.default_rng(0).normal(size=(60, 4)).astype("float32")
    >>> y = (X[:, 0] > 0).astype("int64")
    >>> net = NeuralNetClassifier(
    ...     torch.nn.Linear, module__in_features=4, module__out_features=2,
    ...     criterion=torch.nn.CrossEntropyLoss, train_split=None, verbose=0,
    ... ).fit(X[:20], y[:20])
    >>> indices, gains = fisher_mask_sampling(
    ...     net, X[20:], n_instances=3, X_labeled=X[:20], random_state=0
    ... )
    >>> indices.shape, gains.shape
    ((3,), (3,))

    With modAL, parameters can be fixed by a partial function:

    >>> from functools import partial
    >>> from skfishermask.modal import ActiveLearner
    >>> strategy = partial(fisher_mask_sampling, oversample=2.0, random_state=0)
    >>> learner = ActiveLearner(net, query_strategy=strategy, X_training=X[:20], y_training=y[:20])
    >>> indices, instances = learner.query(X[20:], n_instances=3)
    >>> instances.shape
    (3, 4)
    """
    sampler = FisherMaskSampler(**parameters)
    return sampler(classifier, X_pool, n_instances, X_labeled=X_labeled)
