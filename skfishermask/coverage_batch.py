"""Batches, or shares of them, that cover the inputs of a pool."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from skfishermask.coverage import automatic_share, coverage_problem, early_share
from skfishermask.data import flat_inputs
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

# Candidates that are covered, at most; a random subset of larger pools.
_N_CANDIDATES = 20_000
# Numbers in the inputs of these together.
_N_NUMBERS = 1 << 27
# Numbers in the inputs of a sample up to which they are covered by default.
_N_INPUTS = 2048


@dataclass(frozen=True)
class CoveredShare:
    """The share of a batch that covers the inputs.

    Attributes
    ----------
    rows : ndarray of int
        Rows of the pool that it was chosen from.
    batch : Batch
        Those chosen, among `rows`.
    embedding : StoredEmbedding
        Of `rows`.
    problem : SelectionProblem
        What they were chosen by.
    """

    rows: np.ndarray
    batch: Batch
    embedding: StoredEmbedding
    problem: SelectionProblem

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


def inputs_to_cover(
    share: float | Literal["auto"],
    first: Inputs,
    *,
    n_labeled: int,
    n_classes: int,
    has_target: bool,
) -> int:
    """Return the length of a sample if a share may go to coverage of the inputs, else 0.

    Parameters
    ----------
    share : float or "auto"
        The parameter `coverage_share`.
    first : tensor, list of tensors or dict of tensors
        The first sample of the pool.
    n_labeled, n_classes : int
        Numbers of labelled samples and of classes.
    has_target : bool
        Whether there are target samples.

    Raises
    ------
    ValueError
        If a share was asked for and the inputs are not real numbers.
    """
    inputs = flat_inputs(first)
    n_inputs = 0 if inputs is None else inputs.numel()
    if share == "auto":
        covers = n_inputs <= _N_INPUTS and not has_target and early_share(n_labeled, n_classes) > 0
        return n_inputs if covers else 0
    if share > 0 and inputs is None:
        raise ValueError(
            f"coverage_share={share} needs inputs that are real numbers, found others, such as "
            "integers. Set coverage_share=0."
        )
    return n_inputs if share > 0 else 0


def cover_share(
    pool: Pool,
    rows: np.ndarray,
    labeled: LocalSamples | None,
    n_inputs: int,
    n_instances: int,
    settings: Settings,
    progress: Progress,
) -> CoveredShare | None:
    """Choose the share of a batch that covers the inputs; None: there is none.

    Parameters
    ----------
    pool : Pool
        What to choose from.
    rows : ndarray of int
        Candidates of the query.
    labeled : LocalSamples or None
        Labelled samples.
    n_inputs : int
        Numbers in the inputs of a sample.
    n_instances : int
        Size of the whole batch.
    settings : Settings
        Parameters of the query.
    progress : Progress
        Shows the picks.

    Raises
    ------
    ValueError
        If a share was asked for and inputs have several lengths.
    """
    limit = max(n_instances, min(_N_CANDIDATES, _N_NUMBERS // n_inputs))
    drawn = np.arange(len(rows))
    if len(drawn) > limit:
        drawn = np.sort(settings.rng.choice(len(rows), limit, replace=False))
    predicted, inputs = pool.predictions_and_inputs(rows[drawn])
    share = settings.coverage_share
    if share == "auto":
        share = automatic_share(
            predicted.class_probabilities, 0 if labeled is None else len(labeled)
        )
    n = round(share * n_instances)
    if n == 0:
        return None
    known = None if inputs is None else inputs[:0]
    if labeled is not None:
        _, known = labeled.predictions_and_inputs()
    if inputs is None or known is None or inputs.shape[1] != known.shape[1]:
        if settings.coverage_share == "auto":
            return None
        raise ValueError(
            f"coverage_share={share} needs inputs of one length in X_pool and X_labeled, found "
            "several, such as sequences padded batch by batch. Set coverage_share=0."
        )
    weights = predicted.uncertainty.to(inputs)
    embedding, problem = coverage_problem(inputs, known, weights, n, settings.rng)
    with progress.bar(n, "Coverage", "pick") as bar:
        batch = select(embedding, problem, on_pick=bar.update)
    return CoveredShare(rows[drawn], batch, embedding, problem)
