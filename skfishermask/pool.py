"""A pool that is here: its samples are read, embedded and chosen from in this process."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

import numpy as np
from torch import Tensor

from skfishermask.data import CoverageInputs, LayerValue, ReadableNet, Source, naming_rows
from skfishermask.fisher import (
    FisherSum,
    ParameterMask,
    Predictions,
    direction_norms,
    embedding_blocks,
    fisher_diagonal,
    fisher_matrix,
    largest_rank,
    predict,
)
from skfishermask.jacobian import TENSOR_CACHE_BYTES
from skfishermask.parameters import Settings
from skfishermask.placement import LocalPlacement, MemoryEstimate, Placement, place
from skfishermask.progress import Bar, Progress
from skfishermask.selection import (
    Batch,
    Location,
    SelectionProblem,
    StoredEmbedding,
    gains_before_picks,
    row_coordinates,
    select,
    stored,
)


@dataclass(frozen=True)
class Embedded:
    """What an embedded pool says: mean Fisher matrices, all in the same coordinates.

    Attributes
    ----------
    dimensions : int
        Number of these coordinates.
    fisher : Tensor of shape (dimensions, dimensions), float64, or None
        Of the candidates; None where it was not asked for.
    others : list of Tensor of shape (dimensions, dimensions), float64
        Of each of the other sets of samples.
    """

    dimensions: int
    fisher: Tensor | None
    others: list[Tensor]


class Pool(Protocol):
    """A pool, in this process or on a cluster. Leaving its context frees what it holds."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...

    def __len__(self) -> int: ...

    def place(self, n: int, r: int, k: int, n_others: int) -> Placement:
        """Decide where the embedding goes, and remember it; MemoryError where there is no room.

        Parameters
        ----------
        n, r, k : int
            Candidates, directions and masked parameters.
        n_others : int
            Labelled and target samples.
        """

    def diagonal(self, rows: np.ndarray, n_directions: int) -> dict[str, Tensor]:
        """Return the mean diagonal Fisher information of some rows."""

    def direction_norms(self, rows: np.ndarray) -> Tensor:
        """Sum the squared norms of each direction over some rows, (rank,)."""

    def largest_rank(self, rows: np.ndarray) -> int:
        """Return the number of directions of the sample among some rows that has the most."""

    def predictions(self, rows: np.ndarray, layer: LayerValue | None) -> Predictions:
        """Return predictions, and what coverage looks at: a layer's value or the inputs."""

    def embed(
        self,
        rows: np.ndarray,
        mask: ParameterMask,
        others: Sequence[LocalSamples],
        wants_fisher: bool,
    ) -> Embedded:
        """Embed candidates where they were placed, to choose from later.

        Parameters
        ----------
        rows : ndarray of int
            The candidates.
        mask : ParameterMask
            The parameters to look at.
        others : sequence of LocalSamples
            Other samples; the objective needs their mean Fisher matrices.
        wants_fisher : bool
            Whether it needs that of the candidates.
        """

    def select(self, problem: SelectionProblem, preselected: Sequence[int]) -> Batch:
        """Choose among the embedded candidates."""

    def info(self) -> dict[str, object]:
        """Return the entries of ``query_info_`` that only this kind of pool has."""


class LocalSamples:
    """Samples that this process reads.

    Parameters
    ----------
    net : ReadableNet
        Reads them.
    source : Source
        The samples.
    settings : Settings
        How they are embedded.
    progress : Progress
        Is told how far it is.
    """

    def __init__(
        self, net: ReadableNet, source: Source, settings: Settings, progress: Progress
    ) -> None:
        self.net, self.source, self.settings, self.progress = net, source, settings, progress

    def __len__(self) -> int:
        return len(self.source)

    def diagonal(self, rows: np.ndarray, n_directions: int) -> dict[str, Tensor]:
        """Return the mean diagonal Fisher information of some rows."""
        batches = self.source.batches(rows)
        shown = self.progress.each(batches, len(batches), "Fisher diagonal")
        with naming_rows(batches, self.net.to_logits):
            return fisher_diagonal(
                self.net.module, shown, n_directions=n_directions, **self.net.read_options
            )

    def direction_norms(self, rows: np.ndarray) -> Tensor:
        """Sum the squared norms of each direction over some rows, (rank,)."""
        batches = self.source.batches(rows)
        shown = self.progress.each(batches, len(batches), "Predictions")
        with naming_rows(batches, self.net.to_logits):
            return direction_norms(self.net.module, shown, **self.net.read_options)

    def largest_rank(self, rows: np.ndarray) -> int:
        """Return the number of directions of the sample among some rows that has the most."""
        batches = self.source.batches(rows)
        shown = self.progress.each(batches, len(batches), "Predictions")
        with naming_rows(batches, self.net.to_logits):
            return largest_rank(self.net.module, shown, **self.net.read_options)

    def predictions(self, rows: np.ndarray | None, layer: LayerValue | None) -> Predictions:
        """Return these of some rows, or of all; see `Pool`."""
        batches = self.source.batches(rows)
        shown = self.progress.each(batches, len(batches), "Predictions")
        with (
            naming_rows(batches, self.net.to_logits),
            CoverageInputs(self.net.module, layer) as inputs,
        ):
            return predict(self.net.module, shown, inputs=inputs, **self.net.read_options)

    def blocks(
        self, rows: np.ndarray | None, mask: ParameterMask, n_directions: int, text: str
    ) -> Iterator[Tensor]:
        """Yield the Fisher embeddings of some rows, or of all, block by block."""
        batches = self.source.batches(rows)
        with naming_rows(batches, self.net.to_logits):
            yield from embedding_blocks(
                self.net.module,
                self.progress.each(batches, len(batches), text),
                mask,
                n_directions=n_directions,
                **self.net.read_options,
            )

    def mean_fisher(self, mask: ParameterMask, n_directions: int) -> Tensor:
        """Return the mean Fisher matrix of all, (k, k)."""
        total = FisherSum(len(mask), self.net.device)
        for block in self.blocks(None, mask, n_directions, self.text):
            total.add(block)
        return total.mean()

    @property
    def text(self) -> str:
        """What they are called on a progress bar."""
        return self.source.role.noun.capitalize()


class LocalPool(LocalSamples):
    """A pool in this process. For the methods see `Pool`."""

    def __init__(
        self, net: ReadableNet, source: Source, settings: Settings, progress: Progress
    ) -> None:
        super().__init__(net, source, settings, progress)
        folder = settings.scratch_folder
        self._where = Location(
            net.device, settings.memory_share, None if folder is None else str(folder)
        )
        self._placement: LocalPlacement | None = None
        self._cleanup = ExitStack()
        self._embedding: StoredEmbedding | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._embedding = None
        self._cleanup.close()

    def place(self, n: int, r: int, k: int, n_others: int) -> Placement:  # noqa: D102, see Pool
        estimate = MemoryEstimate(n, r, k, self.settings.dtype, n_others, TENSOR_CACHE_BYTES)
        self._placement = place(estimate, self._where)
        return self._placement

    def embed(  # noqa: D102, see Pool
        self,
        rows: np.ndarray,
        mask: ParameterMask,
        others: Sequence[LocalSamples],
        wants_fisher: bool,
    ) -> Embedded:
        if self._placement is None:
            raise RuntimeError("The embedding has no place yet.")
        estimate, fisher_of_others = self._placement.estimate, []
        with self.progress.step("embedding"):
            V = self._placement.allocate(self._cleanup)
            start = len(rows)
            for other in others:
                if estimate.has_few_rows:
                    blocks = other.blocks(None, mask, estimate.r, other.text)
                    start = _write(V, start, blocks)
                else:
                    fisher_of_others.append(other.mean_fisher(mask, estimate.r))
            every = None if len(rows) == len(self) else rows
            _write(V, 0, self.blocks(every, mask, estimate.r, "Fisher embedding"))
        with self.progress.step("fisher"):
            if estimate.has_few_rows:
                mine, *theirs = row_coordinates(V).split([len(rows), *map(len, others)])
                V, fisher_of_others = stored(mine), [fisher_matrix(one) for one in theirs]
            self._embedding = V
            return Embedded(V.shape[2], self._fisher(V) if wants_fisher else None, fisher_of_others)

    def _fisher(self, V: StoredEmbedding) -> Tensor:
        total = FisherSum(V.shape[2], V.device)
        with self.progress.bar(len(V), "Fisher matrix", "sample") as bar:
            for _, values in V.chunks():
                total.add(values)
                bar.update(len(values))
        return total.mean()

    def select(  # noqa: D102, see Pool
        self, problem: SelectionProblem, preselected: Sequence[int]
    ) -> Batch:
        V = self._embedded()
        with (
            self.progress.bar(len(V), "Preparing", "sample") as prepared,
            picks_bar(self.progress, len(V), problem) as picked,
        ):
            return select(
                V,
                problem,
                preselected=preselected,
                on_pick=picked.update,
                on_prepared=prepared.update,
            )

    def gains_before_picks(self, positions: Sequence[int], problem: SelectionProblem) -> Tensor:
        """Return the gains of all candidates before each of some picks, (picks, candidates)."""
        return gains_before_picks(self._embedded(), positions, problem)

    def info(self) -> dict[str, object]:  # noqa: D102, see Pool
        return {}

    def _embedded(self) -> StoredEmbedding:
        if self._embedding is None:
            raise RuntimeError("The pool was not embedded before it was to be chosen from.")
        return self._embedding


def _write(embedding: StoredEmbedding, start: int, blocks: Iterable[Tensor]) -> int:
    """Write blocks one after the other; return where they end."""
    for block in blocks:
        embedding.write(start, block)
        start += len(block)
    return start


def picks_bar(progress: Progress, n: int, problem: SelectionProblem) -> AbstractContextManager[Bar]:
    """Return a progress bar for picks: with `oversample` more are taken than are kept."""
    total = min(n, math.ceil(problem.oversample * problem.n_instances))
    return progress.bar(total, "Selection", "pick")
