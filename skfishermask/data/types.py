"""Names for objects of users and of untyped packages, so that ``Any`` stands nowhere else."""

from __future__ import annotations

from typing import Any, TypeAlias

# A user's samples: an array of any rank, DataFrame, sparse matrix, tensor, list, dict or tuple of
# arrays, Dataset or Dask collection. Or a part of them.
Data: TypeAlias = Any
# A user's labels: anything array-like.
Labels: TypeAlias = Any
# A user's estimator: scikit-learn's, modAL's, skorch's, or of any class that acts like one.
Estimator: TypeAlias = Any
# Whatever a user's function takes and gives: a network's output, a keyword for a fit.
Whatever: TypeAlias = Any
# A user's dask.array, distributed.Client, or what these give: Dask has no types.
DaskObject: TypeAlias = Any
