"""One query: the steps of the method, told once, over a pool that is here or on a cluster."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass, replace
from numbers import Integral, Real

import numpy as np
import skorch
import torch
from torch import Tensor

from skfishermask.compat import client_that_computes
from skfishermask.coverage_batch import CoveredShare, cover_share, find_coverage
from skfishermask.data import (
    DaskSamples,
    Data,
    Estimator,
    NetSamples,
    SampleRole,
    Source,
    Unwrapped,
    check_as_predicted,
    first_sample,
    has_rows,
    is_dask,
    likelihood_of,
    n_rows,
    naming_samples,
    read_net,
    residual_variance,
)
from skfishermask.first_batch import first_batch
from skfishermask.fisher import (
    MASK_STRATEGIES,
    Gaussian,
    ParameterMask,
    direction_norms,
    directions_that_keep,
    largest_rank,
)
from skfishermask.jacobian import output_layer, same_grad_mode, trainable_parameters
from skfishermask.parameters import Settings, check_n_instances, draw_candidates
from skfishermask.placement import Placement
from skfishermask.pool import Embedded, LocalPool, LocalSamples, Pool
from skfishermask.progress import Progress
from skfishermask.selection import Batch, SelectionProblem

# Rows of V(x) by default: the share of the trace that they keep, and their number at most.
_KEPT_TRACE, _MOST_DIRECTIONS = 0.95, 16
# Rows that rank the parameters by default: of 9, three keep 99.9% of what the batch gains.
_RANKING_DIRECTIONS = 3
# Rows of several sets of samples.
Sample = list[tuple[LocalSamples | Pool, np.ndarray]]


@dataclass(frozen=True)
class Result:
    """What a query found."""

    indices: np.ndarray  # rows of the pool in the order chosen, int64
    gains: np.ndarray  # decrease of the objective when each was chosen, float64
    mask: ParameterMask | None  # None where coverage alone chose the batch
    diagonal: dict[str, Tensor] | None  # where the mask looks at it
    info: dict[str, object]  # as ``query_info_`` of :class:`skfishermask.FisherMaskSampler`
    # Gains of all samples before each choice, (n_instances, n_pool), where they were asked for; NaN
    # for those chosen before or not embedded.
    utilities: np.ndarray | None


def run_query(
    unwrapped: Unwrapped,
    X_pool: Data,
    n_instances: int,
    settings: Settings,
    X_labeled: Data = None,
    X_target: Data = None,
    *,
    wants_utilities: bool = False,
) -> Result:
    """Choose a batch with a fitted net.

    Without `X_labeled` the labelled samples are those of the learner, if it has any; an empty one
    stands for none.
    """
    net, transform = unwrapped.net, unwrapped.transform
    if X_labeled is None:
        inputs = unwrapped.training_inputs
    elif has_rows(X_labeled) and n_rows(X_labeled) == 0:
        inputs = None
    else:
        with naming_samples(X_labeled, "X_labeled"):
            inputs = transform(_in_memory(X_labeled))
    with naming_samples(X_target, "X_target"):
        aims = None if X_target is None else transform(_in_memory(X_target))
    labeled, target = (
        None if X is None else NetSamples(net, X, role, settings.batch_size)
        for X, role in ((inputs, SampleRole.LABELED), (aims, SampleRole.TARGET))
    )
    pool: Source
    if is_dask(X_pool):
        pool = DaskSamples(net, X_pool, transform, settings.batch_size)
    else:
        with naming_samples(X_pool, "X_pool"):
            inputs_of_pool = transform(X_pool)
        pool = NetSamples(net, inputs_of_pool, SampleRole.POOL, settings.batch_size)
    query = Query(
        settings,
        net,
        pool,
        n_instances,
        labeled=labeled,
        target=target,
        variance=_residual_variance(unwrapped, settings),
    )
    return query.run(wants_utilities=wants_utilities)


def _in_memory(X: Data) -> Data:
    return np.asarray(X) if is_dask(X) else X


def _residual_variance(unwrapped: Unwrapped, settings: Settings) -> float | None:
    """Return that of the learner's own labels, where they are numbers."""
    net, y = unwrapped.net, unwrapped.y_training
    if unwrapped.variance is not None or y is None:
        return unwrapped.variance
    if not isinstance(likelihood_of(net, settings.likelihood), Gaussian):
        return None
    return residual_variance(y, net.predict(unwrapped.transform(unwrapped.X_training)))


def run_first_batch(
    estimator: Estimator,
    X_pool: Data,
    n_instances: int,
    settings: Settings,
    X_labeled: Data = None,
    X_target: Data = None,
    *,
    wants_utilities: bool = False,
) -> Result:
    """Choose a first batch, which covers the inputs: without labels or a fitted net."""
    if X_target is not None:
        raise ValueError(
            "X_target needs a fitted network: a first batch covers the pool without one."
        )
    batch, info = first_batch(estimator, X_pool, n_instances, settings, X_labeled)
    utilities = batch.utilities(len(X_pool)) if wants_utilities else None
    return Result(batch.indices, batch.gains, None, None, info, utilities)


class Query:
    """One query: the fitted net, the samples that it sees, and the steps of the method.

    The `target` are samples on which the network is to do well. The `variance` is that of labels
    that are numbers, about their mean, where the likelihood leaves it open.
    """

    def __init__(
        self,
        settings: Settings,
        net: skorch.NeuralNet,
        pool: Source,
        n_instances: int,
        *,
        labeled: NetSamples | None,
        target: NetSamples | None,
        variance: float | None,
    ) -> None:
        self._settings = settings
        self._n_instances = check_n_instances(n_instances, len(pool))
        if target is not None and len(target) == 0:
            raise ValueError("Expected X_target with at least one sample, found an empty one.")
        others = [samples for samples in (labeled, target) if samples]
        _check_samples(pool, others)
        self._rows = draw_candidates(
            len(pool), self._n_instances, settings.max_candidates, settings.rng
        )
        self._start = time.perf_counter()
        # That of the cluster that reads the pool's chunks; None: this process reads them.
        client = client_that_computes(pool.array) if isinstance(pool, DaskSamples) else None
        cluster = None
        if client is not None:
            from skfishermask.cluster import Cluster

            cluster = Cluster(client)
        self._first = first_sample(pool)
        self._net, self._outputs = read_net(
            net, self._first, settings.to_logits, settings.likelihood
        )
        likelihood = self._net.likelihood
        is_open = isinstance(settings.likelihood, str) and type(likelihood) is Gaussian
        if is_open and variance is not None:
            likelihood = Gaussian(variance)
        self._net = replace(self._net, likelihood=likelihood.of_samples_like(self._outputs))
        self._progress = Progress(settings.verbose > 0, self._net.device)
        for samples in others:
            self._net.outputs_of(first_sample(samples), samples.role)
        for source in (pool, *others):
            check_as_predicted(self._net, source)
        self._labeled = self._here(labeled)
        self._target = self._here(target)
        how = settings, self._progress
        self._pool: Pool
        if cluster is None or isinstance(pool, NetSamples):
            self._pool = LocalPool(self._net, pool, *how)
        else:
            from skfishermask.cluster import ClusterPool

            self._pool = ClusterPool(self._net, pool, *how, cluster)

    def _here(self, samples: NetSamples | None) -> LocalSamples | None:
        if not samples:
            return None
        return LocalSamples(self._net, samples, self._settings, self._progress)

    def run(self, *, wants_utilities: bool = False) -> Result:
        """Go through the steps, and again through the choices if utilities are wanted."""
        with same_grad_mode(), self._pool:
            return self._run(wants_utilities)

    def _run(self, wants_utilities: bool) -> Result:
        pool = self._pool
        rows = self._rows
        coverage = self._coverage(rows)
        if coverage is not None and len(coverage.indices) == self._n_instances:
            # Without gradients.
            entries = {"coverage_share": 1.0, "coverage_inputs": coverage.covered}
            info = self._info(coverage.rows, coverage.batch, entries)
            utilities = coverage.utilities(len(pool)) if wants_utilities else None
            return Result(coverage.indices, coverage.gains, None, None, info, utilities)
        sample = self._mask_sample()
        r = self._n_directions(sample, rows)
        trainable = trainable_parameters(self._net.module)
        layer = output_layer(self._net.module, self._first, to_outputs=self._net.to_logits)
        output = [name for name in layer if name in trainable]
        k = self._known_mask_size(output)
        # Before the diagonal, which takes long, where the size is known by then.
        names = {*(output if self._settings.mask == "output_layer" else trainable)}
        placement = None if k is None else self._place(len(rows), r, k, names)
        with self._progress.step("diagonal"):
            mask, diagonal = self._make_mask(output, sample, r)
        if placement is None or placement.estimate.k != len(mask) or {*mask.indices} != names:
            placement = self._place(len(rows), r, len(mask), {*mask.indices})
        self._progress.tell(f"{placement.estimate} ({placement.storage_name})")
        embedded = pool.embed(rows, mask, self._others, wants_fisher=self._aims_at_pool)
        problem = self._problem(embedded, len(rows))
        with self._progress.step("selection"):
            covered = [] if coverage is None else np.searchsorted(rows, coverage.indices).tolist()
            batch = pool.select(problem, covered)
        before, after = batch.objective
        outside = self._outside(len(mask) - embedded.dimensions)
        entries = {
            "n_directions": r,
            "mask_size": len(mask),
            "embedding_bytes": placement.estimate.embedding_bytes,
            "embedding_storage": placement.storage_name,
            "objective": (before + outside, after + outside),
            "coverage_share": len(covered) / self._n_instances,
            "coverage_inputs": None if coverage is None else coverage.covered,
        }
        info = self._info(rows, batch, entries)
        utilities = self._utilities(rows, batch, problem) if wants_utilities else None
        indices, gains = rows[batch.positions.cpu().numpy()], batch.gains.cpu().numpy()
        return Result(indices, gains, mask, diagonal, info, utilities)

    def _info(
        self, rows: np.ndarray, batch: Batch, entries: dict[str, object]
    ) -> dict[str, object]:
        return {
            "seconds": self._progress.seconds | {"total": time.perf_counter() - self._start},
            "n_candidates": len(rows),
            "n_labeled": self._n_labeled,
            "dimensions": batch.dimensions,
            "objective": batch.objective,
            "candidates_read": batch.n_read,
            **entries,
            **self._pool.info(),
        }

    @property
    def _n_labeled(self) -> int:
        return 0 if self._labeled is None else len(self._labeled)

    @property
    def _others(self) -> list[LocalSamples]:
        return [samples for samples in (self._labeled, self._target) if samples is not None]

    @property
    def _aims_at_pool(self) -> bool:
        return self._target is None and self._settings.target == "pool"

    def _mask_sample(self) -> Sample:
        """Draw samples for the diagonal: rows of the labelled ones, and of the pool."""
        n_labeled = self._n_labeled
        n = n_labeled + len(self._pool)
        wanted = min(self._settings.n_mask_samples or n, n)
        drawn = np.sort(self._settings.rng.choice(n, wanted, replace=False))
        of_pool = drawn[drawn >= n_labeled] - n_labeled
        sample: Sample = [(self._pool, of_pool)]
        if self._labeled is not None:
            sample.insert(0, (self._labeled, drawn[drawn < n_labeled]))
        return [(samples, rows) for samples, rows in sample if len(rows)]

    def _n_directions(self, sample: Sample, candidates: np.ndarray) -> int:
        rank = self._net.likelihood.rank(self._outputs)
        has_positions = self._outputs.dim() > 2
        wanted, most = self._settings.n_directions, None
        if wanted == "auto":
            most = _MOST_DIRECTIONS
            wanted = _KEPT_TRACE if self._net.likelihood.is_ordered(self._outputs) else most
        if isinstance(wanted, Real) and not isinstance(wanted, Integral):
            norms = [
                n for samples, rows in sample for n in samples.predicted(direction_norms, rows)
            ]
            wanted = directions_that_keep(torch.stack(norms).sum(0), float(wanted))
        if wanted is None:
            return self._largest_rank(sample, candidates) if has_positions else rank
        wanted = int(wanted) if most is None else min(int(wanted), most)
        # The rank of the first sample's positions may be that of a short sequence.
        return wanted if has_positions else min(wanted, rank)

    def _largest_rank(self, sample: Sample, candidates: np.ndarray) -> int:
        """Return the number of directions of the longest sequence that is to be read."""
        of_pool = [candidates, *(rows for samples, rows in sample if samples is self._pool)]
        ranks = self._pool.predicted(largest_rank, np.unique(np.concatenate(of_pool)))
        for samples in self._others:
            ranks += samples.predicted(largest_rank, None)
        return max(ranks)

    def _make_mask(
        self,
        output: list[str],
        sample: Sample,
        r: int,
    ) -> tuple[ParameterMask, dict[str, Tensor] | None]:
        settings, of_samples = self._settings, None
        if MASK_STRATEGIES[settings.mask].uses_diagonal:
            if settings.n_directions == "auto":
                r = min(r, _RANKING_DIRECTIONS)
            diagonal = of_samples = _mean_diagonal(
                [(len(rows), samples.diagonal(rows, r)) for samples, rows in sample]
            )
        else:
            parameters = trainable_parameters(self._net.module)
            diagonal = {name: torch.zeros(p.shape) for name, p in parameters.items()}
        mask = ParameterMask.from_diagonal(
            diagonal,
            settings.mask,
            settings.mask_fraction,
            output_layer=output,
            random_state=settings.rng,
        )
        return mask, of_samples

    def _known_mask_size(self, output: list[str]) -> int | None:
        known_size = MASK_STRATEGIES[self._settings.mask].known_size
        if known_size is None:
            return None
        sizes = {name: p.numel() for name, p in trainable_parameters(self._net.module).items()}
        n_output = sum(sizes[name] for name in output)
        return known_size(self._settings.mask_fraction, sum(sizes.values()), n_output)

    def _place(self, n: int, r: int, k: int, names: Collection[str]) -> Placement:
        return self._pool.place(n, r, k, sum(map(len, self._others)), names)

    def _problem(self, embedded: Embedded, n: int) -> SelectionProblem:
        """Return the problem that the batch solves."""
        settings, others = self._settings, list(embedded.others)
        labeled = others.pop(0) if self._labeled is not None else None
        if self._target is not None:
            fisher = others.pop(0)
        elif embedded.fisher is None:
            fisher = torch.eye(embedded.dimensions, dtype=torch.float64, device=self._net.device)
        elif labeled is None:
            fisher = embedded.fisher
        else:
            n_labeled = self._n_labeled
            # In place: it may be as large as all else together.
            fisher = embedded.fisher.mul_(n).add_(labeled, alpha=n_labeled).div_(n + n_labeled)
        return SelectionProblem(
            self._n_instances,
            fisher,
            fisher_labeled=labeled if settings.use_labeled else None,
            n_labeled=self._n_labeled if settings.use_labeled else 0,
            regularization=settings.regularization,
            oversample=settings.oversample,
        )

    def _outside(self, n_dimensions: int) -> float:
        """Return the part of tr(M^-1) outside of the coordinates, where M is a multiple of I."""
        aims_at_identity = self._target is None and self._settings.target == "identity"
        return n_dimensions / self._settings.regularization if aims_at_identity else 0.0

    def _coverage(self, rows: np.ndarray) -> CoveredShare | None:
        settings, progress = self._settings, self._progress
        asked = settings.wanted_coverage, settings.coverage_inputs
        coverage = find_coverage(self._net, self._first, *asked)
        if coverage is None:
            return None
        samples = self._pool, rows, self._labeled, self._target
        with progress.step("coverage"):
            return cover_share(coverage, *samples, self._n_instances, settings, progress)

    def _utilities(self, rows: np.ndarray, batch: Batch, problem: SelectionProblem) -> np.ndarray:
        if not isinstance(self._pool, LocalPool):
            raise TypeError("Utilities are there for pools in this process alone.")
        utilities = np.full((len(batch.gains), len(self._pool)), np.nan)
        gains = self._pool.gains_before_picks(batch.positions.tolist(), problem)
        utilities[:, rows] = gains.cpu().numpy()
        return utilities


def _mean_diagonal(sets: list[tuple[int, dict[str, Tensor]]]) -> dict[str, Tensor]:
    """Return the mean of several sets' means, by their sizes."""
    total = sum(n for n, _ in sets)
    diagonal: dict[str, Tensor] = {}
    for n, means in sets:
        for name, mean in means.items():
            # On the CPU, so that a sampler pickled on a machine with CUDA loads on one without.
            share = mean.cpu() * (n / total)
            diagonal[name] = diagonal[name] + share if name in diagonal else share
    return diagonal


def _check_samples(pool: Source, others: list[NetSamples]) -> None:
    for other in others:
        shape = pool.sample_shape if isinstance(pool, NetSamples) else ()
        if shape and other.sample_shape and shape != other.sample_shape:
            raise ValueError(
                f"X_pool has samples of shape {shape}, but the {other.role.noun} have shape "
                f"{other.sample_shape}."
            )
        other.check_finite()
    # Chunks are checked when they are computed.
    if isinstance(pool, NetSamples):
        pool.check_finite()
