"""The first batch: it covers the inputs, before there are labels or a trained network."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch

from skfishermask.coverage import select_by_coverage
from skfishermask.data import (
    Data,
    DaskSamples,
    Estimator,
    NetSamples,
    SampleRole,
    UnitInputs,
    is_dask,
    unwrap_unfitted,
)
from skfishermask.parameters import Settings
from skfishermask.progress import Progress
from skfishermask.query import check_n_instances

# Candidates that are covered, at most; a random subset of larger pools.
_N_CANDIDATES = 20_000


@dataclass(frozen=True)
class FirstBatch:
    """A first batch.

    Attributes
    ----------
    indices : ndarray of shape (n_instances,), int64
        Rows of the pool in the order chosen.
    gains : ndarray of shape (n_instances,), float64
        Decrease of the mean posterior variance when each was chosen.
    info : dict
        As ``query_info_`` of :class:`skfishermask.FisherMaskSampler`.
    """

    indices: np.ndarray
    gains: np.ndarray
    info: dict[str, object]


def first_batch(
    settings: Settings,
    estimator: Estimator,
    X_pool: Data,
    n_instances: int,
    X_labeled: Data = None,
) -> FirstBatch:
    """Select samples that cover the inputs of the pool, see :mod:`skfishermask.coverage`.

    Parameters
    ----------
    settings : Settings
        The parameters; those of the mask and the embedding do not matter.
    estimator : estimator or None
        Not fitted. The transformers of a pipeline in it are fitted to the pool; a skorch net in it
        gives its dataset, its iterator and its batch size.
    X_pool : array-like, dict or tuple of arrays, Dataset or dask.array of length N
        What to choose from.
    n_instances : int
        Number of samples to choose.
    X_labeled : same kinds as `X_pool`, optional
        Samples that are covered already.

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
        pool = DaskSamples(unwrapped.net, X_pool, unwrapped.transform, settings.batch_size)
    else:
        X = unwrapped.fit_transform(X_pool)
        pool = NetSamples(unwrapped.net, X, SampleRole.POOL, settings.batch_size)
    n_instances = check_n_instances(n_instances, len(pool))
    progress = Progress(settings.verbose > 0, torch.device("cpu"))
    rows = np.arange(len(pool))
    n_candidates = max(n_instances, settings.max_candidates or _N_CANDIDATES)
    if len(rows) > n_candidates:
        rows = np.sort(settings.rng.choice(len(rows), n_candidates, replace=False))
    inputs = _unit_inputs(pool, rows, progress)
    labeled = inputs[:0]
    if X_labeled is not None:
        samples = NetSamples(
            unwrapped.net, unwrapped.transform(X_labeled), SampleRole.LABELED, settings.batch_size
        )
        labeled = _unit_inputs(samples, None, progress)
    with progress.bar(n_instances, "Coverage", "pick") as bar:
        batch = select_by_coverage(
            inputs,
            labeled,
            inputs.new_ones(len(inputs)),
            n_instances,
            settings.rng,
            on_pick=bar.update,
        )
    info = {
        "seconds": {"total": time.perf_counter() - start},
        "n_candidates": len(rows),
        "n_labeled": len(labeled),
        "objective": batch.objective,
        "coverage_share": 1.0,
    }
    return FirstBatch(rows[batch.positions.numpy(force=True)], batch.gains.numpy(force=True), info)


def _unit_inputs(
    samples: NetSamples | DaskSamples, rows: np.ndarray | None, progress: Progress
) -> torch.Tensor:
    samples.check_finite()
    inputs = UnitInputs(samples.batches(rows))
    for _ in progress.each(inputs, len(inputs), "Inputs"):
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
