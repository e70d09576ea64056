"""Progress of long work: seconds by step, and bars on a terminal or lines in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol, Self, TypeVar

import torch
from tqdm.asyncio import tqdm as terminal_tqdm
from tqdm.auto import tqdm

T = TypeVar("T")
# A step that takes longer than this writes more than one line into a log.
_SECONDS_PER_LINE = 60.0


class Bar(Protocol):
    """A progress bar."""

    def update(self, n: int = 1) -> object:
        """Advance by n items."""


class _NoBar:
    """A bar that shows nothing."""

    def update(self, n: int = 1) -> None:
        pass


class _LogLines:
    """A bar for a log: a line when all is done or given up, and one a minute before."""

    def __init__(self, total: int, text: str) -> None:
        self._total, self._text = total, text
        self._done = 0
        self._begun = self._written = time.perf_counter()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._done < self._total:
            self._write()

    def update(self, n: int = 1) -> None:
        self._done += n
        is_late = time.perf_counter() - self._written > _SECONDS_PER_LINE
        if is_late or self._done >= self._total:
            self._write()

    def _write(self) -> None:
        self._written = time.perf_counter()
        seconds = self._written - self._begun
        print(f"{self._text}: {self._done}/{self._total}, {seconds:.1f} s", file=sys.stderr)


def progress_bar(
    total: int, text: str, unit: str, *, is_shown: bool
) -> AbstractContextManager[Bar]:
    """Return a bar on a terminal or in a notebook, lines in a log, or one that shows nothing."""
    if not is_shown:
        # A disabled bar of tqdm starts its monitor thread all the same.
        return nullcontext(_NoBar())
    if tqdm is terminal_tqdm and not sys.stderr.isatty():
        return _LogLines(total, text)
    shown: AbstractContextManager[Bar] = tqdm(total=total, desc=text, unit=unit)
    return shown


class Progress:
    """The steps of one query, with progress bars if `is_shown`; `seconds` has the time of each."""

    def __init__(self, is_shown: bool, device: torch.device) -> None:
        self._is_shown = is_shown
        self._device = device  # of the net: what is left over there belongs to the step
        self.seconds: dict[str, float] = {}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Time a step."""
        start = time.perf_counter()
        yield
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.seconds[name] = time.perf_counter() - start

    def bar(self, total: int, text: str, unit: str) -> AbstractContextManager[Bar]:
        """Return a bar to update by hand."""
        return progress_bar(total, text, unit, is_shown=self._is_shown)

    def each(self, items: Iterable[T], total: int, text: str) -> Iterator[T]:
        """Yield the items, with a bar that advances with them."""
        with self.bar(total, text, "batch") as bar:
            for item in items:
                yield item
                bar.update(1)

    def tell(self, text: str) -> None:
        """Write a line between the bars."""
        if self._is_shown:
            print(text, file=sys.stderr)
