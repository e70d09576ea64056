"""The candidates of this process, or of one chunk on a worker."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from skfishermask.selection.candidates import GainState
from skfishermask.selection.storage import StoredEmbedding
from skfishermask.selection.updates import Pick


class LocalCandidatePool:
    """Candidates with embeddings that this process can read; for the methods see `CandidatePool`.

    At most `picks_per_round` picks are attempted together. With a `start` these are a part of the
    pool, from that position on.
    """

    def __init__(
        self, embedding: StoredEmbedding, picks_per_round: int, start: int | None = None
    ) -> None:
        self._is_part, self._start = start is not None, start or 0
        positions = torch.arange(len(embedding), device=embedding.device) + self._start
        self.candidates = GainState(embedding, positions, picks_per_round + 1)
        self.n_read = 0
        self._excluded = self.candidates.taken
        self._n_attempted = 0

    def shortlist(self, count: int, n_picks: int) -> tuple[GainState, Tensor]:
        candidates = self.candidates
        self._excluded = candidates.excluded(n_picks)
        bounds = candidates.bounds(self._excluded)
        index = torch.topk(bounds, min(count, len(bounds)), sorted=False).indices.sort().values
        others_bound = bounds.index_fill_(0, index, -math.inf).amax()
        # In float64: there are few, and near-ties are settled in it.
        return candidates.subset(index, n_picks + 1, torch.float64), others_bound

    def attempt(self, picks: Sequence[Pick], shortlist: GainState, others_bound: Tensor) -> Tensor:
        self._n_attempted = len(picks)
        if not picks:
            return others_bound[None]
        excluded = self._excluded.index_fill(0, shortlist.index, True)
        self.n_read += len(self.candidates)
        return torch.cat([others_bound[None], self.candidates.attempt(picks, excluded)])

    def commit(self, picks: Sequence[Pick], shortlist: GainState) -> None:
        self.candidates.commit(min(len(picks), self._n_attempted))
        if len(picks) <= self._n_attempted:
            # The shortlist has exact gains.
            self.candidates.copy_state(shortlist, len(picks))
        self._mark_taken(picks)

    def apply(self, picks: Sequence[Pick]) -> None:
        self.candidates.apply(picks)
        self.n_read += len(self.candidates)
        self._mark_taken(picks)

    def commit_attempted(self, picks: Sequence[Pick]) -> None:
        """Keep the first picks of those that `candidates` attempted."""
        self.candidates.commit(len(picks))
        self._mark_taken(picks)

    def _mark_taken(self, picks: Sequence[Pick]) -> None:
        if not picks:
            return
        index = torch.stack([pick.position for pick in picks])
        if self._is_part:
            index -= self._start
            index = index[(index >= 0) & (index < len(self.candidates))]
        self.candidates.taken.index_fill_(0, index, True)

    def rows(self, positions: Sequence[int]) -> Tensor:
        return self.candidates.rows(self.index_of(positions))

    def index_of(self, positions: Sequence[int]) -> Tensor:
        """Return the indices of those positions that are in this pool, int64."""
        start, stop = self._start, self._start + len(self.candidates)
        index = [position - start for position in positions if start <= position < stop]
        return torch.tensor(index, dtype=torch.int64, device=self.candidates.taken.device)
