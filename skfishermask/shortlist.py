"""A pool out of reach: likely picks are kept at hand, and the rest is asked as rarely as possible.

Where it costs time to reach the blocks of a pool, one question carries all that they are to hear,
and its answer brings the candidates that have become likely picks. As long as the picks of an
attempt are right there is one question for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from skfishermask.candidates import Candidates, ExactState, Step, Update
from skfishermask.embedded import EmbeddedBlock

# The shortlist grows to so many times its size before the least likely leave it.
_SLACK = 3
# Candidates that one block sends in an answer, at most.
_MOST = 64
# Others are likely picks if they would be among so many best on the shortlist.
_RANK = 16


@dataclass(frozen=True)
class Question:
    """What all blocks of a pool are told and asked at a time.

    Attributes
    ----------
    number : int
        How many questions there were before this one.
    keep : int
        How many steps of the last question's attempt were right.
    updates : sequence of Update
        To apply for good, after these.
    steps : sequence of Update
        To attempt, after these.
    known : sequence of int
        Positions that the asker looks after: never to send and never to count.
    wanted : sequence of int
        Positions to send in any case, if they are the block's; those taken too.
    gains : Tensor of shape (len(steps),), float64
        If a candidate's ``gains + errors`` reach one before its step, that step is wrong.
    limits : Tensor of shape (len(steps) + 1,), float64, or None
        Candidates to send: those whose ``gains + errors`` reach a limit, up to the first step that
        they show to be wrong. None: send none, but name the best; then there are no steps.
    count : int
        How many to send, or to name, at most: of each block.
    """

    number: int
    keep: int
    updates: Sequence[Update]
    steps: Sequence[Update]
    known: Sequence[int]
    wanted: Sequence[int]
    gains: Tensor
    limits: Tensor | None
    count: int

    @property
    def n_bytes(self) -> int:
        """Size of the tensors.

        Returns
        -------
        int
            In bytes.
        """
        updates = sum(update.n_bytes for update in (*self.updates, *self.steps))
        return updates + 8 * (len(self.known) + len(self.wanted))


@dataclass(frozen=True)
class Answer:
    """What a block, or several, say to a question.

    Attributes
    ----------
    largest : Tensor of shape (len(steps) + 1,), float64
        Largest ``gains + errors`` of the candidates that are not known, before the first step and
        after each; minus infinity where there are none.
    others : Tensor of shape (len(steps) + 1,), float64
        What those that are not sent either do not exceed.
    best : Candidates
        The best that are not known, if no limits were given.
    sent : EmbeddedBlock or None
        Those that are sent, as they were before the first step.
    """

    largest: Tensor
    others: Tensor
    best: Candidates
    sent: EmbeddedBlock | None

    @property
    def n_bytes(self) -> int:
        """Size of the tensors.

        Returns
        -------
        int
            In bytes.
        """
        sent = 0 if self.sent is None else self.sent.n_bytes
        return sent + 2 * self.largest.nbytes + 3 * self.best.gains.nbytes

    def to(self, device: torch.device | str) -> Answer:
        """Give the answer on another device.

        Parameters
        ----------
        device : torch.device or str
            The device.

        Returns
        -------
        Answer
            The same there.
        """
        best = Candidates(*(x.to(device) for x in vars(self.best).values()))
        sent = None if self.sent is None else self.sent.to(device)
        return Answer(self.largest.to(device), self.others.to(device), best, sent)


def answer(block: EmbeddedBlock, question: Question) -> Answer:
    """Let a block answer a question.

    Parameters
    ----------
    block : EmbeddedBlock
        The block, which has heard all questions before this one.
    question : Question
        The question, with tensors on the block's device.

    Returns
    -------
    Answer
        On the block's device.
    """
    block.keep(question.keep)
    block.advance(question.updates)
    sent = [p for p in question.wanted if p in block]
    if question.limits is None:
        best = block.best(question.count, question.known)
        largest = (best.gains + best.errors)[:1]
        if not len(largest):
            largest = best.gains.new_full((1,), -math.inf)
        return _answer(block, largest, largest, best, sent)

    limits = question.limits
    bounds = limits.new_empty(len(limits), len(block))

    def look(number: int, part: slice, values: Tensor) -> None:
        bounds[number, part] = values

    block.watch([Step(update) for update in question.steps], question.known, look)
    largest = bounds.amax(1)
    # What comes after a wrong step will not be kept.
    wrong = torch.nonzero(largest[:-1] >= question.gains).flatten().tolist()
    last = wrong[0] if wrong else len(limits) - 1
    # Also where there is no limit, those that cannot be picked any more stay here.
    reached = (bounds >= limits[:, None]) & (bounds > -math.inf)
    index = torch.nonzero(reached[: last + 1].any(0)).flatten()
    others = torch.minimum(largest, limits)
    if len(index) > question.count:
        index = index[torch.topk(bounds[last, index], question.count).indices]
        others = largest
    sent += [block.positions[i] for i in index.tolist()]
    empty = Candidates(index[:0], limits[:0], limits[:0])
    return _answer(block, largest, others, empty, sent)


def _answer(
    block: EmbeddedBlock, largest: Tensor, others: Tensor, best: Candidates, sent: Sequence[int]
) -> Answer:
    part = block.snapshot(sorted(set(sent))) if sent else None
    return Answer(largest, others, best, part)


def merged(answers: Iterable[Answer]) -> Answer:
    """Make one answer of those of several blocks.

    Parameters
    ----------
    answers : iterable of Answer
        At least one, to the same question, on the same device.

    Returns
    -------
    Answer
        Of all of them together.
    """
    answers = list(answers)
    sent = [answer.sent for answer in answers if answer.sent is not None]
    parts = zip(*(vars(answer.best).values() for answer in answers), strict=True)
    return Answer(
        torch.stack([answer.largest for answer in answers]).amax(0),
        torch.stack([answer.others for answer in answers]).amax(0),
        Candidates(*map(torch.cat, parts)),
        EmbeddedBlock.joined(sent) if sent else None,
    )


class Shortlist:
    """A pool's candidates as one block: the likely picks at hand, the others a question away.

    For the methods see :class:`skfishermask.candidates.CandidateBlock`.

    Parameters
    ----------
    n : int
        Number of candidates. Their positions are 0 to n - 1.
    ask : callable
        Puts a question to all blocks of the pool and gives their answer.
    size : int
        How many candidates to keep at hand.
    """

    def __init__(self, n: int, ask: Callable[[Question], Answer], size: int) -> None:
        self._n = n
        self._ask = ask
        self._size = size
        self._near: EmbeddedBlock | None = None
        # Rows that were asked for, of samples that need not be on the shortlist.
        self._fetched: EmbeddedBlock | None = None
        # What the candidates that are not at hand do not exceed; after updates not known.
        self._others = math.inf
        self._stale = False
        self._number = 0
        self._keep = 0
        self._updates: list[Update] = []
        self._steps: Sequence[Step] = ()
        self._answer: Answer | None = None

    def __contains__(self, position: int) -> bool:
        return 0 <= position < self._n

    def best(  # noqa: D102, see CandidateBlock
        self, count: int, aside: Sequence[int] = ()
    ) -> Candidates:
        near = self._near
        if near is not None and self._stale:
            near = self._renew(near)
        found = None if near is None else near.best(count, aside)
        if found is None or not self._complete(found, count):
            least = self._size if near is None else 0
            found = self._widen(max(least, count + len(aside))).best(count, aside)
        return found

    def likely(self, count: int) -> Candidates:  # noqa: D102, see CandidateBlock
        near = self._at_hand()
        if self._stale:
            near = self._renew(near)
        found = near.best(count)
        return found if len(found.gains) else self.best(count)

    def subset(self, positions: Sequence[int]) -> EmbeddedBlock:  # noqa: D102, see CandidateBlock
        return self._at_hand().subset(positions)

    def fetch(self, positions: Sequence[int]) -> None:  # noqa: D102, see CandidateBlock
        missing = [p for p in positions if self._near is None or p not in self._near]
        if missing:
            self._fetched = self._put(wanted=missing).sent

    def rows(self, position: int) -> Tensor:  # noqa: D102, see CandidateBlock
        for block in (self._near, self._fetched):
            if block is not None and position in block:
                return block.rows(position)
        raise KeyError(f"The rows of position {position} were not fetched.")

    def correct(self, exact: ExactState) -> None:  # noqa: D102, see CandidateBlock
        # Those that are not at hand are good enough: what they are off by counts in their favour.
        if self._near is not None and exact.position in self._near:
            self._near.correct(exact)

    def advance(self, updates: Sequence[Update]) -> None:  # noqa: D102, see CandidateBlock
        if self._near is not None:
            self._near.advance(updates)
        self._updates += updates
        self._stale = True

    def attempt(  # noqa: D102, see CandidateBlock
        self, steps: Sequence[Step], aside: Sequence[int]
    ) -> Tensor:
        near = self._at_hand()
        bounds, limits = self._watch(near, steps)
        answer = self._put(steps=steps, limits=limits, near=near, count=_MOST)
        self._steps, self._answer = steps, answer
        others = set(near.positions).difference(aside)
        rivals = bounds[:, [i for i, p in enumerate(near.positions) if p in others]]
        rival = rivals.amax(1) if rivals.shape[1] else torch.full_like(answer.largest, -math.inf)
        return torch.maximum(rival, answer.largest)

    def keep(self, count: int) -> None:  # noqa: D102, see CandidateBlock
        answer, near = self._answer, self._near
        if answer is None or near is None:
            return
        near.keep(count)
        if answer.sent is not None:
            answer.sent.advance([step.update for step in self._steps[:count]])
        self._others = float(answer.others[count])
        self._take_in(near, answer.sent)
        self._keep, self._steps, self._answer = count, (), None

    def _at_hand(self) -> EmbeddedBlock:
        return self._widen(self._size) if self._near is None else self._near

    def _complete(self, found: Candidates, count: int) -> bool:
        """Tell whether nobody else belongs among the best that were found at hand."""
        if len(found.gains) < count:
            return self._others == -math.inf
        return float(found.gains[-1] + found.errors[-1]) >= self._others

    def _watch(self, near: EmbeddedBlock, steps: Sequence[Step]) -> tuple[Tensor, Tensor]:
        """Attempt steps at hand; give the bounds there, and those that make a likely pick."""
        bounds = torch.empty(len(steps) + 1, len(near), dtype=torch.float64, device=near.device)

        def look(number: int, part: slice, values: Tensor) -> None:
            bounds[number, part] = values

        near.watch(steps, (), look)
        n_free = int((bounds[0] > -math.inf).sum())
        rank = min(_RANK, n_free)
        limits = torch.topk(bounds, rank).values[:, -1] if rank else bounds.new_full(
            (len(bounds),), -math.inf
        )  # fmt: skip
        return bounds, limits

    def _renew(self, near: EmbeddedBlock) -> EmbeddedBlock:
        """Pass updates on, and take in the candidates that they make likely picks."""
        _, limits = self._watch(near, ())
        near.keep(0)
        answer = self._put(limits=limits, near=near, count=_MOST)
        self._stale = False
        self._others = float(answer.others[0])
        return self._take_in(near, answer.sent)

    def _widen(self, count: int) -> EmbeddedBlock:
        """Take in as many of the best candidates that are not at hand."""
        # One more than wanted: what is not named does not exceed what is not wanted.
        best = self._put(near=self._near, count=count + 1).best
        bounds = best.gains + best.errors
        order = torch.sort(bounds, descending=True, stable=True).indices
        wanted = best.positions[order[:count]].tolist()
        self._others = float(bounds[order[count]]) if len(order) > count else -math.inf
        self._stale = False
        sent = self._put(wanted=wanted).sent if wanted else None
        if self._near is None and sent is None:
            raise ValueError("There is no candidate left to choose from.")
        return self._take_in(self._near, sent, count)

    def _take_in(
        self, near: EmbeddedBlock | None, sent: EmbeddedBlock | None, least: int = 0
    ) -> EmbeddedBlock:
        blocks = [block for block in (near, sent) if block is not None]
        near = EmbeddedBlock.joined(blocks) if len(blocks) > 1 else blocks[0]
        size = max(self._size, least)
        if len(near) > _SLACK * size:
            best = near.best(size + 1)
            if len(best.gains) > size:
                left = float(best.gains[-1] + best.errors[-1])
                self._others = max(self._others, left)
            near = near.subset(sorted(best.positions[:size].tolist()))
        self._near = near
        return near

    def _put(
        self,
        *,
        steps: Sequence[Step] = (),
        near: EmbeddedBlock | None = None,
        wanted: Sequence[int] = (),
        limits: Tensor | None = None,
        count: int = 0,
    ) -> Answer:
        known = () if near is None else near.positions
        question = Question(
            number=self._number,
            keep=self._keep,
            updates=self._updates,
            steps=[step.update for step in steps],
            known=known,
            wanted=wanted,
            gains=torch.tensor([step.gain for step in steps], dtype=torch.float64),
            limits=limits,
            count=count,
        )
        self._number, self._keep, self._updates = self._number + 1, 0, []
        return self._ask(question)


def moved(
    question: Question, device: torch.device | str, dtype: torch.dtype | None = None
) -> Question:
    """Give a question with its updates on another device, or in another precision.

    Parameters
    ----------
    question : Question
        The question.
    device : torch.device or str
        The device.
    dtype : torch.dtype, optional
        Of the updates. None: as they are.

    Returns
    -------
    Question
        The same there.
    """
    return replace(
        question,
        updates=[update.to(device, dtype) for update in question.updates],
        steps=[update.to(device, dtype) for update in question.steps],
        gains=question.gains.to(device),
        limits=None if question.limits is None else question.limits.to(device),
    )
