"""Selection of a batch that makes tr(M^-1 F) small: checks, forward selection, pruning."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from skfishermask.selection.greedy import (
    SHORTLIST_PER_PICK,
    CandidatePool,
    InverseFisher,
    best_candidate,
    force_picks,
    greedy_select,
)
from skfishermask.selection.local_pool import LocalCandidatePool
from skfishermask.selection.problem import SelectionProblem
from skfishermask.selection.storage import StoredEmbedding, free_bytes, state_bytes, stored
from skfishermask.selection.threads import in_one_thread
from skfishermask.selection.validation import (
    check_count,
    check_embedding,
    check_fisher,
    check_preselected,
)

# Picks that share one read of the embeddings where that waits for a file or a device,
_PICKS_PER_FETCH = 8
# and where they are in memory: calls cost as much as the reading.
_PICKS_PER_READ = 4
# Embeddings and matrices of at most this size together may be in a processor's cache; the
# operations of a pick on them are so small that one thread is faster than several on a machine with
# other work.
_CACHE_BYTES = 2**26
# Share of the free memory that the states after attempted picks may take.
_STATES_SHARE = 0.25

Progress = Callable[[int], object]


@dataclass(frozen=True)
class Batch:
    """A selected batch."""

    positions: Tensor  # (n_instances,), int64, in the order of the picks
    gains: Tensor  # (n_instances,), float64: decrease of the objective by each pick
    objective: tuple[float, float]  # tr(M^-1 F) before the batch and after it
    dimensions: int  # number of columns of the embeddings
    n_read: int  # number of embeddings read for updates


def n_forward(n: int, n_instances: int, oversample: float) -> int:
    """Return the number of samples to pick before the pruning, at most n."""
    # Without the small number 1.1 * 10 would be rounded up to 12.
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
    preselected: Sequence[int] | None = None,
    on_pick: Progress | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Select a batch that makes :math:`\mathrm{tr}(M^{-1} F)` small.

    Greedy, starting from
    :math:`M_0 = \lambda I + \frac{n_L}{n_L + K} F_L`: the sample with the largest

    .. math::

        \mathrm{gain} = \mathrm{tr}\big(
            V M^{-1} F M^{-1} V^\top (I + V M^{-1} V^\top)^{-1} \big)

    is picked, :math:`M \leftarrow M + V^\top V`, and again, where V is the sample's embedding
    times :math:`\sqrt{K / (n_L + K)}`. With `oversample` above 1 more samples than needed
    are picked, and then the samples with the least costly removals are dropped one by one. Exact
    to rounding: gains that float32 cannot tell apart are compared in float64.

    Parameters
    ----------
    embedding : Tensor of shape (n, r, k), floating point
        Fisher embeddings of the n candidates: V^T V is a candidate's Fisher information. A
        ``skfishermask.selection.StoredEmbedding`` may lie elsewhere than in memory.
    n_instances : int
        Number of samples to select, K, from 1 to n.
    fisher : Tensor of shape (k, k), floating point
        F, the Fisher information to cover, symmetric and positive semi-definite.
    fisher_labeled : Tensor of shape (k, k), floating point, optional
        F_L, the mean Fisher information of the labelled samples; None leaves it out.
    n_labeled : int, default=0
        Number of labelled samples, n_L.
    regularization : float, default=1.0
        :math:`\lambda`, above 0.
    oversample : float, default=1.0
        Samples picked before the pruning, as a multiple of K; rounded up, at most n.
    preselected : sequence of int, optional
        Positions that are in the batch independent of their gains: picked first, in this order,
        and never dropped.
    on_pick : callable, optional
        Called with the number of picks since the last call, for progress.

    Returns
    -------
    positions : Tensor of shape (n_instances,), int64
        The selected samples in the order of the picks; among equals the lower position.
    gains : Tensor of shape (n_instances,), float64
        The decrease of the objective by each pick.

    Raises
    ------
    TypeError
        If an argument that is to be a tensor is none, or has no floating point dtype.
    ValueError
        If a shape, a number or a position is out of range, the embedding holds NaN or
        infinity, or a Fisher matrix is not finite, symmetric and positive semi-definite.

    Notes
    -----
    A pick costs one product of the embeddings with a (k, 2 r) matrix; the formulas are in
    :doc:`/user_guide/selection`. Beside the embedding memory holds two (r, r) float64 matrices
    for each candidate, in two or more states, and a few (k, k) ones.

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
    check_embedding(embedding)
    embedding = stored(embedding)
    n, _, k = embedding.shape
    n_instances = check_count("n_instances", n_instances, 1, n)
    n_labeled = check_count("n_labeled", n_labeled, 0, None)
    if not 0 < regularization < math.inf:
        raise ValueError(f"regularization must be above 0 and finite, got {regularization!r}.")
    if not 1 <= oversample < math.inf:
        raise ValueError(f"oversample must be at least 1 and finite, got {oversample!r}.")
    preselected = check_preselected(preselected, n_instances, n)
    fisher = check_fisher("fisher", fisher, k, embedding.device)
    if fisher_labeled is not None:
        fisher_labeled = check_fisher("fisher_labeled", fisher_labeled, k, embedding.device)
    problem = SelectionProblem(
        n_instances, fisher, fisher_labeled, n_labeled, regularization, oversample
    )
    batch = select(embedding, problem, preselected=preselected, on_pick=on_pick)
    return batch.positions, batch.gains


@torch.no_grad()
def select(
    embedding: StoredEmbedding,
    problem: SelectionProblem,
    *,
    preselected: Sequence[int] = (),
    on_pick: Progress | None = None,
    on_prepared: Progress | None = None,
) -> Batch:
    """Select a batch like `select_batch`, without checks, and return more about it.

    The problem has symmetric float64 matrices. `on_prepared` is called with the number of
    candidates in each chunk with its first gains computed.
    """
    inverse, target = problem.start()
    picks_per_round = choose_picks_per_round(embedding)
    pool = LocalCandidatePool(embedding, picks_per_round)
    pool.candidates.initialize(inverse, target, on_prepared or (lambda count: None))
    del target

    def run() -> Batch:
        return select_and_prune(
            pool,
            inverse,
            problem,
            embedding.shape,
            picks_per_round=picks_per_round,
            preselected=preselected,
            on_pick=on_pick,
        )

    of_inverse = inverse.nbytes if isinstance(inverse, Tensor) else 0
    n_bytes = embedding.n_bytes + problem.fisher.nbytes + of_inverse
    on_host = embedding.device.type == "cpu"
    return in_one_thread(run) if on_host and n_bytes <= _CACHE_BYTES else run()


def select_and_prune(
    pool: CandidatePool,
    inverse: Tensor | float,
    problem: SelectionProblem,
    shape: Sequence[int],
    *,
    picks_per_round: int,
    preselected: Sequence[int] = (),
    on_pick: Progress | None = None,
) -> Batch:
    """Pick samples greedily, then drop those with the least costly removals.

    The pool, of `shape` (n, r, k), is in the state that `problem` starts with, M_0^-1 is `inverse`,
    and `picks_per_round` picks share one read of the pool. Those `preselected` are picked first and
    never dropped. `on_pick` is called with the number of picks since the last call.
    """
    n, r, k = shape
    fisher, n_instances = problem.fisher, problem.n_instances
    inverse_fisher = InverseFisher(inverse, fisher)
    forward = n_forward(n, n_instances, problem.oversample)
    positions, gains = greedy_select(
        pool,
        inverse_fisher,
        forward,
        r,
        picks_per_round=picks_per_round,
        preselected=preselected,
        on_pick=on_pick or (lambda count: None),
    )
    trace = (inverse * fisher).sum() if isinstance(inverse, Tensor) else inverse * fisher.trace()
    before = float(trace)
    after = before - float(gains.sum())
    if forward > n_instances:
        dropped, costs = _prune(
            pool, inverse_fisher, positions[len(preselected) :], forward - n_instances
        )
        after += costs
        kept = [i for i, position in enumerate(positions) if position not in dropped]
        positions, gains = [positions[i] for i in kept], gains[kept]
    scale = problem.scale
    return Batch(
        torch.tensor(positions, device=fisher.device),
        gains.to(fisher.device) / scale,
        (before / scale, after / scale),
        k,
        pool.n_read,
    )


def _prune(
    pool: CandidatePool, inverse_fisher: InverseFisher, positions: Sequence[int], n_drops: int
) -> tuple[set[int], float]:
    """Return the positions with the least costly removals, one by one, and the sum of the costs."""
    # From the highest position down, so that of two equal samples the lower one stays.
    descending = sorted(positions, reverse=True)
    negative = inverse_fisher.to_dense().neg_()
    backward = InverseFisher(negative, inverse_fisher.fisher, sign=-1)
    # In float64 throughout, because I - A may come close to singular.
    rows = pool.rows(descending)
    picked = LocalCandidatePool(stored(rows), 1)
    picked.candidates.norms = torch.linalg.vector_norm(rows.flatten(1), dim=1)
    everyone = torch.arange(len(rows), device=rows.device)
    for index in everyone.split(picked.candidates.embedding.chunk_rows):
        picked.candidates.set_exact(index, backward.exact_gains(rows[index]))
    dropped, gains = greedy_select(picked, backward, n_drops, rows.shape[1])
    return {descending[i] for i in dropped}, -float(gains.sum())


@torch.no_grad()
def gains_before_picks(
    embedding: Tensor | StoredEmbedding, positions: Sequence[int], problem: SelectionProblem
) -> Tensor:
    """Compute the gains of all candidates before each of the picks at `positions`, (picks, n)."""
    embedding = stored(embedding)
    inverse, target = problem.start()
    inverse_fisher = InverseFisher(inverse, problem.fisher)
    pool = LocalCandidatePool(embedding, 1)
    pool.candidates.initialize(inverse, target)
    gains = []
    for position in positions:
        shortlist, _ = pool.shortlist(SHORTLIST_PER_PICK, 1)
        # Its exact gains are kept by the commit.
        best_candidate(shortlist, inverse_fisher, may_wait=True)
        pool.commit([], shortlist)
        taken = pool.candidates.taken
        gains.append(pool.candidates.gains.masked_fill(taken, math.nan))
        pool.apply(force_picks(pool, inverse_fisher, [position]))
    return torch.stack(gains) / problem.scale


def choose_picks_per_round(embedding: StoredEmbedding) -> int:
    """Return the number of picks that share one read of the embeddings; it changes no pick."""
    wanted = _PICKS_PER_FETCH
    if embedding.device.type == "cpu" and not embedding.is_fetched:
        wanted = _PICKS_PER_READ
    n, r, _ = embedding.shape
    states = int(_STATES_SHARE * free_bytes(embedding.device)) // state_bytes(n, r)
    return max(1, min(wanted, states - 1))
