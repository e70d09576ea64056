"""The first row with NaN or infinity, in each kind of container."""

from __future__ import annotations

import numpy as np
import torch

from skfishermask.data.types import Data

# Numbers that are looked at in one go.
_CHUNK = 1 << 18


def _first(bad: np.ndarray) -> int | None:
    rows = bad.reshape(len(bad), -1).any(axis=1)
    return int(rows.argmax()) if rows.any() else None


def first_bad_in_array(data: Data) -> int | None:
    """Look at an array, of which a part is read at a time where it is in a file."""
    if data.dtype.kind == "O":
        # NaN alone differs from itself.
        return _first(np.asarray(data != data))
    if data.dtype.kind not in "fc" or 0 in data.shape:
        return None
    step = max(1, _CHUNK // max(1, data[0].size))
    for start in range(0, data.shape[0], step):
        bad = _first(~np.isfinite(np.asarray(data[start : start + step])))
        if bad is not None:
            return start + bad
    return None


def first_bad_in_memory(data: Data) -> int | None:
    """Look at what NumPy can make an array of."""
    return first_bad_in_array(np.asanyarray(data)) if hasattr(data, "__array__") else None


def first_bad_in_tensor(data: torch.Tensor) -> int | None:
    """Look at a tensor."""
    bad = (~torch.isfinite(data)).nonzero()
    return int(bad[0, 0]) if len(bad) else None


def first_bad_in_list(data: Data) -> int | None:
    """Look at a list of numbers, arrays, tensors or lists, ragged or not."""
    try:
        return first_bad_in_array(np.atleast_1d(np.asarray(data)))
    except (ValueError, TypeError, RuntimeError):  # ragged, or tensors that NumPy cannot read
        for i, row in enumerate(data):
            look = first_bad_in_tensor if isinstance(row, torch.Tensor) else first_bad_in_list
            if look(row) is not None:
                return i
    return None


def first_bad_in_sparse(data: Data) -> int | None:
    """Look at the numbers of a sparse matrix that are stored."""
    data = data.tocoo()
    bad = ~np.isfinite(data.data)
    return int(data.row[bad].min()) if bad.any() else None


def first_bad_in_pandas(data: Data) -> int | None:
    """Look at a DataFrame or a Series of pandas, in which anything can be missing."""
    missing = _first(np.asarray(data.isna()))
    if missing is not None:
        return missing
    numbers = data.select_dtypes("number") if hasattr(data, "select_dtypes") else data
    return first_bad_in_array(np.asarray(numbers))


def first_bad_in_columns(data: Data) -> int | None:
    """Look at a DataFrame or Series of polars, or at a table of pyarrow."""
    names = getattr(data, "column_names", getattr(data, "columns", None))
    columns = [data] if names is None else [data[name] for name in names]
    bad = [_first(np.asarray(column.is_null())) for column in columns]
    bad += [first_bad_in_array(np.asarray(column)) for column in columns]
    return min((row for row in bad if row is not None), default=None)
