"""A pool that is asked questions: the greedy choice, with few of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from skfishermask.candidates import Start, Step
from skfishermask.embedded import EmbeddedBlock
from skfishermask.greedy import GreedyState, InformationInverse, choose, greedy
from skfishermask.shortlist import Answer, Question, Shortlist, answer, merged, moved
from tests.test_selection import cut, problem

QUESTION = Question(
    number=0,
    keep=0,
    updates=[],
    steps=[],
    known=[],
    wanted=[],
    gains=torch.empty(0),
    limits=None,
    count=0,
)


def asked(blocks: list[EmbeddedBlock], log: list[Any]) -> Callable[[Question], Answer]:
    def ask(question: Question) -> Answer:
        assert question.number == len(log)
        found = merged([answer(block, question) for block in blocks])
        log.append((question, found))
        return found

    return ask


@pytest.mark.parametrize("speculative", [1, 4, 9])
@pytest.mark.parametrize("size", [1, 20, 400])
@pytest.mark.parametrize("decay", [0.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_greedy_choice(
    dtype: torch.dtype, decay: float, size: int, speculative: int, device: str
) -> None:
    embedding, target = problem(400, 3, 60, decay=decay)
    embedding, target = embedding.to(device, dtype), target.to(device)
    start = Start(1.0, target)
    options: dict[str, Any] = {"forced": [5, 300, 7, 8, 9, 10, 11, 12, 390]}
    expected = choose([EmbeddedBlock(embedding, start)], start, target, 30, 45, **options)
    blocks = cut(embedding, start, 100, 101, 250)
    pool = Shortlist(400, asked(blocks, []), size)
    found = choose([pool], start, target, 30, 45, speculative=speculative, **options)
    assert [pick.position for pick in found] == [pick.position for pick in expected]
    gains = [pick.gain for pick in expected]
    assert [pick.gain for pick in found] == pytest.approx(gains, rel=1e-11)


def test_few_questions_and_few_rows() -> None:
    embedding, target = problem(2000, 3, 60)
    log: list[Any] = []
    pool = Shortlist(2000, asked(cut(embedding, Start(1.0, target), 700), log), 100)
    picks = greedy([pool], InformationInverse(1.0), target, 100, speculative=8)
    assert len(picks) == 100
    assert len(log) < 50
    assert sum(len(given.sent) for _, given in log if given.sent is not None) < 1000


def test_pool_smaller_than_the_shortlist() -> None:
    embedding, target = problem(12, 3, 20)
    pool = Shortlist(12, asked(cut(embedding, Start(1.0, target), 5), []), 100)
    picks = greedy([pool], InformationInverse(1.0), target, 12, speculative=4)
    assert sorted(pick.position for pick in picks) == list(range(12))


def test_equal_samples_in_order_of_position() -> None:
    embedding, target = problem(50, 2, 10)
    embedding[:] = embedding[:1]
    pool = Shortlist(50, asked(cut(embedding, Start(1.0, target), 20), []), 4)
    picks = greedy([pool], InformationInverse(1.0), target, 9, speculative=3)
    assert [pick.position for pick in picks] == list(range(9))


# --- Answers --------------------------------------------------------------------------


def block_and_steps(n_steps: int) -> tuple[EmbeddedBlock, list[Step], Tensor]:
    """Give a block, steps of the greedy choice, and the bounds at every state."""
    embedding, target = problem(40, 2, 12)
    start = Start(1.0, target)
    state = GreedyState([EmbeddedBlock(embedding, start)], InformationInverse(1.0), target, 1)
    steps = []
    for _ in range(n_steps):
        solved, _ = state.pick()
        steps.append(Step(state.absorb(solved), (), solved.state.gain))
        state.update([steps[-1].update])
    bounds = torch.empty(n_steps + 1, 40, dtype=torch.float64)

    def look(number: int, part: slice, values: Tensor) -> None:
        bounds[number, part] = values

    EmbeddedBlock(embedding, start).watch(steps, (), look)
    return EmbeddedBlock(embedding, start), steps, bounds


def question(steps: list[Step], **more: Any) -> Question:
    gains = torch.full((len(steps),), math.inf, dtype=torch.float64)
    limits = torch.full((len(steps) + 1,), math.inf, dtype=torch.float64)
    told = {"steps": [step.update for step in steps], "gains": gains, "limits": limits}
    return replace(QUESTION, **(told | {"count": 40} | more))


def test_sends_what_reaches_a_limit_as_it_was_before() -> None:
    block, steps, bounds = block_and_steps(3)
    limits = bounds.quantile(0.9, dim=1)
    given = answer(block, question(steps, limits=limits))
    assert given.sent is not None
    expected = torch.nonzero((bounds >= limits[:, None]).any(0)).flatten().tolist()
    assert list(given.sent.positions) == expected
    before = given.sent.best(40)
    expected_bounds = bounds[0, sorted(expected)].sort(descending=True).values
    torch.testing.assert_close(before.gains + before.errors, expected_bounds)
    torch.testing.assert_close(given.largest, bounds.amax(1))
    left = [i for i in range(40) if i not in expected]
    assert (bounds[:, left].amax(1) <= given.others).all()


def test_sends_no_more_than_asked_for() -> None:
    block, steps, bounds = block_and_steps(3)
    given = answer(block, question(steps, limits=bounds.amin(1), count=5))
    assert given.sent is not None
    assert len(given.sent) == 5
    assert torch.equal(given.others, given.largest)
    assert set(given.sent.positions) == set(bounds[-1].topk(5).indices.tolist())


def test_states_after_a_wrong_step_do_not_count() -> None:
    block, steps, bounds = block_and_steps(3)
    only_last = torch.full((4,), math.inf, dtype=torch.float64)
    only_last[3] = bounds[3].amin()
    gains = torch.full((3,), math.inf, dtype=torch.float64)
    assert answer(block, question(steps, limits=only_last, gains=gains)).sent is not None
    gains[1] = bounds[1].amax()
    block, steps, _ = block_and_steps(3)
    assert answer(block, question(steps, limits=only_last, gains=gains)).sent is None


def test_known_candidates_stay_where_they_are() -> None:
    block, steps, bounds = block_and_steps(2)
    best = bounds.amax(0).topk(6).indices.tolist()
    given = answer(block, question(steps, limits=bounds.amin(1), known=best))
    assert given.sent is not None
    assert not set(best) & set(given.sent.positions)
    others = [i for i in range(40) if i not in best]
    torch.testing.assert_close(given.largest, bounds[:, others].amax(1))


def test_names_the_best_without_limits() -> None:
    block, _, bounds = block_and_steps(1)
    given = answer(block, replace(QUESTION, count=4, known=[int(bounds[0].argmax())]))
    assert given.sent is None
    assert given.best.positions.tolist() == bounds[0].topk(5).indices.tolist()[1:]
    assert float(given.others) == pytest.approx(float(bounds[0].topk(2).values[1]))


def test_wanted_are_sent_even_when_taken() -> None:
    block, steps, _ = block_and_steps(1)
    taken = steps[0].update.position
    told = replace(QUESTION, updates=[steps[0].update], wanted=[taken, 999])
    given = answer(block, told)
    assert given.sent is not None
    assert list(given.sent.positions) == [taken]
    assert len(given.sent.best(5).gains) == 0


def test_keep_takes_back_the_rest() -> None:
    block, steps, bounds = block_and_steps(3)
    answer(block, question(steps))
    given = answer(block, replace(question([]), keep=1))
    torch.testing.assert_close(given.largest, bounds[1].amax()[None])


def test_moved_and_sizes() -> None:
    _, steps, bounds = block_and_steps(2)
    told = question(steps, known=[1, 2, 3], limits=bounds.amin(1))
    there = moved(told, "cpu", torch.float32)
    assert {update.u.dtype for update in there.steps} == {torch.float32}
    assert told.n_bytes == 2 * 2 * 12 * 2 * 8 + 3 * 8
    assert there.n_bytes == 2 * 2 * 12 * 2 * 4 + 3 * 8
    assert moved(QUESTION, "cpu").limits is None


def test_joined_blocks_go_on_as_one() -> None:
    embedding, target = problem(60, 3, 20)
    start = Start(1.0, target)
    whole = EmbeddedBlock(embedding, start)
    low, high = cut(embedding, start, 25)
    parts = [high.subset([30, 40, 59]), low.subset([0, 24]), high.subset([31])]
    joined = EmbeddedBlock.joined(parts)
    assert list(joined.positions) == [0, 24, 30, 31, 40, 59]
    state = GreedyState([whole], InformationInverse(1.0), target, 1)
    update = state.absorb(state.pick()[0])
    joined.advance([update])
    whole.advance([update])
    found, expected = joined.best(6), whole.subset([0, 24, 30, 31, 40, 59]).best(6)
    assert torch.equal(found.positions, expected.positions)
    torch.testing.assert_close(found.gains, expected.gains)
    assert torch.equal(joined.rows(31), embedding[31].double())
