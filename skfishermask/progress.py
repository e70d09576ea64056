"""What a query tells while it runs: seconds by step, progress bars, and what is still to come."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, TypeVar

import torch
from tqdm.auto import tqdm

T = TypeVar("T")
# The embedding is timed for so long before it is told how long it will take.
_SECONDS_TIMED = 1.0


class Bar(Protocol):
    """A progress bar."""

    def update(self, n: int = 1) -> object:
        """Go on by so many."""


class Progress:
    """The steps of one query.

    Parameters
    ----------
    is_shown : bool
        Whether there are progress bars.
    device : torch.device
        Of the net: what is left over there belongs to the step.

    Attributes
    ----------
    seconds : dict of str to float
        By step.
    """

    def __init__(self, is_shown: bool, device: torch.device) -> None:
        self._is_shown = is_shown
        self._device = device
        self.seconds: dict[str, float] = {}
        self._expected: tuple[dict[str, float], str] | None = None
        self._timed: list[tuple[float, int]] = []

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Time a step."""
        start = time.perf_counter()
        yield
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.seconds[name] = time.perf_counter() - start

    def bar(self, total: int, text: str, unit: str) -> AbstractContextManager[Bar]:
        """Give a bar to update by hand."""
        shown: AbstractContextManager[Bar] = tqdm(
            total=total, desc=text, unit=unit, disable=not self._is_shown
        )
        return shown

    def each(self, items: Iterable[T], total: int, text: str) -> Iterable[T]:
        """Give the items, with a bar that goes on with them."""
        return tqdm(items, total=total, desc=text, unit="batch") if self._is_shown else items

    def expect(self, seconds: Mapping[str, float], memory: str) -> None:
        """Say, just before the pool is embedded, what the query will take.

        Parameters
        ----------
        seconds : mapping of str to float
            Of the steps after the embedding.
        memory : str
            What is to be told beside the seconds.
        """
        self._expected = dict(seconds), memory
        self._timed = [(time.perf_counter(), 0)]

    def embedded(self, n: int, total: int) -> None:
        """Take note that so many of the pool are embedded; tell once what is expected."""
        if self._expected is None:
            return
        self._timed.append((time.perf_counter(), n))
        # In the first batch the network's operations are found out: the others are faster.
        start, (first, n_first), now = self._timed[0][0], self._timed[1], self._timed[-1][0]
        if n < total and now - first < _SECONDS_TIMED:
            return
        left = (total - n) * (now - first) / max(1, n - n_first)
        seconds, memory = self._expected
        diagonal = self.seconds["diagonal"]
        steps = {"Fisher diagonal": diagonal, "Fisher embedding": now - start + left} | seconds
        text = ", ".join(f"{name} {_duration(value)}" for name, value in steps.items())
        tqdm.write(f"Expected: {text}; {memory}.", file=sys.stderr)
        self._expected = None


def _duration(seconds: float) -> str:
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"
