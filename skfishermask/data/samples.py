"""Samples as users give them: what is refused, and what a net's dataset is given."""

from __future__ import annotations

import os
from collections.abc import Callable
from numbers import Number
from typing import NoReturn

import numpy as np
import torch
from sklearn.utils import check_consistent_length
from torch.utils.data import DataLoader, Dataset

from skfishermask.data.rows import (
    CONTAINERS,
    CastArray,
    Container,
    container_of,
    has_columns,
    input_arrays,
    is_dask,
    is_in_file,
    is_mapped,
    is_mapping,
    is_multi_input,
    map_inputs,
    n_rows,
    take_rows,
)
from skfishermask.data.types import Data, Labels


def check_finite(data: Data, name: str, start: int = 0) -> None:
    """Raise ValueError, naming the data and the first bad row, at NaN or infinity.

    What is in a file is read in pieces. What cannot be checked without loading it sample by sample,
    a Dataset for example, is let through. Rows are counted from `start`.
    """
    if is_multi_input(data):
        map_inputs(data, lambda key, values: check_finite(values, f"{name}[{key!r}]", start))
        return
    kind = container_of(data)
    row = None if kind is None else kind.first_bad(data)
    if row is not None:
        raise ValueError(f"Input {name} contains NaN or infinity, first in row {start + row}.")


def check_holds_samples(data: Data, name: str) -> None:
    """Raise TypeError at what samples come from: a DataLoader or a path."""
    if isinstance(data, DataLoader):
        # It decides itself which rows come when.
        raise TypeError(
            f"Expected samples in {name}, found {type(data).__name__}: give its dataset instead. "
            "What makes batches of it is the net."
        )
    if isinstance(data, str | bytes | os.PathLike):
        _refuse_files(data, name)


def _refuse_files(data: Data, name: str) -> NoReturn:
    raise TypeError(
        f"Expected samples in {name}, found {type(data).__name__}: the files must be read first. "
        "Of images give a Dataset that opens them."
    )


def check_rows(data: Data, name: str) -> Container:
    """Return the row of the table for samples; raise TypeError where no rows can be taken."""
    check_holds_samples(data, name)
    if getattr(data, "shape", None) == () or isinstance(data, Number):
        raise ValueError(f"Expected one row a sample in {name}, found a single value: {data}.")
    kind = container_of(data)
    if kind is CONTAINERS["another array"]:
        try:  # it may have columns, or keys
            first = np.arange(min(1, n_rows(data)))
            kind = kind if n_rows(take_rows(data, first)) == len(first) else None
        except Exception:  # an unknown class can raise anything
            kind = None
    if kind is None:
        raise TypeError(
            f"Expected {name} to be an array, DataFrame, sparse matrix, tensor, dict or tuple of "
            f"arrays or Dataset, found {type(data).__name__}, of which no rows can be taken. "
            "numpy.asarray may make an array of it."
        )
    if is_multi_input(data):
        map_inputs(data, lambda key, values: check_rows(values, f"{name}[{key!r}]"))
        check_consistent_length(*input_arrays(data))
    return kind


def is_numeric(data: Data, *, lists: bool = True) -> bool:
    """Return whether these are real numbers of one input, in an array or (if `lists`) in a list."""
    if is_multi_input(data) or isinstance(data, Dataset) or has_columns(data):
        return False
    if isinstance(data, list | tuple) and not lists:
        return False
    dtype = getattr(data, "dtype", None)
    if not isinstance(dtype, np.dtype | torch.dtype):
        try:
            dtype = np.asarray(data).dtype
        except (ValueError, TypeError, RuntimeError):  # ragged, or of objects
            return False
    return getattr(dtype, "kind", "f") in "biuf"


def is_ragged(data: Data) -> bool:
    """Return whether this is a list of samples that have several lengths."""
    return isinstance(data, list | tuple) and len({*map(_length, data)}) > 1


def _length(sample: Data) -> int:
    is_sequence = hasattr(sample, "__len__") and getattr(sample, "shape", None) != ()
    return len(sample) if is_sequence else -1


def _are_all(kind: type, data: Data) -> bool:
    if is_mapping(data):
        return False
    is_flat = isinstance(data, list | tuple) or len(getattr(data, "shape", ())) == 1
    return is_flat and n_rows(data) > 0 and all(isinstance(sample, kind) for sample in data)


def check_no_row_numbers(data: Data, pool: Data, name: str) -> None:
    """Raise ValueError at integers in place of samples, which have another axis in the pool."""
    shapes = [getattr(X, "shape", ()) for X in (data, pool)]
    if len(shapes[0]) == 1 < len(shapes[1]) and getattr(data.dtype, "kind", "") in "iu":
        raise ValueError(
            f"Expected samples like those of X_pool in {name}, found integers of shape "
            f"{tuple(shapes[0])}. If these are rows of an array X, give X[rows]."
        )


def _check_columns(data: Data, name: str) -> None:
    """Raise ValueError at a table with a column that is not of numbers."""
    if is_mapping(data) or is_dask(data) or not has_columns(data) or not hasattr(data, "__array__"):
        return
    for column in getattr(data, "column_names", getattr(data, "columns", [])):
        values = data[column]
        dtype = getattr(values, "dtype", getattr(values, "type", None))
        if len(getattr(values, "shape", ())) > 1 or getattr(dtype, "kind", "O") in "biuf":
            continue
        try:
            np.asarray(values, dtype="float64")
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"Expected numbers in {name}, found column {column!r} of {dtype}: {error}. "
                "Put what makes numbers of it before the network, as in "
                "make_pipeline(ColumnTransformer(...), net), or leave it out."
            ) from error


def check_no_text(data: Data, name: str) -> None:
    """Raise an error at samples that are strings, paths, or have columns of other than numbers."""
    _check_columns(data, name)
    if isinstance(data, np.ndarray) and data.ndim > 1 and data.dtype.kind in "US":
        raise ValueError(
            f"Expected numbers in {name}, found strings such as {str(data.flat[0])!r}. If these "
            'are numbers as text: X.astype("float32").'
        )
    if _are_all(os.PathLike, data):
        _refuse_files(data, name)
    if _are_all(str, data):
        raise ValueError(
            f"Expected numbers in {name}, found strings: put what makes numbers of them before the "
            "network, as in make_pipeline(vectorizer, net). If they are names of image files, give "
            "a Dataset that opens them, or the net a dataset= that does."
        )


def as_rows(data: Data, name: str, *, has_own_dataset: bool = False) -> Data:
    """Return samples as a net's dataset takes them, with the same rows.

    A dataset of the user's is given the very same container. Raises TypeError if no rows can be
    taken, ValueError if these are no numbers, or not of one length.
    """
    kind = check_rows(data, name)
    if has_own_dataset and not isinstance(data, np.ndarray):
        return data
    if not has_own_dataset:
        check_no_text(data, name)
    if is_multi_input(data):
        return map_inputs(data, lambda key, values: as_rows(values, f"{name}[{key!r}]"))
    try:
        data = kind.as_input(data)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name} cannot be given to a net as it is: {error}") from error
    dtypes = data.dtypes if hasattr(data, "columns") else [getattr(data, "dtype", None)]
    for dtype in dtypes:
        if not has_own_dataset and getattr(dtype, "kind", "f") not in "biufc":
            raise ValueError(f"Expected numbers in {name}, found dtype {dtype}.")
    return data


def cast(data: Data, dtype_of: Callable[[Data], torch.dtype], *, of_any_kind: bool = False) -> Data:
    """Return floating-point numbers (or `of_any_kind`: integers are no tokens) in another dtype.

    What is neither an array nor a tensor is returned as it is, and what is in a file is cast when
    it is read. `dtype_of` an array is called only where there is something to cast.
    """
    if is_multi_input(data):
        return map_inputs(data, lambda _, array: cast(array, dtype_of, of_any_kind=of_any_kind))
    if isinstance(data, torch.Tensor):
        return data.to(dtype_of(data)) if of_any_kind or data.is_floating_point() else data
    if not (isinstance(data, np.ndarray) or is_in_file(data)):
        return data
    if data.dtype.kind != "f" and not of_any_kind:
        return data
    dtype = dtype_of(data)
    # NumPy has no bfloat16.
    name = str(torch.float32 if dtype == torch.bfloat16 else dtype).removeprefix("torch.")
    if data.dtype == name:
        return data
    return CastArray(data, name) if is_mapped(data) or is_in_file(data) else data.astype(name)


def inputs_of(item: Data) -> Data:
    """Return the inputs in what a Dataset or a loader gives: (X, y), or X alone."""
    return item[0] if isinstance(item, list | tuple) else item


class Relabeled(Dataset[tuple[Data, Labels]]):
    """The samples of a Dataset with other labels, one for each: skorch would take its own."""

    def __init__(self, dataset: Data, labels: Labels) -> None:
        self.dataset = dataset
        self.labels = labels

    def __len__(self) -> int:
        """Count the samples."""
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Data, Labels]:
        """Return a sample and its label."""
        return inputs_of(self.dataset[i]), self.labels[i]


def with_labels(X: Data) -> Data:
    """Return samples to predict: of a Dataset skorch wants labels, which it ignores."""
    return Relabeled(X, np.zeros(n_rows(X), dtype="int64")) if isinstance(X, Dataset) else X
