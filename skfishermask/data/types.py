"""Names for objects of users and of untyped packages (``Any`` stands nowhere else), and roles."""

from __future__ import annotations

from enum import Enum
from typing import Any, TypeAlias

# A user's samples: an array of any rank, DataFrame, sparse matrix, tensor, list, dict or tuple of
# arrays, Dataset or Dask collection. Or a part of them.
Data: TypeAlias = Any
# A user's labels: anything array-like.
Labels: TypeAlias = Any
# A user's estimator: scikit-learn's, modAL's, skorch's, or of any class that acts like one.
Estimator: TypeAlias = Any
# What a user's function takes or returns: a network's output, a keyword for a fit.
UserValue: TypeAlias = Any
# A user's dask.array, distributed.Client, or what these give: Dask has no types.
DaskObject: TypeAlias = Any


class SampleRole(Enum):
    """Role of a set of samples in a query: the user's argument, and what messages call them."""

    POOL = "X_pool", "pool"
    LABELED = "X_labeled", "labelled samples"
    TARGET = "X_target", "target samples"

    def __init__(self, argument: str, noun: str) -> None:
        self.argument = argument
        self.noun = noun
