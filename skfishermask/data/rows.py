"""Rows of samples in any container: count, take, concatenate and check them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import NoReturn

import numpy as np
import scipy.sparse as sp
import torch
from sklearn.utils import check_consistent_length
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset

from skfishermask.data.types import Data, Labels

# Numbers that are looked at in one go.
_CHUNK = 1 << 18


def is_mapping(data: Data) -> bool:
    """Return whether this is a dict of inputs; SciPy's DOK matrix, a dict too, is not."""
    return isinstance(data, Mapping) and not sp.issparse(data)


def is_multi_input(data: Data) -> bool:
    """Return whether these are several inputs: a dict of them, or a tuple of arrays."""
    return is_mapping(data) or (
        isinstance(data, tuple) and len(data) > 0 and all(len(_shape(part)) > 0 for part in data)
    )


def _shape(data: Data) -> tuple[int, ...]:
    # A tuple of numbers, or of lists of them, holds the rows of one input.
    return data.shape if isinstance(data, np.ndarray | torch.Tensor) or sp.issparse(data) else ()


def map_inputs(data: Data, function: Callable[[object, Data], Data]) -> Data:
    """Apply a function to the key of each of several inputs and to it; keep their container."""
    if is_mapping(data):
        return {key: function(key, part) for key, part in data.items()}
    return tuple(function(i, part) for i, part in enumerate(data))


def input_arrays(data: Data) -> list[Data]:
    """List the inputs, where there are several, or the one there is."""
    if not is_multi_input(data):
        return [data]
    if not data:
        raise ValueError("Expected a dict of arrays, found an empty one.")
    return list(data.values()) if is_mapping(data) else list(data)


def is_text(data: Data) -> bool:
    """Return whether the samples are strings, one after the other."""
    return _are_all(str, data)


def _are_all(kind: type, data: Data) -> bool:
    is_list = isinstance(data, list | tuple) or getattr(data, "ndim", 0) == 1
    return is_list and len(data) > 0 and all(isinstance(sample, kind) for sample in data)


def check_holds_samples(data: Data, name: str) -> None:
    """Raise TypeError at what samples come from: a DataLoader, a path, or a list of paths."""
    if isinstance(data, DataLoader):
        # It decides itself which rows come when.
        raise TypeError(
            f"Expected samples in {name}, found {type(data).__name__}: give its dataset instead. "
            "What makes batches of it is the net."
        )
    if isinstance(data, str | bytes | os.PathLike) or _are_all(os.PathLike, data):
        raise TypeError(
            f"Expected samples in {name}, found {type(data).__name__}: the files must be read "
            "first. Of images give a Dataset that opens them."
        )


def check_no_text(data: Data, name: str) -> None:
    """Raise ValueError at samples that are strings."""
    if is_text(data):
        raise ValueError(
            f"Expected numbers in {name}, found strings: put what makes numbers of them before the "
            "network, as in make_pipeline(vectorizer, net). If they are names of image files, give "
            "a Dataset that opens them."
        )


def as_rows(data: Data, name: str, *, numbers: bool = True) -> Data:
    """Turn what a network cannot take row by row into what it can, or say why not.

    A list of rows becomes an array (or a tensor), a sparse matrix one of the CSR format; other
    containers stay as they are. Raises TypeError or ValueError for what holds no samples, or,
    where `numbers` are asked for, something else than these.
    """
    check_holds_samples(data, name)
    if numbers:
        check_no_text(data, name)
    elif is_text(data):
        return data
    if not is_multi_input(data) and isinstance(data, list | tuple | range):
        tensors = any(isinstance(row, torch.Tensor) for row in data)
        try:
            data = torch.stack([*data]) if tensors else np.asarray(data)
        except (ValueError, TypeError, RuntimeError) as error:
            raise ValueError(
                f"{name} is a list, so its elements must be numbers or arrays of one shape, one a "
                f"sample: {error}"
            ) from error
    if sp.issparse(data):
        # skorch cannot take rows of the newer sparse arrays.
        return sp.csr_matrix(data)
    if hasattr(data, "iloc") and not hasattr(data, "columns"):
        data = np.asarray(data)
    if getattr(data, "shape", None) == ():
        raise ValueError(f"Expected one row a sample in {name}, found a single value: {data}.")
    if not has_rows(data):
        raise TypeError(
            f"Expected {name} to be an array, DataFrame, sparse matrix, tensor, dict or tuple of "
            f"arrays or Dataset, found {type(data).__name__}."
        )
    if is_multi_input(data):
        map_inputs(data, lambda key, part: as_rows(part, f"{name}[{key!r}]", numbers=numbers))
        check_consistent_length(*input_arrays(data))
    for part in input_arrays(data):
        dtypes = part.dtypes if hasattr(part, "columns") else [getattr(part, "dtype", None)]
        for dtype in dtypes:
            if numbers and getattr(dtype, "kind", "f") not in "biuf":
                raise ValueError(f"Expected numbers in {name}, found dtype {dtype}.")
    return data


def has_rows(data: Data) -> bool:
    """Return whether this has rows that can be counted and taken, and is no single value."""
    is_sized = hasattr(data, "shape") or hasattr(data, "__len__")
    return is_sized and hasattr(data, "__getitem__") and getattr(data, "shape", None) != ()


def n_rows(data: Data) -> int:
    """Count the samples."""
    data = input_arrays(data)[0]
    return int(data.shape[0]) if hasattr(data, "shape") else len(data)


def check_finite(data: Data, name: str, start: int = 0) -> None:
    """Raise ValueError, naming the data and the first bad row, at NaN or infinity.

    A memory map is read in chunks. What cannot be checked without loading it sample by sample, a
    Dataset for example, is let through. Rows are counted from `start`.
    """
    if is_multi_input(data):
        map_inputs(data, lambda key, part: check_finite(part, f"{name}[{key!r}]", start))
    elif isinstance(data, torch.Tensor):
        bad = (~torch.isfinite(data)).nonzero()
        if len(bad):
            _refuse(name, start + (int(bad[0, 0]) if data.dim() else 0))
    elif isinstance(data, list | tuple):
        try:
            data = np.asarray(data)
        except (ValueError, TypeError, RuntimeError):  # ragged, or tensors that NumPy cannot read
            for row, part in enumerate(data):
                check_finite(part, f"{name}[{row}]")
        else:
            check_finite(data, name, start)
    elif sp.issparse(data):
        data = data.tocoo()
        bad = ~np.isfinite(data.data)
        if bad.any():
            _refuse(name, start + int(data.row[bad].min()))
    elif hasattr(data, "dtypes") and hasattr(data, "isna"):
        missing = np.asarray(data.isna()).reshape(len(data), -1).any(axis=1)
        if missing.any():
            _refuse(name, start + int(missing.argmax()))
        numbers = data.select_dtypes("number") if hasattr(data, "select_dtypes") else data
        _check_array(np.asarray(numbers), name, start)
    elif isinstance(data, CastArray):
        _check_array(data, name, start)
    elif hasattr(data, "__array__"):
        _check_array(np.asanyarray(data), name, start)


def _check_array(data: np.ndarray | CastArray, name: str, first: int) -> None:
    if data.dtype.kind == "O":
        # NaN alone differs from itself.
        bad = np.asarray(data != data).reshape(len(data), -1).any(axis=1)
        if bad.any():
            _refuse(name, first + int(bad.argmax()))
    if data.dtype.kind not in "fc" or 0 in data.shape:
        return
    data = np.atleast_1d(data) if isinstance(data, np.ndarray) else data
    step = max(1, _CHUNK // max(1, data[0].size))
    for start in range(0, len(data), step):
        part = np.asarray(data[start : start + step])
        if not np.isfinite(part).all():
            rows = ~np.isfinite(part).reshape(len(part), -1).all(axis=1)
            _refuse(name, first + start + int(rows.argmax()))


def _refuse(name: str, row: int) -> NoReturn:
    raise ValueError(f"Input {name} contains NaN or infinity, first in row {row}.")


def take_rows(data: Data, indices: Data) -> Data:
    """Return some samples, in the container they came in."""
    if is_multi_input(data):
        return map_inputs(data, lambda _, part: take_rows(part, indices))
    if hasattr(data, "iloc"):  # data[indices] of a DataFrame means columns, of a Series labels
        return data.iloc[indices]
    if sp.issparse(data):  # not every sparse format can be indexed
        return data.tocsr()[indices].asformat(data.format)
    if isinstance(data, Dataset | list | tuple) and np.ndim(indices) > 0:
        positions = [int(i) for i in indices]
        if isinstance(data, Dataset):
            return Subset(data, positions)
        return [data[i] for i in positions]
    return data[indices]


class CastArray:
    """An array in a file, in another dtype: its rows are cast when they are taken.

    Parameters
    ----------
    array : memory map, or another array that reads its rows when they are taken
        The array.
    dtype : dtype
        The other dtype.
    """

    def __init__(self, array: Data, dtype: object) -> None:
        self.array = array
        self.dtype = np.dtype(dtype)  # type: ignore[call-overload]
        self.shape, self.ndim = array.shape, len(array.shape)

    def __len__(self) -> int:
        """Count the samples."""
        return int(self.shape[0])

    def __getitem__(self, index: Data) -> np.ndarray:
        """Return some rows, cast."""
        return np.asarray(self.array[index]).astype(self.dtype, copy=False)


def is_mapped(data: Data) -> bool:
    """Return whether this is an array, or a view of one, that NumPy has mapped from a file."""
    while isinstance(data, np.ndarray):
        if isinstance(data, np.memmap):
            return True
        data = data.base
    return False


def inputs_of(item: Data) -> Data:
    """Return the inputs in what a Dataset or a loader gives: (X, y), or X alone."""
    return item[0] if isinstance(item, list | tuple) else item


class Relabeled(Dataset[tuple[Data, Labels]]):
    """The samples of a Dataset with other labels: skorch would take the Dataset's own.

    Parameters
    ----------
    dataset : Dataset
        Gives samples, or tuples of a sample and what is left out here.
    labels : ndarray of shape (n_samples,)
        One for each.
    """

    def __init__(self, dataset: Data, labels: Labels) -> None:
        self.dataset = dataset
        self.labels = labels

    def __len__(self) -> int:
        """Count the samples."""
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Data, Labels]:
        """Return a sample and its label."""
        return inputs_of(self.dataset[i]), self.labels[i]


def stack_rows(old: Data, new: Data) -> Data:
    """Concatenate old and new samples, in the container of the old ones."""
    if is_mapping(old) or hasattr(old, "columns"):
        found = list(new.keys()) if hasattr(new, "keys") else type(new).__name__
        if set(found) != set(old.keys()):
            raise ValueError(
                f"The new samples have {found}; expected {list(old.keys())} like the training data."
            )
    if is_multi_input(old):
        return map_inputs(old, lambda key, part: stack_rows(part, new[key]))
    if hasattr(old, "iloc") and hasattr(new, "iloc"):
        import pandas as pd  # nothing new is loaded: these are pandas objects

        return pd.concat([old, new])
    if sp.issparse(old):
        return sp.vstack([old, new], format=old.format)
    if isinstance(old, torch.Tensor):
        return torch.cat([old, torch.as_tensor(new, device=old.device)])
    if isinstance(old, Dataset):
        return ConcatDataset([old, new])
    if isinstance(old, list):
        return [*old, *new]
    return np.concatenate([old, new])
