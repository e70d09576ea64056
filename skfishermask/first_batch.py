"""The first batch: it covers the inputs, before there are labels or a trained network."""

from __future__ import annotations

import time

import numpy as np
import torch

from skfishermask.coverage import coverage_problem
from skfishermask.coverage_batch import CoveredShare
from skfishermask.data import (
    DaskSamples,
    Data,
    Estimator,
    NetSamples,
    SampleRole,
    UnitInputs,
    is_dask,
    unwrap_unfitted,
)
from skfishermask.parameters import check_n_instances
from skfishermask.progress import Progress
from skfishermask.selection import select

# Candidates that are covered, at most; a random subset of larger pools.
_N_CANDIDATES = 20_000


def first_batch(
    estimator: Estimator,
    X_pool: Data,
    n_instances: int,
    rng: np.random.RandomState,
    *,
    X_labeled: Data = None,
    max_candidates: int | None = None,
    batch_size: int | None = None,
    verbose: int = 0,
) -> tuple[CoveredShare, dict[str, object]]:
    """Select samples that cover the inputs of the pool, see :mod:`skfishermask.coverage`.

    Parameters
    ----------
    estimator : estimator or None
        Not fitted. The transformers of a pipeline in it are fitted to the pool; a skorch net in it
        gives its dataset, its iterator and its batch size.
    X_pool : array-like, dict or tuple of arrays, Dataset or dask.array of length N
        What to choose from.
    n_instances : int
        Number of samples to choose.
    rng : RandomState
        Draws candidates and landmarks of large pools.
    X_labeled : same kinds as `X_pool`, optional
        Samples that are covered already.
    max_candidates : int or None, default=None
        Samples of the pool to choose from, drawn at random; None: 20,000.
    batch_size : int or None, default=None
        Samples that are read at a time; None: the net's own.
    verbose : int, default=0
        1 shows progress bars.

    Returns
    -------
    batch : CoveredShare
        All of the batch.
    info : dict
        As ``query_info_`` of :class:`skfishermask.FisherMaskSampler`.

    Raises
    ------
    ValueError
        If the pool is empty, `n_instances` is not between 1 and its length, or inputs are not
        finite real numbers of one length.
    """
    start = time.perf_counter()
    unwrapped = unwrap_unfitted(estimator)
    pool: NetSamples | DaskSamples
    if is_dask(X_pool):
        pool = DaskSamples(unwrapped.net, X_pool, unwrapped.of_chunks(), batch_size)
    else:
        X = unwrapped.fit_transform(X_pool)
        pool = NetSamples(unwrapped.net, X, SampleRole.POOL, batch_size)
    n_instances = check_n_instances(n_instances, len(pool))
    progress = Progress(verbose > 0, torch.device("cpu"))
    rows = np.arange(len(pool))
    n_candidates = max(n_instances, max_candidates or _N_CANDIDATES)
    if len(rows) > n_candidates:
        rows = np.sort(rng.choice(len(rows), n_candidates, replace=False))
    inputs = _unit_inputs(pool, rows, progress)
    labeled = inputs[:0]
    if X_labeled is not None:
        X = unwrapped.transform(X_labeled)
        labeled = _unit_inputs(
            NetSamples(unwrapped.net, X, SampleRole.LABELED, batch_size), None, progress
        )
    weights = inputs.new_ones(len(inputs))
    embedding, problem = coverage_problem(inputs, labeled, weights, n_instances, rng)
    with progress.bar(n_instances, "Coverage", "pick") as bar:
        batch = select(embedding, problem, on_pick=bar.update)
    info = {
        "seconds": {"total": time.perf_counter() - start},
        "n_candidates": len(rows),
        "n_labeled": len(labeled),
        "objective": batch.objective,
        "coverage_share": 1.0,
    }
    return CoveredShare(rows, batch, embedding, problem), info


def _unit_inputs(
    samples: NetSamples | DaskSamples, rows: np.ndarray | None, progress: Progress
) -> torch.Tensor:
    if isinstance(samples, NetSamples):  # Chunks are checked when they are computed.
        samples.check_finite()
    batches = samples.batches(rows)
    inputs = UnitInputs(batches)
    for _ in progress.each(inputs, len(batches), "Inputs"):
        pass
    together = inputs.together()
    if together is None:
        raise ValueError(
            f"A batch without a trained network covers the inputs of {samples.role.argument}, "
            "which must be real numbers of one length for each sample. Found others, such as "
            "integers (X.astype('float32'), if they are quantities) or sequences of several "
            "lengths. Otherwise label a batch drawn at random first."
        )
    return together
