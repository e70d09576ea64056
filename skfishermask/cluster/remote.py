"""A pool out of reach: likely picks are kept at hand, and the rest is asked as rarely as possible.

Where it costs time to reach the blocks of a pool, one question carries all that they are to hear,
and its answer brings the candidates that have become likely picks. As long as the picks of a round
are right there is one question for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from skfishermask.selection import GainState, LocalCandidatePool, Pick

# The shortlist grows to so many times its size before the least likely leave it.
_SLACK = 3
# Candidates that come with an answer to attempted steps, about.
_MOST = 48
# Blocks may send so many times their share of what one block alone would: of a whole shortlist, and
# of those that come later, which are few.
_WIDE, _SPREAD = 1.25, 2
# Others are likely picks if they would be among so many best on the shortlist.
_RANK = 16


@dataclass(frozen=True)
class Request:
    """What all blocks of a pool are told and asked at a time.

    Attributes
    ----------
    number : int
        How many questions there were before this one.
    keep : int
        How many steps of the last question's attempt were right.
    updates : sequence of Pick
        To apply for good, after these.
    steps : sequence of Pick
        To attempt, after these.
    known : sequence of int
        Positions that the asker looks after: never to send and never to count.
    wanted : sequence of int
        Positions to send and nothing else, if they are the block's; those taken too.
    limits : Tensor of shape (len(steps) + 1,), float64
        Candidates to send: those whose gains may reach a limit, up to the first step that they
        show to be wrong.
    count : int
        How many to send at most, of each block.
    n_picks : int
        Picks to come before the next question.
    """

    number: int
    keep: int
    updates: Sequence[Pick]
    steps: Sequence[Pick]
    known: Sequence[int]
    wanted: Sequence[int]
    limits: Tensor
    count: int
    n_picks: int

    @property
    def n_bytes(self) -> int:
        """Size of the tensors."""
        steps = sum(step.factors.nbytes for step in (*self.updates, *self.steps))
        return steps + 8 * (len(self.known) + len(self.wanted))

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Request:
        """Give the question on another device, with its steps in another precision."""
        return replace(
            self,
            updates=[step.to(device, dtype) for step in self.updates],
            steps=[step.to(device, dtype) for step in self.steps],
            limits=self.limits.to(device),
        )


@dataclass(frozen=True)
class Reply:
    """What a block, or several, say to a question.

    Attributes
    ----------
    largest : Tensor of shape (len(steps) + 1,), float64
        Largest gains that candidates may have that are not known, before the first step and after
        each; minus infinity where there are none.
    others : Tensor of shape (len(steps) + 1,), float64
        What those that are not sent either do not exceed.
    sent : GainState or None
        Those that are sent, as they were before the first step.
    n_read : int
        Candidates whose embeddings were read for it.
    """

    largest: Tensor
    others: Tensor
    sent: GainState | None
    n_read: int

    @property
    def n_bytes(self) -> int:
        """Size of the tensors."""
        return 2 * self.largest.nbytes + (0 if self.sent is None else self.sent.n_bytes)

    def to(self, device: torch.device | str) -> Reply:
        """Give the answer on another device."""
        sent = None if self.sent is None else self.sent.to(device)
        return Reply(self.largest.to(device), self.others.to(device), sent, self.n_read)


class Block:
    """A share of the pool, which answers questions.

    Parameters
    ----------
    pool : LocalCandidatePool
        Its candidates, in the state that the first question expects.
    """

    def __init__(self, pool: LocalCandidatePool) -> None:
        self._pool = pool
        self._attempted: Sequence[Pick] = ()

    def answer(self, question: Request) -> Reply:
        """Answer a question."""
        pool, everyone = self._pool, self._pool.candidates
        n_before = pool.n_read
        pool.confirm(self._attempted[: question.keep])
        self._attempted = question.steps
        if question.updates:
            pool.advance(question.updates)
        if question.wanted:
            where = pool.where(question.wanted)
            none = question.limits.new_full((1,), -math.inf)
            sent = everyone.subset(where, 1) if len(where) else None
            return Reply(none, none, sent, pool.n_read - n_before)
        known = pool.where(question.known)
        everyone.attempt(question.steps)
        if question.steps:
            pool.n_read += len(everyone)
        out = everyone.out(question.n_picks).index_fill(0, known, True)
        bounds = everyone.bounds(out, len(question.steps) + 1)
        largest = bounds.amax(1)
        # What comes after a wrong step will not be kept.
        gains = [step.gain for step in question.steps]
        wrong = [i for i, gain in enumerate(gains) if largest[i] >= gain]
        last = wrong[0] if wrong else len(gains)
        limits = question.limits[:, None]
        # Also where there is no limit, those that cannot be picked any more stay here.
        reached = ((bounds >= limits) & (bounds > -math.inf))[: last + 1].any(0)
        index = torch.nonzero(reached).squeeze(1)
        if len(index) > question.count:
            index = index[torch.topk(bounds[last, index], question.count).indices].sort().values
        others = bounds.index_fill_(1, index, -math.inf).amax(1)
        sent = everyone.subset(index, 1) if len(index) else None
        return Reply(largest, others, sent, pool.n_read - n_before)


def merged(answers: Iterable[Reply]) -> Reply:
    """Make one answer of those of several blocks."""
    answers = list(answers)
    sent = [answer.sent for answer in answers if answer.sent is not None]
    largest, others = (
        torch.stack([getattr(answer, name) for answer in answers]).amax(0)
        for name in ("largest", "others")
    )
    n_read = sum(answer.n_read for answer in answers)
    return Reply(largest, others, GainState.joined(sent, 1) if sent else None, n_read)


class RemoteCandidatePool:
    """A pool of blocks that are a question away; the likely candidates are at hand.

    For the methods see :class:`skfishermask.selection.greedy.CandidatePool`.

    Parameters
    ----------
    ask : callable
        Puts a question to all blocks of the pool and gives their answer.
    n_blocks : int
        How many there are; likely picks are spread over them, as a rule.
    picks_a_round : int
        Steps that are attempted at a time, at most.
    device : torch.device
        Where the picks are made.

    Attributes
    ----------
    n_read : int
        Candidates whose embeddings the blocks read since the start.
    """

    def __init__(
        self,
        ask: Callable[[Request], Reply],
        n_blocks: int,
        picks_a_round: int,
        device: torch.device,
    ) -> None:
        self._ask, self._n_blocks = ask, n_blocks
        self._n_states = picks_a_round + 1
        self._near: GainState | None = None
        self._taken: Tensor | None = None
        # What the candidates that are not at hand do not exceed.
        self._rest = torch.tensor(math.inf, dtype=torch.float64, device=device)
        self._size = 0
        self.n_read = 0
        self._number = 0
        self._keep = 0
        self._updates: list[Pick] = []
        self._answer: Reply | None = None

    def shortlist(  # noqa: D102, see CandidatePool
        self, count: int, n_picks: int
    ) -> tuple[GainState, Tensor]:
        wider = self._near is None or count > self._size
        self._size = count
        if wider:
            limits = self._rest.new_full((1,), -math.inf)
            answer = self._put(limits=limits, count=count, spread=_WIDE, n_picks=n_picks)
            self._rest = answer.others[0]
            self._take_in(answer.sent, count)
        if self._near is None:
            raise ValueError("There is no candidate left to choose from.")
        self._taken = self._near.taken.clone()
        return self._near, self._rest

    def attempt(  # noqa: D102, see CandidatePool
        self, steps: Sequence[Pick], short: GainState, rest: Tensor
    ) -> Tensor:
        if not steps:
            return rest.expand(len(steps) + 1)
        limits = self._limits(len(steps) + 1)
        self._answer = self._put(
            steps=steps, limits=limits, count=_MOST, spread=_SPREAD, n_picks=len(steps) + 1
        )
        return self._answer.largest

    def keep(self, taken: Sequence[Pick], short: GainState) -> None:  # noqa: D102, see CandidatePool
        short.keep(len(taken))
        if self._taken is not None:
            short.taken = self._taken
        if taken:
            positions = torch.stack([step.position for step in taken])
            short.taken = short.taken | torch.isin(short.positions, positions)
        answer, self._answer = self._answer, None
        if answer is None:
            return
        if answer.sent is not None:
            answer.sent.catch_up(taken)
        self._keep = len(taken)
        self._rest = answer.others[min(len(taken), len(answer.others) - 1)]
        self._take_in(answer.sent, self._size)

    def advance(self, steps: Sequence[Pick]) -> None:  # noqa: D102, see CandidatePool
        self._updates += steps

    def rows(self, positions: Sequence[int]) -> Tensor:  # noqa: D102, see CandidatePool
        sent = self._put(wanted=positions).sent
        if sent is None:
            raise KeyError(f"No block has the positions {positions}.")
        where = {position: i for i, position in enumerate(sent.positions.tolist())}
        index = torch.tensor([where[position] for position in positions])
        return sent.rows(index.to(sent.positions.device))

    def _limits(self, n_states: int) -> Tensor:
        """Give the least bound that makes a likely pick, in each state."""
        near = self._near
        if near is None:
            return self._rest.new_full((n_states,), -math.inf)
        bounds = near.bounds(near.taken, n_states)
        return torch.topk(bounds, min(_RANK, bounds.shape[1])).values[:, -1]

    def _take_in(self, sent: GainState | None, size: int) -> None:
        blocks = [block for block in (self._near, sent) if block is not None]
        if not blocks:
            return
        near = GainState.joined(blocks, self._n_states)
        if len(near) > _SLACK * size:
            bounds = near.bounds(near.taken)
            index = torch.topk(bounds, size).indices.sort().values
            left = bounds.index_fill(0, index, -math.inf).amax()
            self._rest = torch.maximum(self._rest, left)
            near = near.subset(index, self._n_states)
        self._near = near

    def _put(
        self,
        *,
        steps: Sequence[Pick] = (),
        wanted: Sequence[int] = (),
        limits: Tensor | None = None,
        count: int = 0,
        spread: float = 1.0,
        n_picks: int = 1,
    ) -> Reply:
        question = Request(
            number=self._number,
            keep=self._keep,
            updates=self._updates,
            steps=steps,
            known=[] if self._near is None else self._near.positions.tolist(),
            wanted=wanted,
            limits=self._rest.new_full((1,), math.inf) if limits is None else limits,
            count=min(count, math.ceil(spread * count / self._n_blocks)),
            n_picks=n_picks,
        )
        self._number, self._keep, self._updates = self._number + 1, 0, []
        answer = self._ask(question)
        self.n_read += answer.n_read
        return answer
