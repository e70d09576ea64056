"""A candidate pool in blocks elsewhere: likely picks are cached here, the others rarely asked.

Where a block of the pool is expensive to reach, one request carries all updates of a round, and its
reply brings the candidates that have become likely picks. As long as the picks of a round are
verified there is one request a round.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from skfishermask.selection import GainState, LocalCandidatePool, Pick

# The cache grows to this multiple of a shortlist before the least likely candidates leave it.
_MAX_CACHE_GROWTH = 3
# Candidates that come with the reply to attempted picks, about.
_MAX_SENT = 48
# Blocks may send this multiple of their share of a whole shortlist,
_SHORTLIST_SPREAD = 1.25
# and of the candidates that come later, which are few.
_REPLY_SPREAD = 2
# Others are likely picks if they would be at this rank or better in the cache.
_LIKELY_RANK = 16


@dataclass(frozen=True)
class Request:
    """What all blocks of a pool are to do at a time."""

    number: int  # of requests before this one
    n_committed: int  # attempted picks of the last request to keep
    updates: Sequence[Pick]  # to apply after these
    picks: Sequence[Pick]  # to attempt after these
    cached: Sequence[int]  # positions that the sender has: never to send and never to count
    # Positions to send and nothing else, if they are the block's; picked ones included.
    requested: Sequence[int]
    # Candidates to send: those with a bound that reaches a limit, up to the first pick that they
    # show to be wrong, (len(picks) + 1,), float64.
    limits: Tensor
    count: int  # candidates that each block may send
    n_picks: int  # before the next request

    @property
    def n_bytes(self) -> int:
        """Size of the tensors and positions."""
        factors = sum(pick.factors.nbytes for pick in (*self.updates, *self.picks))
        return factors + 8 * (len(self.cached) + len(self.requested))

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Request:
        """Return the request on another device, with its picks in another precision."""
        return replace(
            self,
            updates=[pick.to(device, dtype) for pick in self.updates],
            picks=[pick.to(device, dtype) for pick in self.picks],
            limits=self.limits.to(device),
        )


@dataclass(frozen=True)
class Reply:
    """The reply of a block, or of several, to a request."""

    # Largest upper bound of the gain of a candidate that is not cached, before the first pick and
    # after each, (len(picks) + 1,), float64; minus infinity where there is none.
    largest: Tensor
    others: Tensor  # the same of the candidates that are not sent either
    sent: GainState | None  # the candidates sent, in their state before the first pick
    n_read: int  # embeddings read for it

    @property
    def n_bytes(self) -> int:
        """Size of the tensors."""
        return 2 * self.largest.nbytes + (0 if self.sent is None else self.sent.n_bytes)

    def to(self, device: torch.device | str) -> Reply:
        """Return the reply on another device."""
        sent = None if self.sent is None else self.sent.to(device)
        return Reply(self.largest.to(device), self.others.to(device), sent, self.n_read)


class Block:
    """A part of the pool, in the state that the first request expects: it replies to requests."""

    def __init__(self, pool: LocalCandidatePool) -> None:
        self._pool = pool
        self._attempted: Sequence[Pick] = ()

    def reply(self, request: Request) -> Reply:
        """Do what a request asks for."""
        pool, candidates = self._pool, self._pool.candidates
        n_before = pool.n_read
        pool.commit_attempted(self._attempted[: request.n_committed])
        self._attempted = request.picks
        if request.updates:
            pool.apply(request.updates)
        if request.requested:
            index = pool.index_of(request.requested)
            none = request.limits.new_full((1,), -math.inf)
            sent = candidates.subset(index, 1) if len(index) else None
            return Reply(none, none, sent, pool.n_read - n_before)
        cached = pool.index_of(request.cached)
        candidates.attempt(request.picks)
        if request.picks:
            pool.n_read += len(candidates)
        excluded = candidates.excluded(request.n_picks).index_fill(0, cached, True)
        bounds = candidates.bounds(excluded, len(request.picks) + 1)
        largest = bounds.amax(1)
        # Picks after a wrong one will not be kept.
        gains = [pick.gain for pick in request.picks]
        wrong = [i for i, gain in enumerate(gains) if largest[i] >= gain]
        last = wrong[0] if wrong else len(gains)
        limits = request.limits[:, None]
        # Excluded candidates stay here also where there is no limit.
        reached = ((bounds >= limits) & (bounds > -math.inf))[: last + 1].any(0)
        index = torch.nonzero(reached).squeeze(1)
        if len(index) > request.count:
            index = index[torch.topk(bounds[last, index], request.count).indices].sort().values
        others = bounds.index_fill_(1, index, -math.inf).amax(1)
        sent = candidates.subset(index, 1) if len(index) else None
        return Reply(largest, others, sent, pool.n_read - n_before)


def merge_replies(replies: Iterable[Reply]) -> Reply:
    """Return the reply of several blocks together."""
    replies = list(replies)
    sent = [reply.sent for reply in replies if reply.sent is not None]
    largest, others = (
        torch.stack([getattr(reply, name) for reply in replies]).amax(0)
        for name in ("largest", "others")
    )
    n_read = sum(reply.n_read for reply in replies)
    return Reply(largest, others, GainState.concatenate(sent, 1) if sent else None, n_read)


class RemoteCandidatePool:
    """A pool of blocks that requests are sent to, and a cache of the likely picks.

    For the methods see :class:`skfishermask.selection.greedy.CandidatePool`. `send` is given a
    request for all blocks, and returns their merged reply; likely picks are spread over them, as a
    rule. `n_read` counts the embeddings that they have read.
    """

    def __init__(
        self,
        send: Callable[[Request], Reply],
        n_blocks: int,
        picks_per_round: int,
        device: torch.device,
    ) -> None:
        self._send, self._n_blocks = send, n_blocks
        self._n_states = picks_per_round + 1
        self._cache: GainState | None = None
        self._taken: Tensor | None = None
        # Upper bound of the gains of the candidates that are not cached.
        self._others_bound = torch.tensor(math.inf, dtype=torch.float64, device=device)
        self._size = 0
        self.n_read = 0
        self._number = 0
        self._n_committed = 0
        self._updates: list[Pick] = []
        self._reply: Reply | None = None

    def shortlist(self, count: int, n_picks: int) -> tuple[GainState, Tensor]:
        is_larger = self._cache is None or count > self._size
        self._size = count
        if is_larger:
            limits = self._others_bound.new_full((1,), -math.inf)
            reply = self._request(
                limits=limits, count=count, spread=_SHORTLIST_SPREAD, n_picks=n_picks
            )
            self._others_bound = reply.others[0]
            self._add_to_cache(reply.sent, count)
        if self._cache is None:
            raise ValueError("There is no candidate left to choose from.")
        self._taken = self._cache.taken.clone()
        return self._cache, self._others_bound

    def attempt(self, picks: Sequence[Pick], shortlist: GainState, others_bound: Tensor) -> Tensor:
        if not picks:
            return others_bound[None]
        limits = self._limits(len(picks) + 1)
        self._reply = self._request(
            picks=picks,
            limits=limits,
            count=_MAX_SENT,
            spread=_REPLY_SPREAD,
            n_picks=len(picks) + 1,
        )
        return self._reply.largest

    def commit(self, picks: Sequence[Pick], shortlist: GainState) -> None:
        shortlist.commit(len(picks))
        if self._taken is not None:
            shortlist.taken = self._taken
        if picks:
            positions = torch.stack([pick.position for pick in picks])
            shortlist.taken = shortlist.taken | torch.isin(shortlist.positions, positions)
        reply, self._reply = self._reply, None
        if reply is None:
            return
        if reply.sent is not None:
            reply.sent.apply(picks)
        self._n_committed = len(picks)
        self._others_bound = reply.others[min(len(picks), len(reply.others) - 1)]
        self._add_to_cache(reply.sent, self._size)

    def apply(self, picks: Sequence[Pick]) -> None:
        self._updates += picks

    def rows(self, positions: Sequence[int]) -> Tensor:
        sent = self._request(requested=positions).sent
        if sent is None:
            raise KeyError(f"No block has the positions {positions}.")
        index_of = {position: i for i, position in enumerate(sent.positions.tolist())}
        index = torch.tensor([index_of[position] for position in positions])
        return sent.rows(index.to(sent.positions.device))

    def _limits(self, n_states: int) -> Tensor:
        """Return the least bound of a likely pick in each state."""
        cache = self._cache
        if cache is None:
            return self._others_bound.new_full((n_states,), -math.inf)
        bounds = cache.bounds(cache.taken, n_states)
        return torch.topk(bounds, min(_LIKELY_RANK, bounds.shape[1])).values[:, -1]

    def _add_to_cache(self, sent: GainState | None, size: int) -> None:
        several = [one for one in (self._cache, sent) if one is not None]
        if not several:
            return
        cache = GainState.concatenate(several, self._n_states)
        if len(cache) > _MAX_CACHE_GROWTH * size:
            bounds = cache.bounds(cache.taken)
            index = torch.topk(bounds, size).indices.sort().values
            left = bounds.index_fill(0, index, -math.inf).amax()
            self._others_bound = torch.maximum(self._others_bound, left)
            cache = cache.subset(index, self._n_states)
        self._cache = cache

    def _request(
        self,
        *,
        picks: Sequence[Pick] = (),
        requested: Sequence[int] = (),
        limits: Tensor | None = None,
        count: int = 0,
        spread: float = 1.0,
        n_picks: int = 1,
    ) -> Reply:
        no_limit = self._others_bound.new_full((1,), math.inf)
        request = Request(
            number=self._number,
            n_committed=self._n_committed,
            updates=self._updates,
            picks=picks,
            cached=[] if self._cache is None else self._cache.positions.tolist(),
            requested=requested,
            limits=no_limit if limits is None else limits,
            count=min(count, math.ceil(spread * count / self._n_blocks)),
            n_picks=n_picks,
        )
        self._number, self._n_committed, self._updates = self._number + 1, 0, []
        reply = self._send(request)
        self.n_read += reply.n_read
        return reply
