"""Clusters on this machine, and queries on them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from skorch import NeuralNetClassifier

from skfishermask import PUBLISHED, FisherMaskSampler
from tests import forked

dask = pytest.importorskip("dask", reason="needs Dask, which is an extra")
distributed = pytest.importorskip("distributed", reason="needs Dask, which is an extra")
da = pytest.importorskip("dask.array", reason="needs Dask, which is an extra")

UNEVEN = ((40, 1, 119, 14, 226), (64,))
N_POOL = sum(UNEVEN[0])


class DoubleNet(NeuralNetClassifier):
    """In float64 throughout, so that two orders of summation agree to the last digits."""

    def initialize_module(self) -> DoubleNet:
        super().initialize_module()
        self.module_.double()
        return self


class WatchedClient(distributed.Client):
    """Lists the names of the functions of the tasks that were started."""

    on_start: Callable[[str], None] = staticmethod(lambda name: None)

    def submit(self, function: Any, *args: Any, **options: Any) -> Any:
        self.on_start(function.__name__)
        return super().submit(function, *args, **options)

    def compute(self, collections: Any, *args: Any, **options: Any) -> Any:
        started = super().compute(collections, *args, **options)
        if isinstance(started, list):
            self.on_start(str(started[0].key).split("-")[0])
        return started


def cluster(n_workers: int, **more: Any) -> Any:
    forked.server()
    made = distributed.LocalCluster(
        **({"n_workers": n_workers, "threads_per_worker": 1, "dashboard_address": ":0"} | more)
    )

    class Both(WatchedClient):
        def __exit__(self, *error: Any) -> Any:
            closed = super().__exit__(*error)
            made.close()
            return closed

    return Both(made)


def at_request(number: int, act: Callable[[], object]) -> Callable[[str], None]:
    """Act once, before the first worker gets a given request of the selection."""
    asked = 0

    def on_start(name: str) -> None:
        nonlocal asked
        asked += name == "ask"
        if name == "ask" and asked == number:
            act()

    return on_start


def at_start(function: str, act: Callable[[], object]) -> Callable[[str], None]:
    return lambda name: act() if name == function else None


def sampler(**more: Any) -> FisherMaskSampler:
    given = PUBLISHED | {"random_state": 0, "embedding_dtype": "float64"} | more
    return FisherMaskSampler(**given)


def chosen_by(sampler: FisherMaskSampler, net: Any, X: Any, X_labeled: Any, n: int = 12) -> Any:
    return sampler(net, X, n, X_labeled=X_labeled)


def assert_same(found: Any, expected: Any, rtol: float = 1e-10) -> None:
    assert found[0].tolist() == expected[0].tolist()
    np.testing.assert_allclose(found[1], expected[1], rtol=rtol)


def tasks(client: Any) -> list[str]:
    """List what is left on the scheduler, once it has heard of everything."""
    for _ in range(100):
        left = client.run_on_scheduler(lambda dask_scheduler: list(map(str, dask_scheduler.tasks)))
        if not left:
            break
        time.sleep(0.05)
    return left
