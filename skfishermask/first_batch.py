"""The first batch: it covers the inputs, before there are labels or a trained network."""

from __future__ import annotations

import time

import numpy as np
import skorch
import torch
from sklearn.base import clone

from skfishermask.coverage import coverage_problem
from skfishermask.coverage_batch import Coverage, CoveredShare, find_coverage, select_share
from skfishermask.data import (
    DaskSamples,
    Data,
    Estimator,
    NetSamples,
    ReadableNet,
    SampleRole,
    Unfitted,
    covered_predictions,
    first_sample,
    has_frozen_parameters,
    is_dask,
    n_rows,
    naming_samples,
    read_net,
    unit_inputs,
    unwrap_unfitted,
)
from skfishermask.fisher import in_one_length
from skfishermask.jacobian import seeded
from skfishermask.parameters import Settings, check_n_instances, draw_candidates
from skfishermask.progress import Progress


def first_batch(
    estimator: Estimator,
    X_pool: Data,
    n_instances: int,
    settings: Settings,
    X_labeled: Data = None,
) -> tuple[CoveredShare, dict[str, object]]:
    """Select samples that cover the inputs of the pool; return them, and ``query_info_``.

    The estimator, if any, is not fitted. Transformers of a pipeline in it are fitted to the pool; a
    skorch net gives its dataset, its iterator and its batch size, and a layer of it to cover is
    read as it is initialized. Those labelled are covered already. Raises ValueError if the pool is
    empty, `n_instances` is not between 1 and its length, or inputs are not finite real numbers of
    one length.
    """
    start = time.perf_counter()
    batch_size = settings.batch_size
    unwrapped = unwrap_unfitted(estimator)
    pool: NetSamples | DaskSamples
    net = _initialized(unwrapped, settings.coverage_inputs)
    if is_dask(X_pool):
        pool = DaskSamples(net, X_pool, unwrapped.of_chunks(), batch_size)
    else:
        pool = NetSamples(net, unwrapped.fit_transform(X_pool), SampleRole.POOL, batch_size)
    n_instances = check_n_instances(n_instances, len(pool))
    of_layer = _layer_reader(net, pool, settings.coverage_inputs)
    progress = Progress(settings.verbose > 0, torch.device("cpu"))
    rows = draw_candidates(len(pool), n_instances, settings.max_candidates, settings.rng)
    inputs = _inputs(pool, rows, of_layer, progress)
    labeled = inputs[:0]
    if X_labeled is not None and n_rows(X_labeled) > 0:
        with naming_samples(X_labeled, "X_labeled"):
            X = unwrapped.transform(X_labeled)
        known = NetSamples(net, X, SampleRole.LABELED, batch_size)
        labeled = _inputs(known, None, of_layer, progress)
        if labeled.shape[1] != inputs.shape[1]:
            raise ValueError(
                f"Expected samples like those of X_pool in X_labeled, of {inputs.shape[1]} numbers "
                f"each, found {labeled.shape[1]}."
            )
    weights = inputs.new_ones(len(inputs))
    problem = coverage_problem(inputs, labeled, weights, n_instances, settings.rng)
    covered = "inputs" if of_layer is None else of_layer[1].text
    batch = select_share(rows, *problem, covered, progress)
    info = {
        "seconds": {"total": time.perf_counter() - start},
        "n_candidates": len(rows),
        "n_labeled": len(labeled),
        "objective": batch.batch.objective,
        "coverage_share": 1.0,
        "coverage_inputs": covered,
    }
    return batch, info


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
        predictions = covered_predictions(coverage.layer, net.module, shown, **net.read_options)
        together = predictions.inputs
    if together is None:
        raise ValueError(
            f"A batch without a trained network covers the inputs of {samples.role.argument}, "
            "which must be real numbers of one length for each sample. Found others, such as "
            "integers (X.astype('float32'), if they are quantities) or sequences of several "
            "lengths. Otherwise label a batch drawn at random first."
        )
    return together
