"""Two workers in this process, or in processes of their own, for all tests of clusters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.nets import digits, mlp, options


@pytest.fixture(scope="module")
def pool() -> np.ndarray:
    from tests.cluster import local

    return digits()[0][100 : 100 + local.N_POOL].astype("float64")


@pytest.fixture(scope="module")
def labeled() -> np.ndarray:
    return digits()[0][:60].astype("float64")


@pytest.fixture(scope="module")
def net() -> Any:
    from tests.cluster import local

    X, y = digits()
    torch.manual_seed(0)
    made = local.DoubleNet(mlp(), criterion=nn.CrossEntropyLoss, **options(max_epochs=40))
    return made.fit(X[:60].astype("float64"), y[:60])


@pytest.fixture(scope="package")
def in_this_process() -> Iterator[Any]:
    from tests.cluster import local

    with local.cluster(2, processes=False) as client:
        yield client


@pytest.fixture(scope="package")
def in_processes() -> Iterator[Any]:
    from tests.cluster import local

    with local.cluster(2, processes=True, threads_per_worker=2) as client:
        yield client


@pytest.fixture
def threads(in_this_process: Any) -> Iterator[Any]:
    """Two workers in this process."""
    with in_this_process.as_current():
        yield in_this_process


@pytest.fixture
def processes(in_processes: Any) -> Iterator[Any]:
    """Two workers in processes of their own, with two threads each."""
    with in_processes.as_current():
        yield in_processes
