"""Samples in any container: one table of containers, and what is done with the rows of any."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
import torch
from skorch.helper import SliceDict
from torch.utils.data import ConcatDataset, Dataset, Subset

from skfishermask.data.finite import (
    first_bad_in_array,
    first_bad_in_columns,
    first_bad_in_list,
    first_bad_in_memory,
    first_bad_in_pandas,
    first_bad_in_sparse,
    first_bad_in_tensor,
)
from skfishermask.data.types import Data, UserValue

# What has a function of its own to concatenate what comes from it.
_WITH_CONCATENATION = ("dask", "datasets", "pandas", "polars", "pyarrow", "xarray")


@dataclass(frozen=True)
class Container:
    """A kind of container of samples, and how its rows are handled."""

    # Whether an object is of this kind; told without its library, which may not be installed.
    holds: Callable[[Data], bool]
    # Data and positions -> these rows, in the same kind of container. What is in a file comes back
    # as an array in memory, and a Dataset as a Subset.
    take: Callable[[Data, Data], Data]
    # Old rows and new ones -> both, in the container of the old ones.
    concatenate: Callable[[Data, Data], Data]
    # Data -> what skorch's own dataset takes, with the same rows.
    as_input: Callable[[Data], Data]
    # Data -> the first row with NaN or infinity; None where there is none, or where that cannot be
    # known without loading sample by sample.
    first_bad: Callable[[Data], int | None] = first_bad_in_memory
    # Data -> the names of its columns, or of its inputs; None where it has no names.
    columns: Callable[[Data], list[object] | None] = lambda data: None


class CastArray:
    """An array that reads its rows when they are taken, as from a file: cast to another dtype."""

    def __init__(self, array: Data, dtype: object) -> None:
        self.array = array
        self.dtype = np.dtype(dtype)  # type: ignore[call-overload]
        self.shape, self.ndim = array.shape, len(array.shape)

    def __len__(self) -> int:
        """Count the samples."""
        return int(self.shape[0])

    def __getitem__(self, index: Data) -> np.ndarray:
        """Return some rows, cast, in memory that PyTorch takes."""
        return np.asarray(self.array[index]).astype(self.dtype, order="C", copy=False)


# -- recognising ---------------------------------------------------------------------------------


def is_dask(data: object) -> bool:
    """Return whether this is a collection of Dask's, such as an array."""
    # It can only be there if Dask was imported. What is in memory may have the method, too.
    return (
        "dask" in sys.modules
        and hasattr(data, "__dask_graph__")
        and data.__dask_graph__() is not None
    )


def is_mapping(data: Data) -> bool:
    """Return whether this is a dict of inputs; SciPy's DOK matrix, a dict too, is not."""
    return isinstance(data, Mapping) and not sp.issparse(data)


def _is_tuple_of_inputs(data: Data) -> bool:
    # A tuple of numbers, or of lists of them, holds the rows of one input.
    return isinstance(data, tuple) and len(data) > 0 and all(map(_is_array, data))


def _is_array(data: Data) -> bool:
    is_array = isinstance(data, np.ndarray | torch.Tensor) or sp.issparse(data)
    return (is_array or is_in_file(data)) and len(data.shape) > 0


def _libraries(data: Data) -> list[str]:
    """Name the packages of an object's class and of those that it derives from."""
    return [kind.__module__.partition(".")[0] for kind in type(data).__mro__]


def _comes_from(*names: str) -> Callable[[Data], bool]:
    """Return what tells objects with rows of these packages, which may not be installed."""
    return lambda data: has_rows(data) and any(name in names for name in _libraries(data))


def _library_of(data: Data) -> UserValue:
    """Return the package that an object comes from, or its class derives from; None: another."""
    packages = (sys.modules[name] for name in _libraries(data) if name in _WITH_CONCATENATION)
    return next(packages, None)


def is_in_file(data: Data) -> bool:
    """Return whether rows of this array are read from a file when they are taken."""
    return isinstance(data, CastArray) or _comes_from("h5py", "zarr")(data)


def is_mapped(data: Data) -> bool:
    """Return whether this is an array, or a view of one, that NumPy has mapped from a file."""
    while isinstance(data, np.ndarray):
        if isinstance(data, np.memmap):
            return True
        data = data.base
    return False


def has_rows(data: Data) -> bool:
    """Return whether this has rows that can be counted and taken, and is no single value."""
    is_sized = hasattr(data, "shape") or hasattr(data, "__len__")
    return is_sized and hasattr(data, "__getitem__") and getattr(data, "shape", None) != ()


# -- several inputs ------------------------------------------------------------------------------


def is_multi_input(data: Data) -> bool:
    """Return whether these are several inputs: a dict of them, or a tuple of arrays."""
    return is_mapping(data) or _is_tuple_of_inputs(data)


def map_inputs(data: Data, function: Callable[[object, Data], Data]) -> Data:
    """Apply a function to the key of each of several inputs and to it; return a dict or tuple."""
    if is_mapping(data):
        return {key: function(key, values) for key, values in data.items()}
    return tuple(function(i, values) for i, values in enumerate(data))


def input_arrays(data: Data) -> list[Data]:
    """List the inputs, where there are several, or the one there is."""
    if not is_multi_input(data):
        return [data]
    if not data.keys() if is_mapping(data) else not data:
        raise ValueError("Expected a dict of arrays, found an empty one.")
    return list(data.values()) if is_mapping(data) else list(data)


def has_columns(data: Data) -> bool:
    """Return whether this is a table with names of columns."""
    kind = container_of(data)
    return kind is not None and not is_mapping(data) and kind.columns(data) is not None


def _in_mapping_like(data: Data, inputs: Data) -> Data:
    if isinstance(data, SliceDict):
        return type(data)(**inputs)
    try:
        return type(data)(inputs)
    except (TypeError, ValueError):  # a class that is made of something else
        return inputs


def _take_inputs(data: Data, indices: Data) -> Data:
    taken = map_inputs(data, lambda _, values: take_rows(values, indices))
    return _in_mapping_like(data, taken) if is_mapping(data) else taken


def _concatenate_inputs(old: Data, new: Data) -> Data:
    both = map_inputs(old, lambda key, values: stack_rows(values, new[key]))
    return _in_mapping_like(old, both) if is_mapping(old) else both


# -- rows of each kind ---------------------------------------------------------------------------


def _unchanged(data: Data) -> Data:
    return data


def _index(data: Data, indices: Data) -> Data:
    return data[indices]


def _take_each(data: Data, indices: Data) -> Data:
    if np.ndim(indices) == 0:
        return data[int(indices)]
    rows = [data[int(i)] for i in indices]
    return tuple(rows) if isinstance(data, tuple) else rows


def _subset(data: Data, indices: Data) -> Data:
    return data[int(indices)] if np.ndim(indices) == 0 else Subset(data, [int(i) for i in indices])


def _take_from_file(data: Data, indices: Data) -> np.ndarray:
    if np.ndim(indices) == 0:
        return np.asarray(data[int(indices)])
    # HDF5 takes each row once, in the order of the file.
    rows, order = np.unique(np.asarray(indices, dtype=np.int64), return_inverse=True)
    return np.asarray(data[rows])[order]


def _concatenate_lists(old: Data, new: Data) -> Data:
    both = [*old, *new]
    return tuple(both) if isinstance(old, tuple) else both


def _concatenate_arrays(old: Data, new: Data) -> np.ndarray:
    return np.concatenate([np.asarray(old), np.asarray(new)])


def _concatenate_by_library(old: Data, new: Data, **options: object) -> Data:
    library = _library_of(old)
    if library is None or _library_of(new) is not library:  # labels may come in another container
        return _concatenate_arrays(old, new)
    return library.concat([old, new], **options)


def _concatenate_polars(old: Data, new: Data) -> Data:
    if not hasattr(old, "columns"):
        return _concatenate_by_library(old, new)
    # Columns in the order of the old ones, and numbers in the wider dtype.
    return _concatenate_by_library(old, new.select(old.columns), how="vertical_relaxed")


def _native(data: np.ndarray) -> np.ndarray | CastArray:
    """Return an array that PyTorch takes: in the byte order of the machine, not reversed."""
    if data.dtype.isnative and min(data.strides, default=0) >= 0:
        return data
    dtype = data.dtype.newbyteorder("=")
    return CastArray(data, dtype) if is_mapped(data) else np.array(data, dtype=dtype, order="C")


def _native_in_file(data: Data) -> Data:
    is_as_wanted = data.dtype.isnative and hasattr(data, "__len__")
    return data if is_as_wanted else CastArray(data, data.dtype.newbyteorder("="))


def _stacked(data: Data) -> Data:
    tensors = any(isinstance(row, torch.Tensor) for row in data)
    try:
        return torch.stack([*data]) if tensors else np.asarray(data)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(
            "the elements of a list must be numbers or arrays of one shape, one a sample; a "
            f"dataset= of the net's own could take others. {error}"
        ) from error


def _refuse_hugging_face(data: Data) -> Data:
    raise TypeError(
        "the rows of a Hugging Face dataset are dicts. Give arrays by name, as in "
        f'dict(dataset.select_columns({data.column_names[:1]}).with_format("numpy")[:]), or put a '
        "transformer that makes an array of the dataset before the net, in a Pipeline."
    )


def _column_names(data: Data) -> list[object] | None:
    names = getattr(data, "column_names", getattr(data, "columns", None))
    return None if names is None else list(names)


# -- the table -----------------------------------------------------------------------------------

# The first one that holds an object counts.
CONTAINERS = {
    "SciPy sparse matrix": Container(
        sp.issparse,
        take=lambda data, rows: data.tocsr()[rows].asformat(data.format),  # some have no indexing
        concatenate=lambda old, new: sp.vstack([old, new], format=old.format),
        as_input=sp.csr_matrix,  # skorch cannot take rows of the newer sparse arrays
        first_bad=first_bad_in_sparse,
    ),
    "Dask collection": Container(
        is_dask,
        take=_index,
        concatenate=lambda old, new: _library_of(old).array.concatenate([old, new]),
        as_input=np.asarray,
        columns=_column_names,
    ),
    "dict of arrays": Container(
        is_mapping,
        take=_take_inputs,
        concatenate=_concatenate_inputs,
        as_input=_unchanged,
        columns=list,
    ),
    "tuple of arrays": Container(
        _is_tuple_of_inputs,
        take=_take_inputs,
        concatenate=_concatenate_inputs,
        as_input=_unchanged,
    ),
    "torch.Tensor": Container(
        lambda data: isinstance(data, torch.Tensor) and data.dim() > 0,
        # Without the graph of what was computed, through which no training goes twice.
        take=lambda data, rows: data.detach()[rows],
        concatenate=lambda old, new: torch.cat(
            [old.detach(), torch.as_tensor(new, device=old.device).detach()]
        ),
        as_input=_unchanged,
        first_bad=first_bad_in_tensor,
    ),
    "torch Dataset": Container(
        lambda data: isinstance(data, Dataset) and has_rows(data),
        take=_subset,
        concatenate=lambda old, new: ConcatDataset([old, new]),
        as_input=_unchanged,
        first_bad=lambda data: None,
    ),
    "NumPy array": Container(
        lambda data: isinstance(data, np.ndarray) and data.ndim > 0,
        take=_index,
        concatenate=_concatenate_arrays,
        as_input=_native,
        first_bad=first_bad_in_array,
    ),
    "pandas DataFrame or Series": Container(
        lambda data: hasattr(data, "iloc"),
        take=lambda data, rows: data.iloc[rows],  # data[rows] means columns or labels
        concatenate=_concatenate_by_library,
        as_input=lambda data: data if hasattr(data, "columns") else np.asarray(data),
        first_bad=first_bad_in_pandas,
        columns=_column_names,
    ),
    "polars DataFrame or Series": Container(
        _comes_from("polars"),
        take=_index,
        concatenate=_concatenate_polars,
        as_input=np.asarray,
        first_bad=first_bad_in_columns,
        columns=_column_names,
    ),
    "pyarrow Table": Container(
        lambda data: _comes_from("pyarrow")(data) and hasattr(data, "column_names"),
        take=lambda data, rows: data.take(rows),
        concatenate=lambda old, new: _library_of(old).concat_tables(
            [old, new.select(old.column_names)], promote_options="permissive"
        ),
        as_input=np.asarray,
        first_bad=first_bad_in_columns,
        columns=_column_names,
    ),
    "Hugging Face Dataset": Container(
        lambda data: _comes_from("datasets")(data) and hasattr(data, "column_names"),
        take=lambda data, rows: data.select(rows),
        concatenate=lambda old, new: _library_of(old).concatenate_datasets([old, new]),
        as_input=_refuse_hugging_face,
        first_bad=lambda data: None,
        columns=_column_names,
    ),
    "xarray.DataArray": Container(
        lambda data: _comes_from("xarray")(data) and hasattr(data, "dims"),
        take=_index,
        concatenate=lambda old, new: _concatenate_by_library(old, new, dim=old.dims[0]),
        as_input=np.asarray,
    ),
    "array in an HDF5 or zarr file": Container(
        is_in_file,
        take=_take_from_file,
        concatenate=_concatenate_arrays,
        as_input=_native_in_file,
        first_bad=first_bad_in_array,
    ),
    "list of samples": Container(
        lambda data: isinstance(data, list | tuple | range),
        take=_take_each,
        concatenate=_concatenate_lists,
        as_input=_stacked,
        first_bad=first_bad_in_list,
    ),
    "another array": Container(
        lambda data: has_rows(data),
        take=_index,
        concatenate=_concatenate_arrays,
        as_input=_unchanged,
    ),
}


def container_of(data: Data) -> Container | None:
    """Return the row of the table for a container; None for what holds no samples."""
    return next((kind for kind in CONTAINERS.values() if kind.holds(data)), None)


# -- what is done with samples -------------------------------------------------------------------


def n_rows(data: Data) -> int:
    """Count the samples."""
    data = input_arrays(data)[0]
    return int(data.shape[0]) if hasattr(data, "shape") else len(data)


def take_rows(data: Data, indices: Data) -> Data:
    """Return some samples, in the container they came in."""
    kind = container_of(data)
    return _index(data, indices) if kind is None else kind.take(data, indices)


def stack_rows(old: Data, new: Data) -> Data:
    """Concatenate old and new samples, in the container of the old ones.

    Raises ValueError if they have columns or inputs of other names.
    """
    kind = container_of(old)
    if kind is None:
        return _concatenate_arrays(old, new)
    names = kind.columns(old)
    if names is not None:
        columns = kind.columns(new) if kind.holds(new) else None
        if columns is None or set(columns) != set(names):
            raise ValueError(
                f"The new samples have {columns or type(new).__name__}; expected {names} like the "
                "training data."
            )
    return kind.concatenate(old, new)
