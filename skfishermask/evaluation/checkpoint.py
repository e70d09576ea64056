"""A folder that keeps what a long run has computed, safe against a kill at any moment.

It holds JSON alone: reading it runs no code, and floats are read back as they were written.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch
from torch.utils.data import Dataset

from skfishermask.data import Data, UserValue, input_arrays, n_rows, take_rows

# Rows of a pool that are looked at to tell it from another.
_ROWS_READ = 64


class Record(TypedDict):
    """One step of a split: a training, and the query after it."""

    score: float | dict[str, float]
    fit_time: float
    query_time: float | None
    chosen: list[int] | None


class Checkpoint:
    """The records of one run, a file for each of its parts.

    Parameters
    ----------
    folder : path-like
        Made if it is missing.
    description : dict
        What makes the run, in values that JSON knows. A folder with another one is refused.
    """

    def __init__(self, folder: str | os.PathLike[str], description: dict[str, object]) -> None:
        self.folder = Path(folder)
        self._run_file = self.folder / "run.json"
        self._description: dict[str, object] = _as_read_back(description)
        if self._run_file.exists():
            found = _read(self._run_file)
            for name, value in self._description.items():
                if found.get(name) != value:
                    raise ValueError(
                        f"The checkpoint folder {self.folder} belongs to a run with another "
                        f"{name}: it has {found.get(name)}, this run {value}. Use another folder."
                    )

    def seed(self, seed: int, *, is_given: bool) -> int:
        """Give the seed of the run that the folder has; else store this one.

        Parameters
        ----------
        seed : int
            The seed of this call.
        is_given : bool
            Whether the user chose it; then the folder's must be the same.
        """
        if not self._run_file.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            _write(self._run_file, self._description | {"seed": seed})
        found = int(_read(self._run_file)["seed"])
        if is_given and found != seed:
            raise ValueError(
                f"The checkpoint folder {self.folder} belongs to a run with another random_state. "
                "Use another folder."
            )
        return found

    def _file(self, number: int) -> Path:
        return self.folder / f"split_{number:04d}.json"

    def read(self, number: int, identity: dict[str, object]) -> list[Record]:
        """Give the records of a part so far.

        Parameters
        ----------
        number : int
            Which part.
        identity : dict
            What makes the part, in values that JSON knows; a file with another one is refused.
        """
        file = self._file(number)
        if not file.exists():
            return []
        found = _read(file)
        for name, value in _as_read_back(identity).items():
            if found.get(name) != value:
                raise ValueError(
                    f"The checkpoint file {file} belongs to another run: its {name} are not those "
                    "of this split. Use another folder, or the same data, cv, n_initial and "
                    "random_state."
                )
        records: list[Record] = found["steps"]
        return records

    def write(self, number: int, identity: dict[str, object], records: list[Record]) -> None:
        """Store the records of a part, in place of those before."""
        _write(self._file(number), identity | {"steps": records})


def _as_read_back(content: dict[str, object]) -> dict[str, object]:
    read_back: dict[str, object] = json.loads(json.dumps(content))
    return read_back


def _write(file: Path, content: Mapping[str, object]) -> None:
    # At a kill the file is the old one or the new one, never half of one.
    half = file.with_suffix(".tmp")
    with half.open("w", encoding="utf-8") as stream:
        json.dump(content, stream)
        stream.flush()
        os.fsync(stream.fileno())
    half.replace(file)


def _read(file: Path) -> UserValue:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"The checkpoint file {file} cannot be read ({error}). Remove it to compute it again."
        ) from error


def fingerprint(data: Data) -> str:
    """Tell data apart by type, shape and the content of rows spread over them.

    A one-dimensional array is read whole. Of a Dataset only the length is looked at: reading its
    samples may be slow or random.
    """
    digest = hashlib.sha256()
    for part in input_arrays(data):
        n = n_rows(part)
        digest.update(f"{type(part).__qualname__} {getattr(part, 'shape', n)}".encode())
        if isinstance(part, Dataset):
            continue
        whole = getattr(part, "ndim", 2) == 1 or n <= _ROWS_READ
        rows = np.arange(n) if whole else np.linspace(0, n - 1, _ROWS_READ).astype(int)
        few = take_rows(part, rows)
        if isinstance(few, torch.Tensor):
            few = few.numpy(force=True)
        elif hasattr(few, "toarray"):
            few = few.toarray()
        few = np.asarray(few)
        has_bytes = few.dtype.kind in "biufc"
        digest.update(few.tobytes() if has_bytes else repr(few.tolist()).encode())
    return digest.hexdigest()[:16]


def _fingerprint_of_weights(module: torch.nn.Module) -> str:
    """Tell modules apart by every parameter and buffer that training could start from."""
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        if isinstance(value, torch.Tensor) and not torch.nn.parameter.is_lazy(value):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            # As bytes: NumPy has no bfloat16.
            digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def describe(thing: UserValue) -> object:
    """Describe an estimator, a function or a parameter by names and values, without addresses."""
    if thing is None or isinstance(thing, bool | int | float | str):
        return thing
    name = f"{type(thing).__module__}.{type(thing).__qualname__}"
    if isinstance(thing, np.generic):
        return thing.item()
    if isinstance(thing, np.ndarray | torch.Tensor):
        return [name, fingerprint(thing)] if thing.ndim else thing.item()
    if isinstance(thing, Mapping):
        return {str(key): describe(value) for key, value in thing.items()}
    if isinstance(thing, Sequence):
        return [describe(value) for value in thing]
    if isinstance(thing, functools.partial):
        return [name, describe(thing.func), describe(thing.args), describe(thing.keywords)]
    if isinstance(thing, torch.nn.Module):
        return [name, str(thing), f"weights {_fingerprint_of_weights(thing)}"]
    if hasattr(thing, "get_params") and not isinstance(thing, type):
        return [name, describe(thing.get_params(deep=False))]
    if hasattr(thing, "__qualname__"):
        return f"{thing.__module__}.{thing.__qualname__}"
    return name
