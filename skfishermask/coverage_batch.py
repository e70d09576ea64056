"""Batches, or shares of them, that cover the inputs of a pool."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from skfishermask.coverage import coverage_problem
from skfishermask.data import LayerValue, ReadableNet, coverage_layers, covered_predictions
from skfishermask.fisher import in_one_length
from skfishermask.jacobian import Inputs
from skfishermask.parameters import Settings
from skfishermask.pool import LocalSamples, Pool
from skfishermask.progress import Progress
from skfishermask.selection import (
    Batch,
    SelectionProblem,
    StoredEmbedding,
    gains_before_picks,
    select,
)

# Numbers in the inputs of all candidates together, at most, unless all were asked for.
_N_NUMBERS = 1 << 27
# Numbers in the inputs of a sample up to which they are covered by default.
_N_INPUTS = 2048


@dataclass(frozen=True)
class CoveredShare:
    """The share of a batch that covers the inputs."""

    rows: np.ndarray  # of the pool, that it was chosen from
    batch: Batch  # those chosen, among `rows`
    embedding: StoredEmbedding  # of `rows`
    problem: SelectionProblem  # what they were chosen by
    covered: str  # what of the samples

    @property
    def indices(self) -> np.ndarray:
        """Rows of the pool in the order chosen."""
        indices: np.ndarray = self.rows[self.batch.positions.numpy(force=True)]
        return indices

    @property
    def gains(self) -> np.ndarray:
        """Decrease of the mean posterior variance when each was chosen."""
        gains: np.ndarray = self.batch.gains.numpy(force=True)
        return gains

    def utilities(self, n_pool: int) -> np.ndarray:
        """Return the gains of all samples before each choice, (n_instances, n_pool)."""
        positions = self.batch.positions.tolist()
        utilities = np.full((len(positions), n_pool), np.nan)
        gains = gains_before_picks(self.embedding, positions, self.problem)
        utilities[:, self.rows] = gains.numpy(force=True)
        return utilities


@dataclass(frozen=True)
class Coverage:
    """What a query covers, and how much of its batch is chosen for that."""

    layer: LayerValue | None  # where in the network; None: its inputs
    n_inputs: int  # numbers there, for a sample
    share: float  # of the batch

    @property
    def text(self) -> str:
        """What is covered, in words."""
        return "inputs" if self.layer is None else str(self.layer)


def find_coverage(
    net: ReadableNet, first: Inputs, share: float | Literal["auto"], asked: str
) -> Coverage | None:
    """Return what to cover; None where the whole batch is chosen by Fisher information.

    It is found out on the first sample of the pool; `share` is the parameter `coverage_share`,
    `asked` the parameter `coverage_inputs`. Raises ValueError if a share was asked for and there
    are no real numbers to cover, or no such module.
    """
    if share == 0 or (share == "auto" and not net.likelihood.has_uncertainty):
        return None
    numbers = {}
    for layer in coverage_layers(net.module, first, asked, net.to_logits):
        flat = covered_predictions(layer, net.module, [first], **net.read_options).inputs
        if flat is not None:
            numbers[layer] = flat.numel()
    # The pixels of a photograph say little about what is in it.
    fitting = [layer for layer, n in numbers.items() if n <= _N_INPUTS]
    if fitting or (numbers and (share != "auto" or asked != "auto")):
        layer = fitting[0] if fitting else min(numbers, key=numbers.__getitem__)
        return Coverage(layer, numbers[layer], 1.0 if share == "auto" else share)
    if share == "auto" and asked == "auto":
        return None
    what = "inputs" if asked in ("auto", "inputs") else f"a tensor from the module {asked!r}"
    raise ValueError(
        f"coverage_share={share} needs {what} with real numbers for each sample, found others, "
        "such as integers. Set coverage_share=0."
    )


def cover_share(
    coverage: Coverage,
    pool: Pool,
    rows: np.ndarray,
    labeled: LocalSamples | None,
    target: LocalSamples | None,
    n_instances: int,
    settings: Settings,
    progress: Progress,
) -> CoveredShare | None:
    """Choose the share of a batch of n_instances that covers the inputs; None: there is none.

    It is chosen among some `rows` of the pool; the `target` is covered in its place, if given.
    Raises ValueError if a share was asked for and inputs have several lengths.
    """
    n = round(coverage.share * n_instances)
    if n == 0:
        return None
    limit = max(n_instances, _N_NUMBERS // coverage.n_inputs)
    if len(rows) > limit and settings.max_candidates == "auto":
        rows = np.sort(settings.rng.choice(rows, limit, replace=False))
    predicted = [pool.predictions(rows, coverage.layer)]
    others = [samples for samples in (labeled, target) if samples is not None]
    predicted += [samples.predictions(None, coverage.layer) for samples in others]
    together = in_one_length([of_set.inputs for of_set in predicted])
    if together is None:
        if settings.coverage_share == "auto":
            return None
        raise ValueError(
            f"coverage_share={coverage.share} needs inputs of one length in all samples, found "
            "several, such as sequences padded batch by batch. Set coverage_share=0."
        )
    inputs, *of_others = together.split([len(of_set.uncertainty) for of_set in predicted])
    known = inputs[:0] if labeled is None else of_others.pop(0)
    weights = predicted[0 if target is None else -1].uncertainty.to(inputs)
    problem = coverage_problem(
        inputs, known, weights, n, settings.rng, target=of_others[0] if of_others else None
    )
    return select_share(rows, *problem, coverage.text, progress)


def select_share(
    rows: np.ndarray,
    embedding: StoredEmbedding,
    problem: SelectionProblem,
    covered: str,
    progress: Progress,
) -> CoveredShare:
    """Choose among rows of the pool, with an embedding of them and a problem of coverage."""
    with progress.bar(problem.n_instances, "Coverage", "pick") as bar:
        batch = select(embedding, problem, on_pick=bar.update)
    return CoveredShare(rows, batch, embedding, problem, covered)
