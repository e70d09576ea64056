"""The candidates of this process."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from skfishermask.selection.candidates import GainState
from skfishermask.selection.storage import StoredEmbedding
from skfishermask.selection.updates import Pick


class LocalCandidatePool:
    """Candidates whose embeddings this process can read.

    For the methods see :class:`skfishermask.selection.greedy.CandidatePool`.

    Parameters
    ----------
    embedding : StoredEmbedding
        Fisher embeddings, read in chunks and never changed.
    picks_a_round : int
        Steps that are attempted at a time, at most.
    start : int, optional
        Position of the first, where there are others beside these. None: there are none.

    Attributes
    ----------
    candidates : GainState
        All of them.
    n_read : int
        Candidates whose embeddings were read since the start.
    """

    def __init__(
        self, embedding: StoredEmbedding, picks_a_round: int, start: int | None = None
    ) -> None:
        self._shared, self._start = start is not None, start or 0
        positions = torch.arange(len(embedding), device=embedding.device) + self._start
        self.candidates = GainState(embedding, positions, picks_a_round + 1)
        self.n_read = 0
        self.out = self.candidates.taken
        self._n_attempted = 0

    def shortlist(  # noqa: D102, see CandidatePool
        self, count: int, n_picks: int
    ) -> tuple[GainState, Tensor]:
        index, rest = self.likely(count, n_picks)
        # In float64: there are few, and near-ties are settled in it.
        return self.candidates.subset(index, n_picks + 1, torch.float64), rest

    def likely(
        self, count: int, n_picks: int, known: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Find those with the largest gains they may have.

        Parameters
        ----------
        count : int
            How many.
        n_picks : int
            Picks to come before the next time.
        known : Tensor of shape (m,), int64, optional
            Where those are that do not count.
        """
        everyone = self.candidates
        self.out = everyone.out(n_picks)
        if known is not None:
            self.out = self.out.index_fill(0, known, True)
        bounds = everyone.bounds(self.out)
        index = torch.topk(bounds, min(count, len(bounds)), sorted=False).indices.sort().values
        return index, bounds.index_fill_(0, index, -math.inf).amax()

    def attempt(  # noqa: D102, see CandidatePool
        self, steps: Sequence[Pick], short: GainState, rest: Tensor
    ) -> Tensor:
        self._n_attempted = len(steps)
        if not steps:
            return rest[None]
        out = self.out.index_fill(0, short.index, True)
        self.n_read += len(self.candidates)
        return torch.cat([rest[None], self.candidates.attempt(steps, out)])

    def keep(self, taken: Sequence[Pick], short: GainState) -> None:  # noqa: D102, see CandidatePool
        self.candidates.keep(min(len(taken), self._n_attempted))
        if len(taken) <= self._n_attempted:
            # The shortlist knows better what was settled in float64.
            self.candidates.put(short, len(taken))
        self._take_out(taken)

    def advance(self, steps: Sequence[Pick]) -> None:  # noqa: D102, see CandidatePool
        self.candidates.catch_up(steps)
        self.n_read += len(self.candidates)
        self._take_out(steps)

    def confirm(self, steps: Sequence[Pick]) -> None:
        """Take the samples of the first steps that `candidates` attempted."""
        self.candidates.keep(len(steps))
        self._take_out(steps)

    def _take_out(self, steps: Sequence[Pick]) -> None:
        if not steps:
            return
        where = torch.stack([step.position for step in steps])
        if self._shared:
            where -= self._start
            where = where[(where >= 0) & (where < len(self.candidates))]
        self.candidates.taken.index_fill_(0, where, True)

    def rows(self, positions: Sequence[int]) -> Tensor:  # noqa: D102, see CandidatePool
        return self.candidates.rows(self.where(positions))

    def where(self, positions: Sequence[int]) -> Tensor:
        """Give the places of those positions that are the pool's own, int64."""
        start, stop = self._start, self._start + len(self.candidates)
        own = [position - start for position in positions if start <= position < stop]
        return torch.tensor(own, dtype=torch.int64, device=self.candidates.taken.device)
