"""One holder of a lock at a time, none after its process is gone."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from skfishermask.evaluation.locking import FileLock
from tests import forked


def test_one_holds_it_at_a_time(tmp_path: Path) -> None:
    first, second = FileLock(tmp_path / "lock"), FileLock(tmp_path / "lock")
    assert first.acquire(wait=False)
    assert not second.acquire(wait=False)
    held: list[bool] = []
    waiting = threading.Thread(target=lambda: held.append(second.acquire(wait=True)))
    waiting.start()
    assert held == []
    first.release()
    waiting.join(timeout=60)
    assert held == [True]
    second.release()
    second.release()
    assert (tmp_path / "lock").read_bytes() == b""


def hold(sender: Connection, file: Path) -> None:
    lock = FileLock(file)
    sender.send(lock.acquire(wait=False))
    signal.pause()


@pytest.mark.kills
@pytest.mark.xdist_group("processes")
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_killed_process_leaves_none(tmp_path: Path) -> None:
    process, receiver = forked.begin(hold, tmp_path / "lock")
    assert receiver.recv()
    lock = FileLock(tmp_path / "lock")
    assert not lock.acquire(wait=False)
    process.kill()
    process.join()
    assert lock.acquire(wait=False)
    lock.release()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has other calls")
def test_file_systems_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refuse)
    number = errno.ENOLCK
    lock = FileLock(tmp_path / "lock")
    assert lock.acquire(wait=False)
    lock.release()
    number = errno.EIO
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        FileLock(tmp_path / "lock").acquire(wait=False)


@pytest.mark.skipif(not hasattr(os, "O_NOFOLLOW"), reason="follows links")
def test_no_file_is_made_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="lock"):
        FileLock(tmp_path / "lock")
    assert not (tmp_path / "elsewhere").exists()
