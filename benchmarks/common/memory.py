"""How much memory a process takes.

Workers of a cluster import this, so nothing large is imported.
"""

from __future__ import annotations

import resource
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import psutil


def peak_resident() -> int:
    """Return the largest resident size of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def resident() -> int:
    """Return the resident size of this process now, in bytes."""
    return int(psutil.Process().memory_info().rss)


def private() -> int:
    """Return resident bytes without the pages of mapped files, which can be taken back at need."""
    info = psutil.Process().memory_info()
    return info.rss - getattr(info, "shared", 0)


@contextmanager
def watching_memory() -> Iterator[dict[str, int]]:
    """Sample the private memory ten times a second; the dict has the largest afterwards."""
    found = {"peak_private_bytes": private()}
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.1):
            found["peak_private_bytes"] = max(found["peak_private_bytes"], private())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()


# What is watched in a process with functions that another one calls.
_watched: list[tuple[object, dict[str, int]]] = []


def start_watching() -> dict[str, int]:
    """Watch this process until `stop_watching`; return its memory now."""
    watch = watching_memory()
    _watched.append((watch, watch.__enter__()))
    return {"before_bytes": resident(), "before_private_bytes": private()}


def stop_watching() -> dict[str, int]:
    """Return the largest memory since `start_watching`."""
    watch, found = _watched.pop()
    watch.__exit__(None, None, None)
    return {"peak_bytes": peak_resident(), **found}
