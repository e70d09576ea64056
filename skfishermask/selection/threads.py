"""One thread for small operations: several lose most of their time in waiting for each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from threadpoolctl import ThreadpoolController

T = TypeVar("T")


def in_one_thread(function: Callable[[], T]) -> T:
    """Call a function with one OpenMP thread, for the calling thread alone.

    ``torch.set_num_threads`` would count for other threads too. An interrupt that comes while the
    limit is removed, does not keep it: the removal is repeated.
    """
    libraries = ThreadpoolController().select(user_api="openmp").lib_controllers
    before = [library.get_num_threads() for library in libraries]

    def restore() -> None:
        for library, n_threads in zip(libraries, before, strict=True):
            library.set_num_threads(n_threads)

    try:
        for library in libraries:
            library.set_num_threads(1)
        return function()
    finally:
        try:
            restore()
        finally:
            restore()
