"""The first batch: it covers the inputs, before there are labels or a trained network."""

from __future__ import annotations

import time
from typing import Literal

import numpy as np
import skorch
import torch
from sklearn.base import clone

from skfishermask.coverage import coverage_problem
from skfishermask.coverage_batch import Coverage, CoveredShare, find_coverage
from skfishermask.data import (
    CoverageInputs,
    DaskSamples,
    Data,
    Estimator,
    NetSamples,
    ReadableNet,
    SampleRole,
    Unfitted,
    first_sample,
    has_frozen_parameters,
    is_dask,
    n_rows,
    read_net,
    unit_inputs,
    unwrap_unfitted,
)
from skfishermask.fisher import in_one_length, predict
from skfishermask.jacobian import seeded
from skfishermask.parameters import check_n_instances, draw_candidates
from skfishermask.progress import Progress
from skfishermask.selection import select


def first_batch(
    estimator: Estimator,
    X_pool: Data,
    n_instances: int,
    rng: np.random.RandomState,
    *,
    X_labeled: Data = None,
    coverage_inputs: str = "auto",
    max_candidates: int | Literal["auto"] | None = "auto",
    batch_size: int | None = None,
    verbose: int = 0,
) -> tuple[CoveredShare, dict[str, object]]:
    """Select samples that cover the inputs of the pool, see :mod:`skfishermask.coverage`.

    Parameters
    ----------
    estimator : estimator or None
        Not fitted. The transformers of a pipeline in it are fitted to the pool; a skorch net in it
        gives its dataset, its iterator and its batch size, and its frozen layers.
    X_pool : array-like, dict or tuple of arrays, Dataset or dask.array of length N
        What to choose from.
    n_instances : int
        Number of samples to choose.
    rng : RandomState
        Draws candidates and landmarks of large pools.
    X_labeled : same kinds as `X_pool`, optional
        Samples that are covered already.
    coverage_inputs : str, default="auto"
        What is covered, see :class:`skfishermask.FisherMaskSampler`. A module of the network is
        read as it is initialized.
    max_candidates : int, None or "auto", default="auto"
        Samples of the pool to choose from, see :class:`skfishermask.FisherMaskSampler`.
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
    net = _initialized(unwrapped, coverage_inputs)
    if is_dask(X_pool):
        pool = DaskSamples(net, X_pool, unwrapped.of_chunks(), batch_size)
    else:
        pool = NetSamples(net, unwrapped.fit_transform(X_pool), SampleRole.POOL, batch_size)
    n_instances = check_n_instances(n_instances, len(pool))
    of_layer = _layer_reader(net, pool, coverage_inputs)
    progress = Progress(verbose > 0, torch.device("cpu"))
    rows = draw_candidates(len(pool), n_instances, max_candidates, rng)
    inputs = _inputs(pool, rows, of_layer, progress)
    labeled = inputs[:0]
    if X_labeled is not None and n_rows(X_labeled) > 0:
        X = unwrapped.transform(X_labeled)
        known = NetSamples(net, X, SampleRole.LABELED, batch_size)
        labeled = _inputs(known, None, of_layer, progress)
    weights = inputs.new_ones(len(inputs))
    embedding, problem = coverage_problem(inputs, labeled, weights, n_instances, rng)
    with progress.bar(n_instances, "Coverage", "pick") as bar:
        batch = select(embedding, problem, on_pick=bar.update)
    covered = "inputs" if of_layer is None else of_layer[1].text
    info = {
        "seconds": {"total": time.perf_counter() - start},
        "n_candidates": len(rows),
        "n_labeled": len(labeled),
        "objective": batch.objective,
        "coverage_share": 1.0,
        "coverage_inputs": covered,
    }
    return CoveredShare(rows, batch, embedding, problem, covered), info


def _initialized(unwrapped: Unfitted, coverage_inputs: str) -> skorch.NeuralNet:
    """Return the net, initialized where a layer of it is to be covered."""
    if not unwrapped.is_own:
        if coverage_inputs not in ("auto", "inputs"):
            raise ValueError(
                f"coverage_inputs={coverage_inputs!r} names a module of a network, found none: "
                "expected a skorch net as estimator, or 'inputs'."
            )
        return unwrapped.net
    if coverage_inputs == "inputs":
        return unwrapped.net
    with seeded(0):
        net = clone(unwrapped.net).initialize()
    is_covered = coverage_inputs != "auto" or has_frozen_parameters(net.module_)
    return net if is_covered else unwrapped.net


def _layer_reader(
    net: skorch.NeuralNet, pool: NetSamples | DaskSamples, coverage_inputs: str
) -> tuple[ReadableNet, Coverage] | None:
    """Return what reads a layer, and which; None where the inputs are covered."""
    if not getattr(net, "initialized_", False):
        return None
    first = first_sample(pool)
    readable, _ = read_net(net, first, None)
    coverage = find_coverage(readable, first, 1.0, coverage_inputs)
    return None if coverage is None or coverage.layer is None else (readable, coverage)


def _inputs(
    samples: NetSamples | DaskSamples,
    rows: np.ndarray | None,
    of_layer: tuple[ReadableNet, Coverage] | None,
    progress: Progress,
) -> torch.Tensor:
    """Return what is covered of some samples, flat and of unit length, (n, d)."""
    if isinstance(samples, NetSamples):  # Chunks are checked when they are computed.
        samples.check_finite()
    batches = samples.batches(rows)
    shown = progress.each(batches, len(batches), "Inputs")
    if of_layer is None:
        together = in_one_length([unit_inputs(batch) for batch in shown])
    else:
        net, coverage = of_layer
        with CoverageInputs(net.module, coverage.layer) as inputs:
            together = predict(net.module, shown, inputs=inputs, **net.read_options).inputs
    if together is None:
        raise ValueError(
            f"A batch without a trained network covers the inputs of {samples.role.argument}, "
            "which must be real numbers of one length for each sample. Found others, such as "
            "integers (X.astype('float32'), if they are quantities) or sequences of several "
            "lengths. Otherwise label a batch drawn at random first."
        )
    return together
