"""Ctrl-C at any moment of a read or a query leaves no trace."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch

from skfishermask import FisherMaskSampler, fisher_diagonal
from skfishermask.fisher import embedding_blocks
from skfishermask.jacobian import interrupts, isolation
from skfishermask.jacobian.interrupts import Reversible
from skfishermask.jacobian.isolation import exact_mode, isolated, seeded
from tests.jacobian.test_isolation import Careless, careless, changed, mask_of, state
from tests.nets import digits, fitted, logits_net

X = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """Make Ctrl-C raise where a shell has made the process ignore it, in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def read(module: Careless) -> None:
    with seeded(1), isolated(module, module.parameters()), exact_mode():
        torch.rand(1)


def read_inside_a_read(module: Careless) -> None:
    """As `isolated` and `seeded` overlap where a net is queried in a query."""
    with isolated(module, [module.hidden.weight]), exact_mode():
        read(module)


def read_in_part(module: Careless) -> None:
    """As a loop over an embedding does that is left early."""
    blocks = embedding_blocks(module, [X[:3], X[3:]], mask_of(module))
    next(blocks)
    blocks.close()


class Interrupt:
    """Sends SIGINT at the n-th instruction that is run in the code that changes and restores."""

    def __init__(self, number: int) -> None:
        self.number, self.count = number, 0

    def trace(self, frame: FrameType, event: str, value: Any) -> Any:
        if frame.f_code.co_filename not in (interrupts.__file__, isolation.__file__):
            return None
        frame.f_trace_opcodes = True
        self.count += 1
        if self.count == self.number:
            signal.raise_signal(signal.SIGINT)
        return self.trace


@contextmanager
def tracing(interrupt: Interrupt) -> Iterator[None]:
    before = sys.gettrace()
    sys.settrace(interrupt.trace)
    try:
        yield
    finally:
        sys.settrace(before)


def n_instructions(work: Callable[[Careless], None]) -> int:
    counter = Interrupt(-1)
    with tracing(counter):
        work(careless())
    return counter.count


@pytest.mark.parametrize(
    ("work", "part"),
    [*((read, part) for part in range(4)), (read_inside_a_read, 0), (read_in_part, 1)],
)
def test_an_interrupt_at_any_instruction_leaves_no_trace(
    work: Callable[[Careless], None], part: int
) -> None:
    numbers = np.linspace(1, n_instructions(work), 160).astype(int)[part::4]
    module, handler = careless(), signal.getsignal(signal.SIGINT)
    before = state(module)
    for number in numbers.tolist():
        with pytest.raises(KeyboardInterrupt), tracing(Interrupt(number)):
            work(module)
        assert changed(before, state(module)) == [], number
        assert signal.getsignal(signal.SIGINT) is handler, number


def noted(log: list[str], what: str) -> Callable[[ExitStack], None]:
    def change(stack: ExitStack) -> None:
        log.append(f"{what} on")
        stack.callback(log.append, f"{what} off")

    return change


def test_an_interrupt_while_closing_waits_for_all_that_is_being_closed() -> None:
    log: list[str] = []

    def change(stack: ExitStack) -> None:
        stack.callback(log.append, "outer off")
        inner = Reversible(noted(log, "inner"))
        stack.callback(signal.raise_signal, signal.SIGINT)
        stack.enter_context(inner)
        stack.callback(signal.raise_signal, signal.SIGINT)

    with pytest.raises(KeyboardInterrupt), Reversible(change):
        log.append("open")
    assert log == ["inner on", "open", "inner off", "outer off"]


def test_an_interrupt_while_opening_undoes_what_was_done() -> None:
    log: list[str] = []

    def change(stack: ExitStack) -> None:
        noted(log, "one")(stack)
        signal.raise_signal(signal.SIGINT)
        noted(log, "two")(stack)

    with pytest.raises(KeyboardInterrupt), Reversible(change):
        log.append("open")
    assert log == ["one on", "two on", "two off", "one off"]


def test_the_users_own_handler_is_called_and_restored() -> None:
    seen: list[int] = []

    def own(number: int, frame: FrameType | None) -> None:
        seen.append(number)

    before = signal.signal(signal.SIGINT, own)
    try:
        with Reversible(lambda stack: None):
            signal.raise_signal(signal.SIGINT)
            assert len(seen) == 1
            with Reversible(lambda stack: signal.raise_signal(signal.SIGINT)):
                assert len(seen) == 2
        assert signal.getsignal(signal.SIGINT) is own
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with Reversible(lambda stack: None):
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_another_exception_while_closing_skips_nothing() -> None:
    """As a handler of SIGALRM may raise at any moment."""
    log: list[str] = []

    def fail() -> None:
        raise TimeoutError

    def change(stack: ExitStack) -> None:
        noted(log, "one")(stack)
        stack.callback(fail)
        noted(log, "two")(stack)

    with pytest.raises(TimeoutError), Reversible(change):
        pass
    assert log == ["one on", "two on", "two off", "one off"]


def test_contexts_of_threads_leave_the_handler_alone() -> None:
    handler = signal.getsignal(signal.SIGINT)
    opened, done = threading.Event(), threading.Event()

    def hold() -> None:
        with Reversible(lambda stack: None):
            opened.set()
            done.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    assert opened.wait(60)
    assert signal.getsignal(signal.SIGINT) is handler
    with Reversible(lambda stack: None):
        pass
    assert signal.getsignal(signal.SIGINT) is handler
    done.set()
    thread.join()


def timed_interrupts(work: Callable[[], object], n: int, check: Callable[[int], None]) -> int:
    """Interrupt a piece of work at n random moments; return how often it was cut short."""
    began = time.perf_counter()
    work()
    whole, rng, n_cut = time.perf_counter() - began, np.random.default_rng(0), 0
    for number in range(n):
        timer = threading.Timer(rng.uniform(0, whole), os.kill, (os.getpid(), signal.SIGINT))
        try:
            timer.start()
            work()
            timer.join()
            time.sleep(0.001)
        except KeyboardInterrupt:
            n_cut += 1
        timer.join()
        check(number)
    return n_cut


@pytest.mark.slow
@pytest.mark.parametrize("n", [600])
def test_timed_interrupts_of_a_read(n: int) -> None:
    module = careless()
    before = state(module)

    def check(number: int) -> None:
        assert changed(before, state(module)) == [], number

    n_cut = timed_interrupts(lambda: fisher_diagonal(module, [X[:3], X[3:]]), n, check)
    print(f"{n_cut} of {n} reads interrupted, no trace")
    assert n_cut > n // 2


@pytest.mark.slow
@pytest.mark.parametrize("n", [100])
def test_timed_interrupts_of_a_query(n: int) -> None:
    images, _ = digits()
    net = fitted(logits_net())
    before = state(net.module_)
    sampler = FisherMaskSampler(mask_fraction=60, coverage_share=0.5, random_state=0)

    def check(number: int) -> None:
        assert changed(before, state(net.module_)) == [], number

    def query() -> None:
        sampler(net, images[60:140], 6, X_labeled=images[:60])

    n_cut = timed_interrupts(query, n, check)
    print(f"{n_cut} of {n} queries interrupted, no trace")
    assert n_cut > n // 2
