"""A folder that keeps what a long run has computed, safe against a kill at any moment.

It holds JSON alone: reading it runs no code, and floats are read back as they were written. Each
file carries a checksum. One run at a time works on a folder; another one waits for it, and then
reads what it wrote.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import threading
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Self, TypedDict

from skfishermask.data import UserValue
from skfishermask.evaluation.locking import FileLock

# Threads and the folders that they hold: a lock would have them wait for themselves.
_held: set[tuple[int, Path]] = set()


class Record(TypedDict):
    """One step of a split: a training, and the query after it."""

    score: float | dict[str, float]
    fit_time: float
    query_time: float | None
    chosen: list[int] | None


class Checkpoint:
    """The records of one run, a file for each split. Entered as a context, it is locked.

    The folder is made if it is missing, once the context is entered. The description is what makes
    the run, in values that JSON knows: ValueError, if the folder belongs to a run with another one,
    or a file in it is damaged. RuntimeError, if another writer is at work and cannot be waited for:
    a call around this one, or, where the file system has no locks, a process that changed a file
    meanwhile.
    """

    def __init__(self, folder: str | os.PathLike[str], description: dict[str, object]) -> None:
        self.folder = Path(folder)
        self._run_file = self.folder / "run.json"
        self._description: dict[str, object] = _as_read_back(description)
        self._checksums: dict[Path, str | None] = {}
        self._check()

    def _check(self) -> None:
        """Raise ValueError if the folder belongs to another run."""
        if self._run_file.exists():
            run, _ = _read(self._run_file)
            for name, value in self._description.items():
                if run.get(name) != value:
                    raise ValueError(
                        f"The checkpoint folder {self.folder} belongs to a run with another "
                        f"{name}: it has {run.get(name)}, this run {value}. Use another folder."
                    )

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / "run.lock"
        self._key = threading.get_ident(), self.folder.resolve()
        if self._key in _held:
            raise RuntimeError(f"The checkpoint folder is in use by a call around this one: {file}")
        self._lock = FileLock(file)
        if not self._lock.acquire(wait=False):
            warnings.warn(f"Waiting for another run to leave {file}.", UserWarning, stacklevel=4)
            self._lock.acquire(wait=True)
        _held.add(self._key)
        try:
            for left in self.folder.glob("*.tmp"):  # by a run that was killed
                left.unlink()
            self._check()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        _held.discard(self._key)
        self._lock.release()

    def __getstate__(self) -> dict[str, object]:
        # Processes that work for this one have its lock.
        return {k: v for k, v in vars(self).items() if k != "_lock"}

    def seed(self, seed: int, *, is_given: bool) -> int:
        """Return the seed of the folder's run; where it has none, store this one.

        One that the user chose (`is_given`) must be the folder's.
        """
        if not self._run_file.exists():
            _write(self._run_file, self._description | {"seed": seed}, None)
        run, _ = _read(self._run_file)
        if is_given and run["seed"] != seed:
            raise ValueError(
                f"The checkpoint folder {self.folder} belongs to a run with another random_state. "
                "Use another folder."
            )
        return int(run["seed"])

    def _file(self, number: int) -> Path:
        return self.folder / f"split_{number:04d}.json"

    def read(self, number: int, identity: dict[str, object]) -> list[Record]:
        """Return the records of a split that there are.

        A file with another `identity`, in values that JSON knows, is refused.
        """
        file = self._file(number)
        self._checksums[file] = None
        if not file.exists():
            return []
        content, self._checksums[file] = _read(file)
        for name, value in _as_read_back(identity).items():
            if content.get(name) != value:
                raise ValueError(
                    f"The checkpoint file {file} belongs to another run: its {name} are not those "
                    "of this split. Use another folder, or the same data, cv, n_initial and "
                    "random_state."
                )
        records: list[Record] = content["steps"]
        return records

    def write(self, number: int, identity: dict[str, object], records: list[Record]) -> None:
        """Store the records of a split, in place of those before."""
        file = self._file(number)
        self._checksums[file] = _write(file, identity | {"steps": records}, self._checksums[file])


def _as_read_back(content: dict[str, object]) -> dict[str, object]:
    read_back: dict[str, object] = json.loads(json.dumps(content))
    return read_back


def _checksum(content: UserValue) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _write(file: Path, content: Mapping[str, object], expected: str | None) -> str:
    """Replace a file that has the expected checksum (None: there is none); return the new one."""
    if (_read(file)[1] if file.exists() else None) != expected:
        raise RuntimeError(f"Another writer is at work: it changed the checkpoint file {file}.")
    checksum = _checksum(content)
    # At a kill the file is the old one or the new one, never half of one. The name is new, so it
    # is neither another process's nor a link to elsewhere.
    half, name = tempfile.mkstemp(prefix=f"{file.stem}_", suffix=".tmp", dir=file.parent)
    try:
        with open(half, "w", encoding="utf-8") as stream:
            json.dump({"sha256": checksum, "content": content}, stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(name, file)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise
    return checksum


def _read(file: Path) -> tuple[UserValue, str]:
    """Return the content of a file and its checksum."""
    try:
        whole = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(whole, dict) or set(whole) != {"sha256", "content"}:
            raise ValueError("it is no checkpoint")
        if whole["sha256"] != _checksum(whole["content"]) or not isinstance(whole["content"], dict):
            raise ValueError("its content does not match its checksum")
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"The checkpoint file {file} is damaged and cannot be read ({error}). Remove it to "
            "compute it again."
        ) from error
    return whole["content"], whole["sha256"]
