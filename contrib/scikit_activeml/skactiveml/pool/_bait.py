"""
Module implementing the pool-based query strategy Batch Active learning via
Information maTrices (BAIT).
"""

import numpy as np

from ..base import SingleAnnotatorPoolQueryStrategy, SkactivemlClassifier
from ..utils import MISSING_LABEL, check_scalar, check_type, is_labeled
from ..utils import rand_argmax
from ._target import _fit_and_resolve_estimator_target_spec

# Samples whose matrices of information are multiplied at a time.
_CHUNK_SIZE = 1024


class Bait(SingleAnnotatorPoolQueryStrategy):
    """Batch Active learning via Information maTrices (BAIT)

    This class implements BAIT [1]_ for classifiers with a softmax output. It
    greedily selects the batch that minimizes `trace(inv(M) @ F)`, where `F` is
    the mean Fisher information of all samples with respect to the parameters
    of the last linear layer, and `M` is that of the labeled samples and the
    batch plus a multiple of the identity matrix. The Fisher information of a
    sample with representation `x` and class-membership probabilities `p` is
    `kron(diag(p) - outer(p, p), outer(x, x))`, such that no gradients need to
    be computed and no labels are used.

    The greedy selection is exact: the utility of a candidate is the decrease
    of the objective, and is updated for all candidates after each selection.
    With `oversample > 1`, more samples than asked for are selected, of which
    those are removed again that increase the objective least.

    Parameters
    ----------
    clf_embedding_flag_name : dict or str or None, default=None
        Flag, which is passed to the `predict_proba` method for
        getting the (learned) sample representations.

        - If `clf_embedding_flag_name is None` and `predict_proba` returns
          only one output, the input samples `X` are used.
        - If `clf_embedding_flag_name is None` and `predict_proba` returns
          two outputs, `(proba, embeddings)` are expected as outputs.
        - If `isinstance(clf_embedding_flag_name, str)`, the call is
          `clf.predict_proba(X, **{clf_embedding_flag_name: True})`, and
          `(proba, embeddings)` are expected as outputs.
        - If `isinstance(clf_embedding_flag_name, dict)`, the call is
          `clf.predict_proba(X, **clf_embedding_flag_name)`, and
          `(proba, embeddings)` are expected as outputs.
    regularization : float, default=1.0
        Positive multiple of the identity matrix in `M`.
    oversample : float, default=2.0
        Number of samples selected at first as a multiple, at least one, of
        `batch_size`.
    missing_label : scalar or string or np.nan or None, default=np.nan
        Value to represent a missing label.
    random_state : None or int or np.random.RandomState, default=None
        The random state to use, which decides between equal utilities.
    target_type : "auto" or "single-output", default="auto"
        Declared target type. The strategy supports single-output
        classification. A fitted classifier's target specification is
        authoritative when available.

    Notes
    -----
    With `n` candidates, `C` classes, and `d` features, the strategy holds
    two matrices of `C * d` rows and columns, and `2 * C * C` numbers per
    candidate. Each selection takes `O(n * C**2 * (C + d) + C**3 * d**2)`
    operations.

    References
    ----------
    .. [1] J. Ash, S. Goel, A. Krishnamurthy, and S. Kakade. Gone Fishing:
       Neural Active Learning with Fisher Embeddings. In Adv. Neural Inf.
       Process. Syst., 2021.
    """

    def __init__(
        self,
        clf_embedding_flag_name=None,
        regularization=1.0,
        oversample=2.0,
        missing_label=MISSING_LABEL,
        random_state=None,
        target_type="auto",
    ):
        super().__init__(
            missing_label=missing_label, random_state=random_state
        )
        self.clf_embedding_flag_name = clf_embedding_flag_name
        self.regularization = regularization
        self.oversample = oversample
        self.target_type = target_type

    @property
    def _target_capabilities(self):
        return frozenset(
            {("classification", "single-output", "single-annotator")}
        )

    def query(
        self,
        X,
        y,
        clf,
        fit_clf=True,
        sample_weight=None,
        candidates=None,
        batch_size=1,
        return_utilities=False,
    ):
        """Determines for which candidate samples labels are to be queried.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Training data set, usually complete, i.e., including the labeled
            and unlabeled samples.
        y : array-like of shape (n_samples,)
            Labels of the training data set (possibly including unlabeled ones
            indicated by `self.missing_label`).
        clf : skactiveml.base.SkactivemlClassifier
            Classifier implementing the methods `fit` and `predict_proba`.
        fit_clf : bool, default=True
            Defines whether the classifier `clf` should be fitted on `X`, `y`,
            and `sample_weight`.
        sample_weight : array-like of shape (n_samples,), default=None
            Weights of training samples in `X`.
        candidates : None or array-like of shape (n_candidates,), dtype=int or\
                array-like of shape (n_candidates, n_features), default=None
            - If `candidates` is `None`, the unlabeled samples from
              `(X, y)` are considered as `candidates`.
            - If `candidates` is of shape `(n_candidates,)` and of type
              `int`, `candidates` is considered as the indices of the
              samples in `(X, y)`.
            - If `candidates` is of shape `(n_candidates, n_features)`, the
              candidate samples are directly given in `candidates` (not
              necessarily contained in `X`).
        batch_size : int, default=1
            The number of samples to be selected in one AL cycle.
        return_utilities : bool, default=False
            If `True`, also return the utilities based on the query strategy.

        Returns
        -------
        query_indices : numpy.ndarray of shape (batch_size,)
            The query indices indicate for which candidate sample a label is
            to be queried, e.g., `query_indices[0]` indicates the first
            selected sample.

            - If `candidates` is `None` or of shape `(n_candidates,)`, the
              indexing refers to the samples in `X`.
            - If `candidates` is of shape `(n_candidates, n_features)`, the
              indexing refers to the samples in `candidates`.
        utilities : numpy.ndarray of shape (batch_size, n_samples) or \
                numpy.ndarray of shape (batch_size, n_candidates)
            The utilities of samples after each selected sample of the batch,
            e.g., `utilities[0]` indicates the utilities used for selecting
            the first sample (with index `query_indices[0]`) of the batch:
            the decrease of the objective by each candidate. Utilities for
            labeled samples and for those selected before will be set to
            np.nan. With `oversample > 1`, they are given the samples that
            were kept, such that a selected sample need not have the largest.

            - If `candidates` is `None` or of shape `(n_candidates,)`, the
              indexing refers to the samples in `X`.
            - If `candidates` is of shape `(n_candidates, n_features)`, the
              indexing refers to the samples in `candidates`.
        """
        # Validate the strategy's own parameters.
        check_scalar(
            self.regularization,
            "regularization",
            (int, float),
            min_val=0,
            min_inclusive=False,
        )
        check_scalar(self.oversample, "oversample", (int, float), min_val=1)
        predict_proba_kwargs = {}
        if self.clf_embedding_flag_name is not None:
            check_type(
                self.clf_embedding_flag_name,
                "clf_embedding_flag_name",
                dict,
                str,
            )
            predict_proba_kwargs = self.clf_embedding_flag_name
            if isinstance(predict_proba_kwargs, str):
                predict_proba_kwargs = {predict_proba_kwargs: True}

        # Resolve through the classifier before acquisition state is changed.
        clf, target_spec = _fit_and_resolve_estimator_target_spec(
            self,
            clf,
            X,
            y,
            fit_estimator=fit_clf,
            sample_weight=sample_weight,
            estimator_name="clf",
            fit_name="fit_clf",
            estimator_types=(SkactivemlClassifier,),
        )
        X, y, candidates, batch_size, return_utilities = self._validate_data(
            X,
            y,
            candidates,
            batch_size,
            return_utilities,
            reset=True,
            target_type=target_spec.target_type,
        )
        X_cand, mapping = self._transform_candidates(
            candidates, X, y, target_type=target_spec.target_type
        )

        # Select the batch from the representations and probabilities.
        query_indices = np.empty(0, dtype=int)
        utilities_cand = np.empty((0, len(X_cand)))
        if batch_size > 0:
            labeled = is_labeled(y, missing_label=self.missing_label_)
            X_all = np.concatenate([X_cand, X[labeled]])
            probas = clf.predict_proba(X_all, **predict_proba_kwargs)
            embeddings = X_all
            if isinstance(probas, tuple):
                probas, embeddings = probas
            query_indices, utilities_cand = _select(
                np.asarray(embeddings, dtype=float),
                np.asarray(probas, dtype=float),
                n_candidates=len(X_cand),
                batch_size=batch_size,
                n_selected=int(np.ceil(self.oversample * batch_size)),
                regularization=self.regularization,
                random_state=self.random_state_,
            )

        utilities = utilities_cand
        if mapping is not None:
            query_indices = mapping[query_indices]
            utilities = np.full((batch_size, len(X)), np.nan)
            utilities[:, mapping] = utilities_cand
        if return_utilities:
            return query_indices, utilities
        return query_indices


def _select(
    embeddings,
    probas,
    n_candidates,
    batch_size,
    n_selected,
    regularization,
    random_state,
):
    """Select a batch by forward selection and backward elimination.

    Parameters
    ----------
    embeddings : numpy.ndarray of shape (n_samples, n_features)
        Representations of the candidates, followed by those of the labeled
        samples.
    probas : numpy.ndarray of shape (n_samples, n_classes)
        Class-membership probabilities of the same samples.
    n_candidates : int
        Number of candidates.
    batch_size : int
        Number of samples to be selected.
    n_selected : int
        Number of samples to be selected at first.
    regularization : float
        Multiple of the identity matrix in `M`.
    random_state : numpy.random.RandomState
        Decides between equal utilities.

    Returns
    -------
    indices : numpy.ndarray of shape (batch_size,)
        The selected candidates in the order of their selection.
    utilities : numpy.ndarray of shape (batch_size, n_candidates)
        Decrease of the objective by each candidate, given those before.
    """
    n_labeled = len(embeddings) - n_candidates
    n_total = n_labeled + batch_size
    fisher_labeled = _fisher(embeddings[n_candidates:], probas[n_candidates:])
    embeddings, probas = embeddings[:n_candidates], probas[:n_candidates]
    fisher = _fisher(embeddings, probas) + fisher_labeled
    fisher /= n_candidates + n_labeled
    M = fisher_labeled / n_total
    M[np.diag_indices_from(M)] += regularization
    start = np.linalg.inv(M)

    def initial():
        return _Objective(
            embeddings, probas, start, fisher, np.sqrt(batch_size / n_total)
        )

    objective = initial()
    selected, utilities = [], []
    for _ in range(min(n_selected, n_candidates)):
        gains = objective.gains()
        gains[selected] = np.nan
        utilities.append(gains)
        selected.append(int(rand_argmax(gains, random_state=random_state)[0]))
        objective.add(selected[-1])

    if len(selected) > batch_size:
        while len(selected) > batch_size:
            removed = selected[int(np.argmin(objective.losses(selected)))]
            objective.remove(removed)
            selected.remove(removed)
        # The utilities given those that were kept.
        objective, utilities = initial(), []
        for i, index in enumerate(selected):
            gains = objective.gains()
            gains[selected[:i]] = np.nan
            utilities.append(gains)
            objective.add(index)
    return np.array(selected, dtype=int), np.array(utilities)


class _Objective:
    """The objective `trace(inv(M) @ F)`, and how each candidate changes it.

    A candidate enters `M` by `V.T @ V`, where `V` has a row for each class.
    Kept are `P = inv(M)`, `Q = P @ F @ P`, and for each candidate the
    matrices `A = V @ P @ V.T` and `B = V @ Q @ V.T`.

    Parameters
    ----------
    embeddings : numpy.ndarray of shape (n_candidates, n_features)
        Representations of the candidates.
    probas : numpy.ndarray of shape (n_candidates, n_classes)
        Class-membership probabilities of the candidates.
    P : numpy.ndarray of shape (n_parameters, n_parameters)
        Inverse of `M` without any candidate.
    fisher : numpy.ndarray of shape (n_parameters, n_parameters)
        The matrix `F`.
    scale : float
        Factor of `V`.
    """

    def __init__(self, embeddings, probas, P, fisher, scale):
        self.embeddings = embeddings
        self.factors = scale * _factors(probas)
        self.P, self.Q = P.copy(), P @ fisher @ P
        self.A, self.B = np.empty((2, *self.factors.shape))
        for rows in _chunks(len(embeddings)):
            V = self._rows(rows)
            self.A[rows] = V @ self.P @ V.swapaxes(1, 2)
            self.B[rows] = V @ self.Q @ V.swapaxes(1, 2)
        self.identity = np.eye(probas.shape[1])

    def _rows(self, rows):
        return _rows(self.embeddings[rows], self.factors[rows])

    def _times(self, columns):
        """Returns `V @ columns` for each candidate."""
        n_classes, n_features = self.factors.shape[1], self.embeddings.shape[1]
        columns = columns.reshape(n_classes, n_features, -1)
        products = np.tensordot(self.embeddings, columns, axes=(1, 1))
        return self.factors @ products

    def gains(self):
        """Returns the decrease of the objective if a candidate is added."""
        changed = np.linalg.solve(self.identity + self.A, self.B)
        return np.trace(changed, axis1=1, axis2=2)

    def losses(self, indices):
        """Returns the increase of the objective if a candidate is removed."""
        A, B = self.A[indices], self.B[indices]
        changed = np.linalg.solve(self.identity - A, B)
        return np.trace(changed, axis1=1, axis2=2)

    def add(self, index):
        """Adds a candidate to the batch."""
        W = np.linalg.inv(self.identity + self.A[index])
        self._update(index, -W)

    def remove(self, index):
        """Removes a candidate from the batch."""
        W = np.linalg.inv(self.identity - self.A[index])
        self._update(index, W)

    def _update(self, index, W):
        # With U = P V.T, Woodbury's identity gives inv(M) = P + U W U.T.
        V = self._rows(slice(index, index + 1))[0]
        U, Z = self.P @ V.T, self.Q @ V.T
        WBW = W @ self.B[index] @ W
        VU, VZ = self._times(U), self._times(Z)
        self.A += VU @ W @ VU.swapaxes(1, 2)
        self.P += U @ W @ U.T
        cross = VU @ W @ VZ.swapaxes(1, 2)
        self.B += cross + cross.swapaxes(1, 2) + VU @ WBW @ VU.swapaxes(1, 2)
        cross = U @ W @ Z.T
        self.Q += cross + cross.T + U @ WBW @ U.T


def _factors(probas):
    """Returns R with `R.T @ R = diag(p) - outer(p, p)` for each sample."""
    identity = np.eye(probas.shape[1])
    return np.sqrt(probas)[:, :, None] * (identity - probas[:, None, :])


def _rows(embeddings, factors):
    """Returns V for each sample, with a row for each class."""
    products = factors[:, :, :, None] * embeddings[:, None, None, :]
    return products.reshape(*factors.shape[:2], -1)


def _chunks(n_samples):
    return (
        slice(start, start + _CHUNK_SIZE)
        for start in range(0, n_samples, _CHUNK_SIZE)
    )


def _fisher(embeddings, probas):
    """Returns the sum of the samples' Fisher information matrices."""
    n_parameters = embeddings.shape[1] * probas.shape[1]
    fisher = np.zeros((n_parameters, n_parameters))
    for rows in _chunks(len(embeddings)):
        V = _rows(embeddings[rows], _factors(probas[rows]))
        V = V.reshape(-1, n_parameters)
        fisher += V.T @ V
    return fisher
