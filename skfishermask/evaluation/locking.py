"""A lock on a file, which the system releases however its process ends."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from pathlib import Path

if sys.platform == "win32":
    import msvcrt

    def _lock(descriptor: int, *, wait: bool) -> bool:
        while True:
            try:
                msvcrt.locking(descriptor, msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)
                return True
            except OSError:  # where it waits, after ten seconds
                if not wait:
                    return False

    def _unlock(descriptor: int) -> None:
        msvcrt.locking(descriptor, msvcrt.LK_UNLCK, 1)
else:
    import fcntl

    # A file system without locks: a writer is noticed by the checksum of what it changed.
    _NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}

    def _lock(descriptor: int, *, wait: bool) -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        return True

    def _unlock(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_UN)


def _without_links(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


class FileLock:
    """An exclusive lock, also between threads of one process. The file stays, and stays empty.

    It is made if it is missing; a symbolic link is refused.
    """

    def __init__(self, file: Path) -> None:
        self._stream = open(file, "ab", opener=_without_links)  # noqa: SIM115, closed by release

    def acquire(self, *, wait: bool) -> bool:
        """Lock the file; return whether that succeeded."""
        return _lock(self._stream.fileno(), wait=wait)

    def release(self) -> None:
        """Release the lock, of processes forked meanwhile too, and close the file."""
        if not self._stream.closed:
            with contextlib.suppress(OSError):  # where there are no locks
                _unlock(self._stream.fileno())
            self._stream.close()
