"""FisherMask as a query strategy."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from numbers import Integral, Real
from typing import Any, ClassVar, Literal

import numpy as np
import psutil
import torch
from sklearn.base import BaseEstimator
from sklearn.utils import check_random_state
from sklearn.utils._param_validation import Interval, StrOptions
from torch import Tensor
from tqdm.auto import tqdm

from skfishermask._skorch import NetBatches, n_samples, to_logits_of
from skfishermask.directions import Weighting, n_rows
from skfishermask.fisher import (
    directions_for_share,
    embedding_blocks,
    fisher_diagonal,
    fisher_matrix,
    predicted_probabilities,
)
from skfishermask.jacobian import output_layer
from skfishermask.mask import MASK_STRATEGIES, MaskStrategy, ParameterMask
from skfishermask.selection import select_batch
from skfishermask.unwrap import unwrap

_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
# Selection holds the Fisher matrices, their factors and products: so many k x k in float64.
_N_MATRICES = 6
# The masks that are chosen without looking at the diagonal Fisher information.
_BLIND_MASKS = ("random", "output_layer", "all")


class FisherMaskSampler(BaseEstimator):
    r"""Query strategy that picks the batch which most reduces the inverse Fisher information.

    It ranks the network's parameters by their diagonal Fisher information, keeps a mask of
    the most informative ones, describes each candidate x by the Fisher embedding V(x) of its
    masked gradients, and greedily picks the batch that most reduces
    :math:`\mathrm{tr}(M^{-1} F)`, where F is the mean Fisher information of all samples and
    :math:`M = M_0 + \sum V(x)^\top V(x)` over the batch.

    Parameters
    ----------
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
        For every draw. An int makes a query reproducible. Global random state is never
        touched.
    verbose : int, default=0
        1 shows progress bars.

    Attributes
    ----------
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
    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
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
        "embedding_dtype": [StrOptions(set(_DTYPES))],
        "random_state": ["random_state"],
        "verbose": ["verbose"],
    }

    def __init__(
        self,
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
        query = _Query(
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


def _check_n_instances(n_instances: Any, n_pool: int) -> int:
    if n_pool == 0:
        raise ValueError("Expected a pool with at least one sample, found an empty one.")
    if not isinstance(n_instances, Integral) or isinstance(n_instances, bool):
        raise ValueError(f"n_instances must be an int, got {n_instances!r}.")
    n: int = int(n_instances)
    if not 1 <= n <= n_pool:
        raise ValueError(
            f"n_instances must be between 1 and the {n_pool} samples of the pool, "
            f"got {n_instances}."
        )
    return n


def _gigabytes(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:.2f} GB"


class _Query:
    """One query: the net, the data that it sees, and the steps of the method."""

    def __init__(
        self,
        parameters: FisherMaskSampler,
        net: Any,
        X_pool: Any,
        X_labeled: Any,
        n_instances: int,
    ) -> None:
        self._p = parameters
        self._net = net
        self._module = net.module_
        self._X_pool, self._X_labeled = X_pool, X_labeled
        self._n_pool = n_samples(net, X_pool)
        self._n_instances = _check_n_instances(n_instances, self._n_pool)
        self._n_labeled = 0 if X_labeled is None else n_samples(net, X_labeled)
        limit = parameters.max_candidates
        if limit is not None and limit < n_instances:
            raise ValueError(
                f"max_candidates={limit} leaves fewer candidates than n_instances={n_instances}."
            )
        self._to_logits = to_logits_of(net)
        self._rng = check_random_state(parameters.random_state)
        self._seconds: dict[str, float] = {}
        self.mask: ParameterMask
        self.diagonal: dict[str, Tensor] | None = None
        self.info: dict[str, Any] = {}

    def run(self) -> tuple[np.ndarray, np.ndarray]:
        start = time.perf_counter()
        first = next(iter(self._batches(self._X_pool, np.arange(1))))
        n_classes = predicted_probabilities(self._module, [first], to_logits=self._to_logits).shape[
            1
        ]
        rows = self._candidates()
        sample = self._mask_sample()
        r = self._n_directions(n_classes, sample)
        with self._step("diagonal"):
            self.mask = self._make_mask(
                output_layer(self._module, first, to_logits=self._to_logits), sample, r
            )
        k = len(self.mask)
        self._check_memory(len(rows), r, k)
        with self._step("embedding"):
            fisher_labeled = self._labeled_fisher(r)
            V = self._embed(rows, r)
        with self._step("fisher"):
            fisher = self._target(V, fisher_labeled)
        with self._step("selection"):
            positions, gains = select_batch(
                V,
                self._n_instances,
                fisher,
                fisher_labeled=fisher_labeled if self._p.use_labeled else None,
                n_labeled=self._n_labeled if self._p.use_labeled else 0,
                regularization=self._p.regularization,
                oversample=self._p.oversample,
                preselected=self._by_entropy(rows),
            )
        self._seconds["total"] = time.perf_counter() - start
        self.info = {
            "seconds": self._seconds,
            "n_candidates": len(rows),
            "n_labeled": self._n_labeled,
            "n_directions": r,
            "mask_size": k,
            "embedding_bytes": V.numel() * V.element_size(),
        }
        return rows[positions.cpu().numpy()], gains.cpu().numpy()

    @contextmanager
    def _step(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self._seconds[name] = time.perf_counter() - start

    def _batches(self, X: Any, rows: np.ndarray | None = None) -> NetBatches:
        return NetBatches(self._net, X, rows, self._p.batch_size)

    def _progress(self, batches: Iterable[Any], total: int, text: str) -> Iterable[Any]:
        return tqdm(batches, total=total, desc=text, unit="batch") if self._p.verbose else batches

    def _candidates(self) -> np.ndarray:
        limit = self._p.max_candidates
        if limit is None or limit >= self._n_pool:
            return np.arange(self._n_pool)
        return np.sort(self._rng.choice(self._n_pool, limit, replace=False))

    def _mask_sample(self) -> list[NetBatches]:
        """Draw samples for the diagonal from the labelled ones and the pool."""
        n = self._n_labeled + self._n_pool
        wanted = min(self._p.n_mask_samples or n, n)
        drawn = np.sort(self._rng.choice(n, wanted, replace=False))
        labeled, pool = drawn[drawn < self._n_labeled], drawn[drawn >= self._n_labeled]
        batches = [self._batches(self._X_pool, pool - self._n_labeled)]
        if len(labeled):
            batches.insert(0, self._batches(self._X_labeled, labeled))
        return batches

    def _n_directions(self, n_classes: int, sample: list[NetBatches]) -> int:
        most = n_rows(n_classes, self._p.weighting)
        wanted = self._p.n_directions
        if isinstance(wanted, float):
            batches = _Chain(sample)
            wanted = directions_for_share(self._module, batches, wanted, to_logits=self._to_logits)
        return most if wanted is None else min(int(wanted), most)

    def _make_mask(self, output: list[str], sample: list[NetBatches], r: int) -> ParameterMask:
        if self._p.mask in _BLIND_MASKS:
            diagonal = {name: torch.zeros(p.shape) for name, p in self._module.named_parameters()}
        else:
            total = sum(map(len, sample))
            batches = self._progress(_Chain(sample), total, "Fisher diagonal")
            diagonal = self.diagonal = fisher_diagonal(
                self._module, batches, n_directions=r, to_logits=self._to_logits
            )
        return ParameterMask.from_diagonal(
            diagonal,
            self._p.mask,
            self._p.mask_fraction,
            output_layer=output,
            random_state=self._rng,
        )

    def _check_memory(self, n: int, r: int, k: int) -> None:
        itemsize = _DTYPES[self._p.embedding_dtype].itemsize
        embedding, matrices = n * r * k * itemsize, _N_MATRICES * 8 * k * k
        device = next(self._module.parameters()).device
        free = (
            torch.cuda.mem_get_info(device)[0]
            if device.type == "cuda"
            else psutil.virtual_memory().available
        )
        if embedding + matrices > free:
            raise MemoryError(
                f"The Fisher embedding of {n} candidates x {r} directions x {k} parameters needs "
                f"{_gigabytes(embedding)} and the {k} x {k} Fisher matrices "
                f"{_gigabytes(matrices)}, but {_gigabytes(free)} are free on {device}. "
                "mask_fraction makes both smaller; max_candidates, n_directions and "
                "embedding_dtype make the embedding smaller."
            )

    def _blocks(self, X: Any, rows: np.ndarray | None, r: int, text: str) -> Iterator[Tensor]:
        batches = self._batches(X, rows)
        return embedding_blocks(
            self._module,
            self._progress(batches, len(batches), text),
            self.mask,
            weighting=self._p.weighting,
            n_directions=r,
            to_logits=self._to_logits,
        )

    def _labeled_fisher(self, r: int) -> Tensor | None:
        """Give the mean Fisher matrix of the labelled samples, which are not kept embedded."""
        if self._n_labeled == 0:
            return None
        total: Tensor | None = None
        for block in self._blocks(self._X_labeled, None, r, "Labelled"):
            part = fisher_matrix(block).mul_(len(block) / self._n_labeled)
            total = part if total is None else total.add_(part)
        return total

    def _embed(self, rows: np.ndarray, r: int) -> Tensor:
        V = torch.empty(
            len(rows),
            r,
            len(self.mask),
            dtype=_DTYPES[self._p.embedding_dtype],
            device=next(self._module.parameters()).device,
        )
        every = None if len(rows) == self._n_pool else rows
        start = 0
        for block in self._blocks(self._X_pool, every, r, "Fisher embedding"):
            V[start : start + len(block)] = block
            start += len(block)
        return V

    def _target(self, V: Tensor, fisher_labeled: Tensor | None) -> Tensor:
        if self._p.target == "identity":
            return torch.eye(V.shape[2], dtype=torch.float64, device=V.device)
        fisher = fisher_matrix(V)
        if fisher_labeled is None:
            return fisher
        n, n_labeled = len(V), self._n_labeled
        return (n * fisher + n_labeled * fisher_labeled) / (n + n_labeled)

    def _by_entropy(self, rows: np.ndarray) -> list[int]:
        """Give the positions of the most uncertain candidates, for the hybrid."""
        n = round(self._p.entropy_share * self._n_instances)
        if n == 0:
            return []
        batches = self._batches(self._X_pool, rows)
        p = predicted_probabilities(self._module, batches, to_logits=self._to_logits)
        order = torch.special.entr(p).sum(1).sort(descending=True, stable=True).indices
        first: list[int] = order[:n].tolist()
        return first


class _Chain:
    """Several iterables one after the other, readable again."""

    def __init__(self, parts: list[NetBatches]) -> None:
        self._parts = parts

    def __iter__(self) -> Iterator[Any]:
        return chain.from_iterable(self._parts)
