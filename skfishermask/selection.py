"""Greedy choice of a batch that makes tr(M^-1 F) small, forward and backward.

The objective is BAIT's (J. T. Ash, S. Goel, A. Krishnamurthy, S. Kakade, "Gone Fishing: Neural
Active Learning with Fisher Embeddings", NeurIPS 2021) as FisherMask states it (S. Gul,
M. Elmahallawy, S. Madria, A. Tripathy, arXiv 2411.05752). M is the Fisher information of the
labelled samples and the batch, F the one that the pool calls for.

For a candidate with Fisher embedding V (r, k), two small blocks say all that a step needs:
A = V M^-1 V^T and B = V M^-1 F M^-1 V^T, both (r, r), and

    gain = tr(M^-1 F) - tr((M + V^T V)^-1 F) = tr((I + A)^-1 B)         (Woodbury).

When a sample V* is taken, I + A* = L L^T, U = M^-1 V*^T L^-T, G = U^T F U, then

    M^-1 <- M^-1 - U U^T,
    A    <- A - q q^T                with q = V U,
    B    <- B - q t^T - t q^T        with t = V T,  T = M^-1 F U - U G / 2,

exactly, so that a step costs one product of the stacked embeddings with a (k, 2 r) matrix
instead of one with M^-1. Dropping a sample is the same with M^-1 negative: for N = -M^-1 the
blocks A and B, I + A and the update keep their form, and the gain is minus the cost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Integral

import torch
from torch import Tensor

from skfishermask.candidates import Start
from skfishermask.embedded import EmbeddedBlock
from skfishermask.gains import symmetric
from skfishermask.greedy import choose
from skfishermask.storage import StoredEmbedding, stored

# A Fisher matrix may be off symmetry by this, relatively: it may be a float32 product.
_SYMMETRY = 1e-4
# So many picks share one read of the embeddings: where they have to be fetched, where they are in
# memory but for the most part not in a processor's cache, and where they are small.
_FETCHED, _LARGE, _SMALL = 8, 2, 1
_CACHE_BYTES = 2**26


@torch.no_grad()
def select_batch(
    embedding: Tensor | StoredEmbedding,
    n_instances: int,
    fisher: Tensor,
    *,
    fisher_labeled: Tensor | None = None,
    n_labeled: int = 0,
    regularization: float = 1.0,
    oversample: float = 1.0,
    preselected: Sequence[int] | None = None,
    on_pick: Callable[[int], object] | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Choose a batch that makes :math:`\mathrm{tr}(M^{-1} F)` small.

    Greedy, starting from
    :math:`M_0 = \lambda I + \frac{n_L}{n_L + K} F_L`: the sample with the largest

    .. math::

        \mathrm{gain} = \mathrm{tr}\big(
            V M^{-1} F M^{-1} V^\top (I + V M^{-1} V^\top)^{-1} \big)

    is taken, :math:`M \leftarrow M + V^\top V`, and again, where V is the sample's embedding
    times :math:`\sqrt{K / (n_L + K)}`. With `oversample` above 1 more samples than needed
    are taken, and those whose removal costs least are dropped again one by one. Exact to
    rounding: candidates whose gains float32 cannot tell apart are compared in float64.

    Parameters
    ----------
    embedding : Tensor of shape (n, r, k), floating point
        Fisher embeddings of the n candidates: V^T V is a candidate's Fisher information. A
        ``skfishermask.storage.StoredEmbedding`` may lie elsewhere than in memory.
    n_instances : int
        Number of samples to choose, K, from 1 to n.
    fisher : Tensor of shape (k, k), floating point
        F, the Fisher information to cover, symmetric and positive semi-definite.
    fisher_labeled : Tensor of shape (k, k), floating point, optional
        F_L, the mean Fisher information of the labelled samples; None leaves it out.
    n_labeled : int, default=0
        Number of labelled samples, n_L.
    regularization : float, default=1.0
        :math:`\lambda`, above 0.
    oversample : float, default=1.0
        Samples taken before the pruning, as a multiple of K; rounded up, at most n.
    preselected : sequence of int, optional
        Positions that are in the batch whatever their gain: taken first, in this order, and
        never dropped.
    on_pick : callable, optional
        Called now and then with the number of samples taken since the last call, for progress.

    Returns
    -------
    positions : Tensor of shape (n_instances,), int64
        The chosen samples in the order they were taken; among equals the lower position.
    gains : Tensor of shape (n_instances,), float64
        The decrease of the objective by each of them at the time it was taken.

    Raises
    ------
    TypeError
        If a tensor is not one, or not of a floating point dtype.
    ValueError
        If a shape, a number or a position is out of range, the embedding holds NaN or
        infinity, or a Fisher matrix is not finite, symmetric and positive semi-definite.

    Notes
    -----
    A step costs one product of the embeddings with a (k, 2 r) matrix; the formulas are in
    :doc:`/user_guide/selection`. Beside the embedding there are two (r, r) float64 blocks per
    candidate and a few (k, k) float64 matrices.

    References
    ----------
    .. [1] S. Gul, M. Elmahallawy, S. Madria, A. Tripathy, "FisherMask: Enhancing Neural
       Network Labeling Efficiency in Image Classification Using Fisher Information", 2024,
       arXiv 2411.05752.
    .. [2] J. T. Ash, S. Goel, A. Krishnamurthy, S. Kakade, "Gone Fishing: Neural Active
       Learning with Fisher Embeddings", NeurIPS 2021.

    Examples
    --------
    >>> import torch
    >>> from skfishermask import select_batch
    >>> embedding = torch.tensor([[[1.0, 0.0]], [[2.0, 0.0]], [[0.0, 1.0]]])
    >>> positions, gains = select_batch(embedding, 2, torch.eye(2))
    >>> positions
    tensor([1, 2])
    >>> gains
    tensor([0.8000, 0.5000], dtype=torch.float64)
    """
    _check_embedding(embedding)
    embedding = stored(embedding)
    n, _, k = embedding.shape
    n_instances = _check_count("n_instances", n_instances, 1, n)
    n_labeled = _check_count("n_labeled", n_labeled, 0, None)
    if not 0 < regularization < math.inf:
        raise ValueError(f"regularization must be above 0 and finite, got {regularization!r}.")
    if not 1 <= oversample < math.inf:
        raise ValueError(f"oversample must be at least 1 and finite, got {oversample!r}.")
    forced = _check_preselected(preselected, n_instances, n)
    fisher = _check_fisher("fisher", fisher, k, embedding.device)
    if fisher_labeled is not None:
        fisher_labeled = _check_fisher("fisher_labeled", fisher_labeled, k, embedding.device)

    start, scale = starting(
        fisher,
        n_instances,
        fisher_labeled=fisher_labeled,
        n_labeled=n_labeled,
        regularization=regularization,
    )
    blocks = [EmbeddedBlock(embedding, start)]
    picks = choose(
        blocks,
        start,
        fisher,
        n_instances,
        n_forward(n, n_instances, oversample),
        forced=forced,
        on_pick=on_pick,
        speculative=_picks_a_read(embedding),
    )
    positions = torch.tensor([pick.position for pick in picks], device=embedding.device)
    gains = torch.tensor([pick.gain for pick in picks], dtype=torch.float64)
    return positions, gains.to(embedding.device) / scale


def _picks_a_read(embedding: StoredEmbedding) -> int:
    if embedding.is_fetched:
        return _FETCHED
    return _LARGE if embedding.n_bytes > _CACHE_BYTES else _SMALL


def starting(
    fisher: Tensor,
    n_instances: int,
    *,
    fisher_labeled: Tensor | None,
    n_labeled: int,
    regularization: float,
) -> tuple[Start, float]:
    """Find the state to start from.

    Parameters
    ----------
    fisher, n_instances, fisher_labeled, n_labeled, regularization
        As for `select_batch`, checked.

    Returns
    -------
    start : Start
        With M and V^T V divided by K / (n_L + K): that leaves V as it is.
    scale : float
        By which every gain is multiplied for that.
    """
    scale = n_instances / (n_labeled + n_instances)
    start = Start(scale / regularization, fisher * (scale / regularization) ** 2)
    if fisher_labeled is not None and n_labeled:
        first = _inverse(fisher_labeled * (n_labeled / n_instances), regularization / scale)
        start = Start(first, symmetric(first @ fisher @ first))
    return start, scale


def n_forward(n: int, n_instances: int, oversample: float) -> int:
    """Give the number of samples to take before the pruning.

    Parameters
    ----------
    n : int
        Number of candidates.
    n_instances, oversample
        As for `select_batch`.

    Returns
    -------
    int
        Never more than there are.
    """
    # Less a trifle, because 1.1 * 10 is a little more than 11.
    return min(n, math.ceil(oversample * n_instances - 1e-9))


def _inverse(matrix: Tensor, shift: float) -> Tensor:
    """Invert `matrix` + `shift` I by its Cholesky factor."""
    shifted = matrix.clone()
    shifted.diagonal().add_(shift)
    factor, failed = torch.linalg.cholesky_ex(shifted)
    if failed:
        raise ValueError(
            "fisher_labeled must be positive semi-definite, but adding the regularization "
            "does not make it positive definite."
        )
    return torch.cholesky_inverse(factor)


def _check_embedding(embedding: Tensor | StoredEmbedding) -> None:
    if isinstance(embedding, StoredEmbedding):
        return
    _check_floating("embedding", embedding)
    if embedding.ndim != 3 or 0 in embedding.shape:
        raise ValueError(
            "embedding must have shape (n, r, k) with n, r and k at least 1, "
            f"got {tuple(embedding.shape)}."
        )


def _check_floating(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}.")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must have a floating point dtype, got {tensor.dtype}.")


def _check_count(name: str, value: int, low: int, high: int | None) -> int:
    expected = f"an int from {low} to {high}" if high is not None else f"an int from {low} up"
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(f"{name} must be {expected}, got {value!r}.")
    if value < low or (high is not None and value > high):
        raise ValueError(f"{name} must be {expected}, got {value!r}.")
    return int(value)


def _check_preselected(preselected: Sequence[int] | None, n_instances: int, n: int) -> list[int]:
    positions = [] if preselected is None else list(preselected)
    if len(positions) > n_instances:
        raise ValueError(
            f"preselected must hold at most n_instances={n_instances} positions, "
            f"got {len(positions)}."
        )
    positions = [_check_count("each position in preselected", p, 0, n - 1) for p in positions]
    if len(set(positions)) < len(positions):
        raise ValueError(f"preselected must hold distinct positions, got {positions}.")
    return positions


def _check_fisher(name: str, fisher: Tensor, k: int, device: torch.device) -> Tensor:
    """Check a Fisher matrix; give it in float64, exactly symmetric, on the right device."""
    _check_floating(name, fisher)
    if fisher.shape != (k, k):
        raise ValueError(
            f"{name} must have shape ({k}, {k}), k by k for an embedding of shape (n, r, k), "
            f"got {tuple(fisher.shape)}."
        )
    fisher = fisher.to(device, torch.float64)
    largest = float(fisher.abs().max())
    if not math.isfinite(largest):
        raise ValueError(f"{name} must be finite, it holds NaN or infinity.")
    asymmetry = float((fisher - fisher.T).abs().max())
    if asymmetry > _SYMMETRY * largest:
        raise ValueError(
            f"{name} must be symmetric, but differs from its transpose by up to "
            f"{asymmetry:.3g} with entries up to {largest:.3g}."
        )
    return symmetric(fisher)
