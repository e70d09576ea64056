"""A pool that is here: its samples are read, embedded and chosen from in this process."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol, Self, TypeVar

import numpy as np
from torch import Tensor

from skfishermask.data import (
    LayerValue,
    ReadableNet,
    Source,
    covered_predictions,
    first_sample,
    naming_rows,
)
from skfishermask.fisher import (
    SUMMED_ROWS,
    FisherSum,
    ParameterMask,
    Predictions,
    embedding_blocks,
    fisher_diagonal,
    fisher_matrix,
)
from skfishermask.jacobian import (
    TENSOR_CACHE_BYTES,
    LinearHead,
    NoLinearHeadError,
    find_linear_head,
)
from skfishermask.parameters import Settings
from skfishermask.placement import LocalPlacement, MemoryEstimate, Placement, place
from skfishermask.progress import Bar, Progress
from skfishermask.selection import (
    Batch,
    HeadEmbedding,
    Location,
    SelectionProblem,
    StoredEmbedding,
    gains_before_picks,
    row_coordinates,
    select,
    stored,
)

T = TypeVar("T")

# Embeddings at a linear head are kept as factors where they would be larger by this: with few
# directions, or few columns an output, factors are not faster.
_LEAST_SAVING = 4


@dataclass(frozen=True)
class Embedded:
    """What an embedded pool says: mean Fisher matrices, float64, all in the same coordinates."""

    dimensions: int  # number of these coordinates
    fisher: Tensor | None  # of the candidates; None where it was not asked for
    others: list[Tensor]  # of each of the other sets of samples


class Pool(Protocol):
    """A pool, in this process or on a cluster. Leaving its context frees what it holds."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...

    def __len__(self) -> int: ...

    def place(self, n: int, r: int, k: int, n_others: int, names: Collection[str]) -> Placement:
        """Decide where the embedding goes, and remember it; MemoryError where there is no room.

        It is of n candidates with r directions and k masked parameters, beside `n_others` labelled
        and target samples; these are entries of parameters with some `names`.
        """

    def diagonal(self, rows: np.ndarray, n_directions: int) -> dict[str, Tensor]:
        """Return the mean diagonal Fisher information of some rows."""

    def predicted(self, function: Callable[..., T], rows: np.ndarray) -> list[T]:
        """Return a function of the predictions of some rows: one value, or one a chunk.

        It is called as ``function(module, batches, likelihood=..., to_logits=...)``.
        """

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

        The objective needs the mean Fisher matrices of the `others` and, if `wants_fisher`, that of
        the candidates.
        """

    def select(self, problem: SelectionProblem, preselected: Sequence[int]) -> Batch:
        """Choose among the embedded candidates."""

    def info(self) -> dict[str, object]:
        """Return the entries of ``query_info_`` that only this kind of pool has."""


class LocalSamples:
    """Samples that this process reads, with a net and bars of progress."""

    def __init__(
        self, net: ReadableNet, source: Source, settings: Settings, progress: Progress
    ) -> None:
        self.net, self.source, self.settings, self.progress = net, source, settings, progress

    def __len__(self) -> int:
        return len(self.source)

    def diagonal(self, rows: np.ndarray, n_directions: int) -> dict[str, Tensor]:
        """Return the mean diagonal Fisher information of some rows."""
        diagonal = partial(fisher_diagonal, n_directions=n_directions)
        return self._read(diagonal, rows, "Fisher diagonal")

    def predicted(self, function: Callable[..., T], rows: np.ndarray | None) -> list[T]:
        """Return a function of the predictions of some rows, or of all; see `Pool`."""
        return [self._read(function, rows, "Predictions")]

    def predictions(self, rows: np.ndarray | None, layer: LayerValue | None) -> Predictions:
        """Return these of some rows, or of all; see `Pool`."""
        return self._read(partial(covered_predictions, layer), rows, "Predictions")

    def _read(self, function: Callable[..., T], rows: np.ndarray | None, text: str) -> T:
        batches = self.source.batches(rows)
        shown = self.progress.each(batches, len(batches), text)
        with naming_rows(batches, self.net.to_logits):
            return function(self.net.module, shown, **self.net.read_options)

    def blocks(
        self, rows: np.ndarray | None, mask: ParameterMask, estimate: MemoryEstimate, text: str
    ) -> Iterator[Tensor]:
        """Yield what is kept of some rows, or of all, block by block."""
        batches = self.source.batches(rows)
        shown = self.progress.each(batches, len(batches), text)
        options, r, head = self.net.read_options, estimate.r, estimate.head
        with naming_rows(batches, self.net.to_logits):
            yield from embedding_blocks(
                self.net.module, shown, mask, n_directions=r, head=head, **options
            )

    def mean_fisher(self, mask: ParameterMask, estimate: MemoryEstimate) -> Tensor:
        """Return the mean Fisher matrix of all, (k, k)."""
        total = FisherSum(len(mask), self.net.device)
        for block in self.blocks(None, mask, estimate, self.text):
            for n_samples, products in _embedding(stored(block), estimate).information(SUMMED_ROWS):
                total.add_products(n_samples, products)
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

    def __exit__(self, *error: object) -> None:
        self._embedding = None
        self._cleanup.close()

    def place(self, n: int, r: int, k: int, n_others: int, names: Collection[str]) -> Placement:
        estimate = MemoryEstimate(n, r, k, self.settings.dtype, n_others, TENSOR_CACHE_BYTES)
        at_head = replace(estimate, head=self._find_head(dict.fromkeys(names)))
        is_smaller = _LEAST_SAVING * at_head.embedding_bytes <= estimate.embedding_bytes
        if is_smaller and not estimate.has_few_rows and estimate.dtype.itemsize >= 4:
            estimate = at_head
        self._placement = place(estimate, self._where)
        return self._placement

    def embed(
        self,
        rows: np.ndarray,
        mask: ParameterMask,
        others: Sequence[LocalSamples],
        wants_fisher: bool,
    ) -> Embedded:
        if self._placement is None:
            raise RuntimeError("The embedding has no place yet.")
        estimate, fisher_of_others = self._placement.estimate, []
        if estimate.head is not None:
            estimate = replace(estimate, head=self._find_head(mask.indices))
        try:
            with self.progress.step("embedding"):
                V = _embedding(self._placement.allocate(self._cleanup), estimate)
                start = len(rows)
                for other in others:
                    if estimate.has_few_rows:
                        blocks = other.blocks(None, mask, estimate, other.text)
                        start = _write(V, start, blocks)
                    else:
                        fisher_of_others.append(other.mean_fisher(mask, estimate))
                every = None if len(rows) == len(self) else rows
                _write(V, 0, self.blocks(every, mask, estimate, "Fisher embedding"))
        except NoLinearHeadError:
            # A batch took another way through the network than the first sample.
            self._placement = place(replace(estimate, head=None), self._where)
            return self.embed(rows, mask, others, wants_fisher)
        with self.progress.step("fisher"):
            if estimate.has_few_rows:
                mine, *theirs = row_coordinates(V).split([len(rows), *map(len, others)])
                V, fisher_of_others = stored(mine), [fisher_matrix(one) for one in theirs]
            self._embedding = V
            return Embedded(V.shape[2], self._fisher(V) if wants_fisher else None, fisher_of_others)

    def _find_head(self, indices: Mapping[str, Tensor | None]) -> LinearHead | None:
        """Return the network's linear head, if these entries of parameters are all of it."""
        to_logits = self.net.to_logits
        return find_linear_head(self.net.module, first_sample(self.source), indices, to_logits)

    def _fisher(self, V: StoredEmbedding) -> Tensor:
        total = FisherSum(V.shape[2], V.device)
        with self.progress.bar(len(V), "Fisher matrix", "sample") as bar:
            for n_samples, products in V.information(SUMMED_ROWS):
                total.add_products(n_samples, products)
                bar.update(n_samples)
        return total.mean()

    def select(self, problem: SelectionProblem, preselected: Sequence[int]) -> Batch:
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

    def info(self) -> dict[str, object]:
        return {}

    def _embedded(self) -> StoredEmbedding:
        if self._embedding is None:
            raise RuntimeError("The pool was not embedded before it was to be chosen from.")
        return self._embedding


def _embedding(kept: StoredEmbedding, estimate: MemoryEstimate) -> StoredEmbedding:
    """Return embeddings, given what is kept of them."""
    head = estimate.head
    return kept if head is None else HeadEmbedding(kept, head.columns, estimate.r, head.n_outputs)


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
