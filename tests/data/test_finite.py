"""The first row with NaN or infinity is found in every kind of container, and only there."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

from skfishermask.data import check_finite
from skfishermask.data.rows import CastArray

BAD = np.ones((9, 3), dtype="float32")
BAD[7, 0] = np.inf
BAD[5, 2] = np.nan


def library(name: str) -> Any:
    return pytest.importorskip(name)


def columns() -> dict[str, Any]:
    texts = ["x"] * 9
    return {"number": BAD[:, 2], "text": texts, "other": BAD[:, 0]}


KINDS = {
    "array": lambda: BAD,
    "complex": lambda: BAD.astype("complex64"),
    "objects": lambda: np.where(np.isinf(BAD), 1, BAD).astype(object),
    "images": lambda: BAD[:, None, None],
    "file": lambda: CastArray(BAD, "float64"),
    "tensor": lambda: torch.tensor(BAD),
    "bfloat16": lambda: torch.tensor(BAD).bfloat16(),
    "list": lambda: BAD.tolist(),
    "ragged": lambda: [[1.0], *BAD[1:].tolist()],
    "ragged tensors": lambda: [torch.ones(1), *torch.tensor(BAD[1:], requires_grad=True)],
    "numbers": lambda: BAD[:, 2].tolist(),
    "sparse": lambda: sp.csc_array(BAD),
    "frame": lambda: pd.DataFrame(columns()),
    "missing text": lambda: pd.DataFrame({"text": ["x"] * 5 + [None, "x"]}),
    "missing integer": lambda: pd.Series([1] * 5 + [None], dtype="Int64"),
    "polars": lambda: library("polars").DataFrame(columns()),
    "polars integers": lambda: library("polars").Series([1] * 5 + [None]),
    "polars texts": lambda: library("polars").DataFrame({"text": ["x"] * 5 + [None, "x"]}),
    "pyarrow": lambda: library("pyarrow").table(columns()),
    "pyarrow texts": lambda: library("pyarrow").table({"text": ["x"] * 5 + [None, "x"]}),
    "xarray": lambda: library("xarray").DataArray(BAD),
}


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_the_first_bad_row_is_named(make: Any) -> None:
    with pytest.raises(ValueError, match=r"^Input X contains NaN or infinity, first in row 105\.$"):
        check_finite(make(), "X", 100)


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_what_is_finite_passes(make: Any) -> None:
    check_finite(make()[:5], "X")


def test_an_input_is_named_by_its_key() -> None:
    with pytest.raises(ValueError, match=r"Input X\['right'\] contains NaN .* row 5"):
        check_finite({"left": BAD[:, 1:2], "right": BAD}, "X")


def test_a_file_is_read_in_pieces() -> None:
    class Pieces(CastArray):
        largest = 0

        def __getitem__(self, index: Any) -> np.ndarray:
            rows = super().__getitem__(index)
            Pieces.largest = max(self.largest, rows.size)
            return rows

    long = np.ones((3000, 1000), dtype="float32")
    long[2999, 999] = np.nan
    with pytest.raises(ValueError, match="row 2999"):
        check_finite(Pieces(long, "float32"), "X")
    assert Pieces.largest < long.size / 10
