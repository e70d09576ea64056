from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold

from skfishermask.evaluation.initial_labels import check_labels, initial_samples

X, Y = load_iris(return_X_y=True)
SPLITS = [*StratifiedKFold(3, shuffle=True, random_state=0).split(X, Y)]


def starts(n_initial: Any, splits: Any = SPLITS) -> list[list[int]]:
    found = initial_samples(n_initial, "random", None, X, Y, splits, range(len(splits)))
    return [start.tolist() for start in found]


def test_initial_samples_are_in_training_part_and_stratified() -> None:
    found = starts(9)
    for (train, _), rows in zip(SPLITS, found, strict=True):
        assert set(rows) <= set(train)
        assert np.bincount(Y[rows]).tolist() == [3, 3, 3]
    assert len({tuple(rows) for rows in found}) == 3


@pytest.mark.parametrize(("n", "expected"), [(3, [1, 1, 1]), (10, [7, 2, 1]), (40, [28, 11, 1])])
def test_stratified_draw(n: int, expected: list[int]) -> None:
    y = np.repeat([0, 1, 2], [70, 29, 1])
    (rows,) = initial_samples(n, "random", None, y, y, [(np.arange(100), np.arange(0))], [0])
    assert len(set(rows)) == n
    assert np.bincount(y[rows]).tolist() == expected


def test_stratified_draw_of_fewer_than_classes() -> None:
    y = np.arange(10)
    (rows,) = initial_samples(4, "random", None, y, y, [(y, np.arange(0))], [0])
    assert len(set(rows)) == 4


def test_given_initial_samples() -> None:
    splits = [(np.arange(120), np.arange(120, 150)), (np.arange(30, 150), np.arange(30))]
    assert starts([60, 115, 35, 70, 40], splits) == [[35, 40, 60, 70, 115]] * 2
    of_each = [[1, 60, 110], [40, 99, 149]]
    assert starts(of_each, splits) == starts(np.asarray(of_each), splits) == of_each


@pytest.mark.parametrize(
    ("n_initial", "message"),
    [
        (-1, "n_initial to be an int of at least 1, found -1"),
        ([], "at least one"),
        (101, "n_initial of at most 100.*found 101"),
        ([0, 1, 2], "Row .* of n_initial is not in the training part"),
        ([[0], [1]], "each of the 3 splits, found 2"),
        ([[0], [1], [1, 2]], r"same number of different rows.*\[1, 1, 2\]"),
    ],
)
def test_wrong_initial_samples(n_initial: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        starts(n_initial)


def test_y_must_match() -> None:
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        check_labels(LogisticRegression(), X, Y[:-1])
    with pytest.raises(ValueError, match=r"shape \(n_samples,\), found shape \(150, 1\)"):
        check_labels(LogisticRegression(), X, Y[:, None])
