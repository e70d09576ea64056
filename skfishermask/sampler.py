"""FisherMask as a query strategy, and as a scikit-learn classifier that can query."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

import numpy as np

from skfishermask.classifier import NetEstimator
from skfishermask.compat import HasMethods
from skfishermask.data import (
    Data,
    Estimator,
    SampleRole,
    UserValue,
    check_holds_samples,
    check_no_module,
    check_no_row_numbers,
    check_rows,
    has_no_labels,
    take_rows,
    unwrap,
)
from skfishermask.parameters import (
    MethodParameters,
    Seed,
    Settings,
    at_least_one,
    parameter,
    with_method_parameters,
)
from skfishermask.query import Result, run_first_batch, run_query


@with_method_parameters
@dataclass(eq=False, repr=False)
class FisherMaskSampler(MethodParameters, NetEstimator):
    r"""Query strategy that picks the batch which most reduces the inverse Fisher information.

    Called with a fitted skorch net it is a query strategy in modAL's manner. Fitted, it is a
    scikit-learn classifier or regressor around one, with a :meth:`query` method beside ``predict``:
    a regressor where `estimator` is one, or `likelihood` is ``"gaussian"``.

    By default the batch covers the inputs of the network, weighted by the uncertainty of its
    predictions (`coverage_share`): the objective below on the features of a kernel, which a
    comparison of strategies decided. ``FisherMaskSampler(**skfishermask.PUBLISHED)`` is the method
    as published, with ``mask_fraction=0.002`` that of the paper's experiments; without such inputs
    the default is a quicker form of it.

    The method ranks the network's parameters by their diagonal Fisher information, keeps a mask of
    the most informative ones, describes each candidate x by the Fisher embedding V(x) of its
    masked gradients, and greedily picks the batch that most reduces
    :math:`\mathrm{tr}(M^{-1} F)`, where F is the mean Fisher information of all samples and
    :math:`M = M_0 + \sum V(x)^\top V(x)` over the batch.

    Parameters
    ----------
    estimator : skorch net, or a Pipeline or search object around one, default=None
        The net to wrap, a classifier or a regressor; :meth:`fit` fits a clone of it.
        scikit-learn's ``LogisticRegression`` and ``SGDClassifier(loss="log_loss")`` are linear
        nets, too. None: a small default network made from the data, for labels of the kind that
        `likelihood` names (``"auto"``: classes). As a bare query strategy none is needed.
    <method parameters>
    batch_size : int or None, default=None
        Samples per pass through the network; None: the net's own.
    random_state : int, RandomState or None, default=None
        For every draw. An int makes :meth:`fit` and queries reproducible, without touching
        global random state. None leaves :meth:`fit` to the global random states.

    Attributes
    ----------
    estimator_ : estimator
        The fitted clone of `estimator`, or the default network.
    classes_ : ndarray of shape (n_classes,)
        Class labels; of several labels a sample their numbers. Not there for numbers.
    n_features_in_ : int
        Length of the second axis of X in :meth:`fit`.
    feature_names_in_ : ndarray of shape (`n_features_in_`,)
        Column names, where X had them.
    mask_ : ParameterMask or None
        The mask of the last query; None where coverage alone chose the batch.
    fisher_diagonal_ : dict of str to Tensor, or None
        Diagonal Fisher information in the last query; None for coverage alone, and for the masks
        ``"random"``, ``"output_layer"`` and ``"all"``, which do not look at it.
    query_info_ : dict
        Of the last query: ``"seconds"`` (a dict by step), ``"n_candidates"`` (N),
        ``"n_labeled"``, ``"n_directions"`` (r), ``"mask_size"`` (k), ``"embedding_bytes"`` and
        ``"embedding_storage"``: ``"memory"`` (the card's, with CUDA), ``"host memory"``,
        ``"scratch file"`` or ``"cluster"``. ``"dimensions"`` are those that the choice was made in:
        k, or the number of rows where these are fewer. ``"objective"`` has tr(M^-1 F) before the
        batch and after it, ``"candidates_read"`` counts how often a candidate's embedding was
        read, beside the start, ``"coverage_share"`` is the share of the batch that was chosen
        by coverage, and ``"coverage_inputs"`` what was covered. Where that is all of the batch,
        entries about the mask and the embedding are missing. On a Dask cluster also
        ``"n_workers"``, ``"n_chunks"``, ``"round_trips"`` of the selection, and ``"bytes_moved"``
        between this process and the workers (a dict by phase).

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

    estimator: Estimator = parameter(None, HasMethods(["fit", "predict_proba"]), None)
    _: KW_ONLY
    batch_size: int | None = parameter(None, at_least_one(), None)
    random_state: Seed = parameter(None, "random_state")

    def __call__(
        self,
        classifier: Estimator,
        X_pool: Data,
        n_instances: int = 1,
        *,
        X_labeled: Data = None,
        X_target: Data = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Choose a batch from the pool, in the manner of a modAL query strategy.

        Parameters
        ----------
        classifier : estimator
            A fitted skorch classifier or logistic regression of scikit-learn, or a modAL learner,
            Pipeline or search object that holds one. A pipeline's transformers are applied to the
            pool first.
        X_pool : array-like, dict or tuple of arrays, Dataset or dask.array of length N
            The unlabelled samples: what the classifier's ``predict`` takes. A Dask array is
            embedded where its chunks are, on the cluster of the active client if there is one.
        n_instances : int, default=1
            Number of samples to choose.
        X_labeled : array-like, dict or tuple of arrays or Dataset, optional
            The labelled samples. None: the learner's ``X_training``, or those of the ``fit`` of a
            sampler; else there are none. Empty: none.
        X_target : array-like, dict or tuple of arrays or Dataset, optional
            Samples, without labels, like those on which the network is to do well: a balanced or
            a deployment set where the pool is neither. F is their mean Fisher matrix then.

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
        settings = self._checked(X_pool, X_labeled, X_target)
        asked = X_pool, n_instances, settings, X_labeled, X_target
        if has_no_labels(classifier):
            return self._keep(run_first_batch(classifier, *asked))
        return self._keep(run_query(unwrap(classifier), *asked))

    def _keep(self, result: Result) -> tuple[np.ndarray, np.ndarray]:
        """Store what a query says beside the batch; return the batch and its gains."""
        self.mask_, self.fisher_diagonal_ = result.mask, result.diagonal
        self.query_info_ = result.info
        return result.indices, result.gains

    def _checked(self, *samples: Data) -> Settings:
        """Check the parameters and samples of a query; return the parameters."""
        check_no_module(self.estimator)
        settings = Settings(self, self.batch_size, self.random_state)
        check_rows(samples[0], "X_pool")
        for X, role in zip(samples, SampleRole, strict=True):
            check_holds_samples(X, role.argument)
            check_no_row_numbers(X, samples[0], role.argument)
        return settings

    def query(
        self,
        X_pool: Data,
        n_instances: int = 1,
        *,
        X_labeled: Data = None,
        X_target: Data = None,
        return_metrics: bool = False,
    ) -> tuple[Data, ...]:
        """Choose a batch from the pool, with the fitted estimator if there is one.

        Before :meth:`fit` it is a first batch: it covers the inputs, without a network or labels
        (:doc:`/user_guide/selection`). Transformers of a pipeline are fitted to the pool for it.

        Parameters
        ----------
        X_pool : array-like, DataFrame, sparse matrix, tensor, dict of arrays, Dataset or dask.array
            The unlabelled samples, N of them. Labelled ones that are among them can be chosen:
            leave them out.
        n_instances : int, default=1
            Number of samples to choose.
        X_labeled : same kinds as `X_pool`, optional
            The labelled samples. None: those of :meth:`fit`. Empty: none.
        X_target : same kinds as `X_pool`, optional
            Samples like those on which the network is to do well, see :meth:`__call__`.
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
        if hasattr(self, "estimator_"):
            # As for any other classifier: its input is checked, and its net found inside.
            indices, gains = self(self, X_pool, n_instances, X_labeled=X_labeled, X_target=X_target)
        else:
            settings = self._checked(X_pool, X_labeled, X_target)
            asked = X_pool, n_instances, settings, X_labeled, X_target
            indices, gains = self._keep(run_first_batch(self.estimator, *asked))
        instances = take_rows(X_pool, indices)
        return (indices, instances, gains) if return_metrics else (indices, instances)


def fisher_mask_sampling(
    classifier: Estimator,
    X_pool: Data,
    n_instances: int = 1,
    *,
    X_labeled: Data = None,
    X_target: Data = None,
    **parameters: UserValue,
) -> tuple[np.ndarray, np.ndarray]:
    """Choose a batch by FisherMask: the function form, in modAL's manner.

    Parameters
    ----------
    classifier, X_pool, n_instances, X_labeled, X_target
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
    return sampler(classifier, X_pool, n_instances, X_labeled=X_labeled, X_target=X_target)
