"""Processes that are there at once: they are forked off one that has imported what is large."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from multiprocessing import forkserver, get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

IMPORTED = ["skfishermask", "skfishermask.modal", "dask.array", "distributed", "torchvision"]


@cache
def server() -> None:
    """Start the process that the others are forked off, Dask's workers too."""
    forkserver.set_forkserver_preload(IMPORTED)
    forkserver.ensure_running()


def begin(function: Callable[..., object], *args: Any) -> tuple[BaseProcess, Connection]:
    """Call a function in a process of its own; its first argument sends to what is given here."""
    server()
    context = get_context("forkserver")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=function, args=(sender, *args))
    process.start()
    sender.close()
    return process, receiver


def run(function: Callable[..., Any], *args: Any) -> tuple[int, Any]:
    """Call a function in a process of its own; give its exit code and what the function gave."""
    process, receiver = begin(_send, function, args)
    try:
        found = receiver.recv()
    except EOFError:
        found = None
    process.join()
    return process.exitcode, found


def _send(sender: Connection, function: Callable[..., Any], args: Any) -> None:
    sender.send(function(*args))
