"""Choice of a batch that makes tr(M^-1 F) small: checks, the start, forward and backward."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral

import torch
from torch import Tensor

from skfishermask.selection.candidates import check_finite
from skfishermask.selection.linalg import (
    fingerprints,
    repeated,
    row_coordinates,
    shifted,
    symmetric,
)
from skfishermask.selection.pools import LazyPool, LocalPool
from skfishermask.selection.rounds import SHORTLIST, Information, Pool, best_of, choose, give
from skfishermask.selection.storage import StoredEmbedding, free_bytes, state_bytes, stored

# A Fisher matrix may be off symmetry by this, relatively: it may be a float32 product.
_SYMMETRY = 1e-4
# Picks that share one read of the embeddings: where that waits for a file or a device, where they
# are in memory but for the most part not in a processor's cache, and where they are small.
_FAR, _LARGE, _SMALL = 8, 2, 1
_CACHE_BYTES = 2**26
# Share of the free memory that the states of attempted steps may take.
_STATES_SHARE = 0.25

Progress = Callable[[int], object]


@dataclass(frozen=True)
class Batch:
    """What was chosen.

    Attributes
    ----------
    positions : Tensor of shape (n_instances,), int64
        In the order they were taken.
    gains : Tensor of shape (n_instances,), float64
        Decrease of the objective by each at the time it was taken.
    objective : tuple of float
        tr(M^-1 F) before the batch and after it.
    dimensions : int
        In which all of it was computed.
    n_read : int
        Candidates whose embeddings were read, beside the start; -1 where nobody counted.
    """

    positions: Tensor
    gains: Tensor
    objective: tuple[float, float]
    dimensions: int
    n_read: int


@dataclass(frozen=True)
class Objective:
    """What a batch is chosen by.

    Attributes
    ----------
    n_instances : int
        K.
    fisher : Tensor of shape (k, k)
        F.
    fisher_labeled : Tensor of shape (k, k), or None
        F_L.
    n_labeled : int
        n_L.
    regularization : float
        lambda.
    oversample : float
        Forward picks, as a multiple of K.
    """

    n_instances: int
    fisher: Tensor
    fisher_labeled: Tensor | None = None
    n_labeled: int = 0
    regularization: float = 1.0
    oversample: float = 1.0

    @property
    def scale(self) -> float:
        """What M and V^T V are divided by, which leaves V as it is: K / (n_L + K)."""
        return self.n_instances / (self.n_labeled + self.n_instances)

    @property
    def shift(self) -> float:
        """The multiple of the identity in M, so divided."""
        return self.regularization / self.scale

    @property
    def weighted_labeled(self) -> Tensor | None:
        """The labelled samples' part of M, so divided; None where there is none."""
        if self.fisher_labeled is None or not self.n_labeled:
            return None
        return self.fisher_labeled * (self.n_labeled / self.n_instances)

    def start(self) -> tuple[Tensor | float, Tensor]:
        """Give M_0^-1, where a float stands for a multiple of the identity, and M_0^-1 F M_0^-1."""
        labeled = self.weighted_labeled
        if labeled is None:
            return 1 / self.shift, self.fisher / self.shift**2
        inverse = torch.cholesky_inverse(_cholesky(shifted(labeled, self.shift)))
        return inverse, symmetric(inverse @ self.fisher @ inverse)


def n_forward(n: int, n_instances: int, oversample: float) -> int:
    """Give the number of samples to take before the pruning: never more than there are."""
    # Less a trifle, because 1.1 * 10 is a little more than 11.
    return min(n, math.ceil(oversample * n_instances - 1e-9))


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
    lazy: bool = False,
    preselected: Sequence[int] | None = None,
    on_pick: Progress | None = None,
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
        ``skfishermask.selection.StoredEmbedding`` may lie elsewhere than in memory.
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
    lazy : bool, default=False
        Bring candidates up to date only when their last known gain would win: much less to read,
        and nearly always the same batch, but no guarantee.
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
    :doc:`/user_guide/selection`. Beside the embedding there are two (r, r) float64 matrices for
    each candidate, some times over, and a few (k, k) ones. Where n r is below k, all of it
    happens in n r dimensions instead of k.

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
    objective = Objective(
        n_instances, fisher, fisher_labeled, n_labeled, regularization, oversample
    )
    batch = find_batch(embedding, objective, lazy=lazy, preselected=forced, on_pick=on_pick)
    return batch.positions, batch.gains


@torch.no_grad()
def find_batch(
    embedding: StoredEmbedding,
    objective: Objective,
    *,
    lazy: bool = False,
    preselected: Sequence[int] = (),
    on_pick: Progress | None = None,
    on_prepared: Progress | None = None,
) -> Batch:
    """Do what `select_batch` does, unchecked, and say more about it.

    Parameters
    ----------
    embedding : StoredEmbedding of shape (n, r, k)
        Fisher embeddings.
    objective : Objective
        Its matrices in float64 and symmetric.
    lazy, preselected, on_pick
        As for `select_batch`.
    on_prepared : callable, optional
        Called with numbers of candidates whose first gains are known.
    """
    outside = 0.0
    if has_few_rows(embedding.shape):
        embedding, objective, outside = in_row_space(embedding, objective)
    inverse, target = objective.start()
    width = picks_a_round(embedding)
    pool = (LazyPool if lazy else LocalPool)(embedding, width)
    pool.candidates.start(inverse, target, on_prepared or (lambda count: None))
    del target
    return chosen_from(
        pool,
        inverse,
        objective,
        embedding.shape,
        picks_a_round=width,
        forced=preselected,
        on_pick=on_pick,
        outside=outside,
    )


def chosen_from(
    pool: Pool,
    inverse: Tensor | float,
    objective: Objective,
    shape: Sequence[int],
    *,
    picks_a_round: int,
    forced: Sequence[int] = (),
    on_pick: Progress | None = None,
    outside: float = 0.0,
) -> Batch:
    """Take samples greedily, then drop those that cost least.

    Parameters
    ----------
    pool : Pool
        The candidates, in the state that `objective` starts with.
    inverse : Tensor of shape (k, k), or float
        M_0^-1.
    objective : Objective
        What to choose by.
    shape : sequence of int
        (n, r, k).
    picks_a_round : int
        Picks that share one read of the pool.
    forced : sequence of int, default=()
        Positions to take first and never to drop.
    on_pick : callable, optional
        Called with the number of picks that are new since the last call; drops are not counted.
    outside : float, default=0.0
        tr(M^-1 F), outside of the dimensions that are worked in.
    """
    n, r, k = shape
    fisher, n_instances = objective.fisher, objective.n_instances
    information = Information(inverse, fisher)
    forward = n_forward(n, n_instances, objective.oversample)
    picks = choose(
        pool,
        information,
        forward,
        r,
        picks_a_round=picks_a_round,
        forced=forced,
        on_pick=on_pick or (lambda count: None),
    )
    trace = (inverse * fisher).sum() if isinstance(inverse, Tensor) else inverse * fisher.trace()
    before = float(trace) + outside
    positions, gains = picks.told()
    after = before - float(gains.sum())
    if forward > n_instances:
        dropped, costs = _dropped(
            pool, information, positions[len(forced) :], forward - n_instances
        )
        after += costs
        kept = [i for i, position in enumerate(positions) if position not in dropped]
        positions, gains = [positions[i] for i in kept], gains[kept]
    scale = objective.scale
    return Batch(
        torch.tensor(positions, device=fisher.device),
        gains.to(fisher.device) / scale,
        (before / scale, after / scale),
        k,
        getattr(pool, "n_read", -1),
    )


def _dropped(
    pool: Pool, information: Information, positions: Sequence[int], n_drops: int
) -> tuple[set[int], float]:
    """Find the samples whose removal costs least, one by one, and what they cost together."""
    # From the highest position down, so that of two equal samples the lower one stays.
    free = sorted(positions, reverse=True)
    negative = -information.dense()
    backward = Information(negative, information.fisher, sign=-1)
    # In float64 throughout, because I - A may come close to singular.
    rows = pool.rows(free)
    left = LocalPool(stored(rows), 1)
    left.candidates.fill(rows, backward.fresh(rows))
    found, gains = choose(left, backward, n_drops, rows.shape[1]).told()
    return {free[i] for i in found}, -float(gains.sum())


@torch.no_grad()
def gains_along(
    embedding: Tensor | StoredEmbedding, positions: Sequence[int], objective: Objective
) -> Tensor:
    """Give all candidates' gains before each of some picks.

    Parameters
    ----------
    embedding : Tensor or StoredEmbedding, of shape (n, r, k)
        Fisher embeddings.
    positions : sequence of int
        The picks.
    objective : Objective
        What they were chosen by.
    """
    embedding = stored(embedding)
    if has_few_rows(embedding.shape):
        embedding, objective, _ = in_row_space(embedding, objective)
    inverse, target = objective.start()
    information = Information(inverse, objective.fisher)
    pool = LocalPool(embedding, 1)
    pool.candidates.start(inverse, target)
    found = []
    for position in positions:
        short, _ = pool.shortlist(SHORTLIST, 1)
        best_of(short, information, wait=True)
        pool.keep([], short)
        taken = pool.candidates.taken
        found.append(pool.candidates.gains.masked_fill(taken, math.nan))
        pool.advance(give(pool, information, [position]))
    return torch.stack(found) / objective.scale


def picks_a_round(embedding: StoredEmbedding) -> int:
    """Say how many picks share one read of the embeddings; it changes no pick."""
    wanted = _FAR
    if embedding.device.type == "cpu" and not embedding.is_fetched:
        wanted = _LARGE if embedding.n_bytes > _CACHE_BYTES else _SMALL
    n, r, _ = embedding.shape
    states = int(_STATES_SHARE * free_bytes(embedding.device)) // state_bytes(n, r)
    return max(1, min(wanted, states - 1))


def has_few_rows(shape: Sequence[int]) -> bool:
    """Say whether embeddings of this shape have fewer rows than columns."""
    n, r, k = shape
    return n * r < k


def in_row_space(
    embedding: StoredEmbedding, objective: Objective
) -> tuple[StoredEmbedding, Objective, float]:
    """Give a problem of fewer rows than dimensions in as many dimensions as rows.

    With M_0 = L L^T and W = V L^-T, all that is chosen by depends on W W^T and
    W (L^-1 F L^-T) W^T. In an orthonormal basis of the span of W's rows these are those of the
    coordinates, exactly.

    Parameters
    ----------
    embedding : StoredEmbedding of shape (n, r, k)
        With n r below k.
    objective : Objective
        With k x k matrices.

    Returns
    -------
    embedding : StoredEmbedding of shape (n, r, n r)
        The coordinates, in float64 and in memory.
    objective : Objective
        With n r x n r matrices, M_0 the identity, of the same scale.
    outside : float
        The part of tr(M_0^-1 F) that no choice changes.
    """
    n, r, k = embedding.shape
    v = embedding.take(range(n)).double()
    check_finite(torch.linalg.vector_norm(v.flatten(1), dim=1), torch.arange(n, device=v.device))
    labeled, root = objective.weighted_labeled, math.sqrt(objective.shift)
    if labeled is None:
        rows, fisher = v / root, objective.fisher / objective.shift
    else:
        factor = _cholesky(shifted(labeled, objective.shift))
        rows = torch.linalg.solve_triangular(factor, v.flatten(0, 1).T, upper=False).T
        half = torch.linalg.solve_triangular(factor, objective.fisher, upper=False)
        fisher = symmetric(torch.linalg.solve_triangular(factor, half.T, upper=False))
    basis, triangle = torch.linalg.qr(rows.reshape(n * r, k).T)
    coordinates = equal_stay_equal(triangle.T.reshape(n, r, n * r), v)
    within = symmetric(basis.T @ fisher @ basis)
    reduced = Objective(
        objective.n_instances,
        within,
        None,
        objective.n_labeled,
        objective.scale,
        objective.oversample,
    )
    return stored(coordinates), reduced, float(fisher.trace() - within.trace())


def coordinates(embedding: StoredEmbedding, labeled: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Give candidates and labelled samples in coordinates of the space that their rows span.

    Parameters
    ----------
    embedding : StoredEmbedding of shape (n, r, k)
        Those of the candidates.
    labeled : Tensor of shape (n_labeled, r, k), or None
        Those of the labelled samples.
    """
    v = embedding.take(range(len(embedding))).double()
    rows = v if labeled is None else torch.cat([v, labeled.double()])
    found = row_coordinates(rows.flatten(0, 1)).unflatten(0, rows.shape[:2])
    mine = equal_stay_equal(found[: len(v)], v)
    return mine, None if labeled is None else found[len(v) :]


def equal_stay_equal(coordinates: Tensor, v: Tensor) -> Tensor:
    """Give candidates with equal embeddings v the same coordinates, to the last bit."""
    prints = fingerprints(v)
    if not repeated(prints).any():
        return coordinates.contiguous()
    _, kinds = torch.unique(prints, return_inverse=True)
    first = torch.full_like(kinds, len(v)).scatter_reduce(
        0, kinds, torch.arange(len(v), device=v.device), "amin"
    )
    same: Tensor = coordinates[first[kinds]]
    return same


def _cholesky(matrix: Tensor) -> Tensor:
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if failed:
        raise ValueError(
            "fisher_labeled must be positive semi-definite, but adding the regularization "
            "does not make it positive definite."
        )
    return factor


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
    sizes = torch.stack([fisher.abs().max(), (fisher - fisher.T).abs().max()])
    largest, asymmetry = sizes.tolist()
    if not math.isfinite(largest):
        raise ValueError(f"{name} must be finite, it holds NaN or infinity.")
    if asymmetry > _SYMMETRY * largest:
        raise ValueError(
            f"{name} must be symmetric, but differs from its transpose by up to "
            f"{asymmetry:.3g} with entries up to {largest:.3g}."
        )
    return symmetric(fisher)
