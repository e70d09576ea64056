"""Changes that are undone in the end: an interrupt can delay that, but not skip it."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from types import CodeType, FrameType
from typing import Concatenate, ParamSpec

_Parameters = ParamSpec("_Parameters")
_Handler = Callable[[int, FrameType | None], object]


class Reversible:
    """A context that changes what others can see as it opens, and undoes it as it closes.

    While it is open, a handler of its own takes the SIGINT of Ctrl-C: what comes in the midst of
    opening or closing, from the first line to the last, is passed on to the handler before it once
    that is over. Other exceptions, raised by other signals' handlers, may come at any time: then
    what is left to undo is undone at a second attempt. Interrupts reach the main thread alone.

    The `change` registers what undoes it with the ExitStack that it is given. To undo it twice must
    do no harm.
    """

    def __init__(self, change: Callable[[ExitStack], None]) -> None:
        self._change = change
        self._stack = ExitStack()
        self._is_watched = False

    def __enter__(self) -> None:
        try:
            self._is_watched = _interrupts.watch()
            self._change(self._stack)
            _interrupts.deliver()
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *error: object) -> None:
        try:
            self._stack.close()
        finally:
            self._stack.close()
            is_watched, self._is_watched = self._is_watched, False
            _interrupts.leave(is_watched=is_watched)


def reversible(
    change: Callable[Concatenate[ExitStack, _Parameters], None],
) -> Callable[_Parameters, Reversible]:
    """Return a function of `change`'s arguments but the ExitStack that returns a Reversible."""

    @wraps(change)
    def context(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> Reversible:
        return Reversible(lambda stack: change(stack, *args, **kwargs))

    return context


class _Interrupts:
    """The handler of SIGINT while a context is open in the main thread."""

    def __init__(self) -> None:
        self._before: _Handler | None = None
        self._n_open = 0
        self._is_pending = False
        self._critical: set[CodeType] = {
            function.__code__ for function in (Reversible.__enter__, Reversible.__exit__)
        }

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self._depth(frame) > 0:
            self._is_pending = True
        elif self._before is not None:
            self._before(number, frame)

    def _depth(self, frame: FrameType | None) -> int:
        """Count the contexts that are being opened or closed."""
        depth = 0
        while frame is not None:
            depth += frame.f_code in self._critical
            frame = frame.f_back
        return depth

    def watch(self) -> bool:
        """Become the handler; return whether this is the main thread and one can be."""
        if threading.current_thread() is not threading.main_thread():
            return False
        handler = signal.getsignal(signal.SIGINT)
        if handler is not self:
            if not callable(handler):
                return False
            self._before = handler
            signal.signal(signal.SIGINT, self)
        self._n_open += 1
        return True

    def leave(self, *, is_watched: bool) -> None:
        """Restore the previous handler after the last context, and deliver pending interrupts."""
        self._n_open -= is_watched
        if threading.current_thread() is not threading.main_thread():
            return
        is_handler: bool = signal.getsignal(signal.SIGINT) is self
        if self._n_open == 0 and is_handler:
            signal.signal(signal.SIGINT, self._before)
        self.deliver()

    def deliver(self) -> None:
        """Pass on an interrupt that has come meanwhile, unless more is being opened or closed."""
        if threading.current_thread() is not threading.main_thread() or not self._is_pending:
            return
        frame = sys._getframe()
        if self._depth(frame) > 1 or self._before is None:
            return
        self._is_pending = False
        self._before(signal.SIGINT, frame)


_interrupts = _Interrupts()
