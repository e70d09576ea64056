"""What a query tells while it runs: seconds by step, and progress bars."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, TypeVar

import torch
from tqdm.auto import tqdm

T = TypeVar("T")


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
