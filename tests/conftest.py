from __future__ import annotations

import gc
import os
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from skfishermask.data import default_net
from tests import nets

# Read by Dask when it is imported; `tests/forked.py` makes it quick.
os.environ.setdefault("DASK_DISTRIBUTED__WORKER__MULTIPROCESSING_METHOD", "forkserver")


SLOW = "slow: `make slow` runs it"

if not torch.accelerator.is_available():
    # PyTorch's own format the stack for each kind of accelerator that is missing.
    torch.manual_seed = torch.default_generator.manual_seed
    torch.cuda.manual_seed_all = lambda seed: None

# Nothing that is imported or collected is ever garbage: to look through it takes seconds.
gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("slow") and "slow" not in item.config.option.markexpr:
            item.add_marker(pytest.mark.skip(reason=SLOW))
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if item.get_closest_marker("pretended") and "PRETENDED_DEVICE" not in os.environ:
            item.add_marker(pytest.mark.skip(reason="test_pretended.py runs it on its own"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = terminalreporter.getreports("skipped")
    if n_slow := sum(SLOW in str(report.longrepr) for report in skipped):
        terminalreporter.write_line(f"{n_slow} slow tests were left out: `make slow` runs them.")
    for report in terminalreporter.getreports("passed"):
        for name, counts in report.user_properties:
            if name == "check_estimator":
                terminalreporter.write_line(f"{report.nodeid}: scikit-learn's checks: {counts}")


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=[*DEVICES, pytest.param("pretend", marks=pytest.mark.pretended)])
def any_device(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param != "pretend":
        yield request.param
        return
    from benchmarks.common.pretended import pretending

    with pretending():
        yield request.param


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    random.seed(0)


@pytest.fixture
def short_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Train default networks for fewer epochs, where conventions count and not what is learned."""

    def short(*args: Any) -> Any:
        return default_net(*args).set_params(max_epochs=15)

    monkeypatch.setattr("skfishermask.classifier.default_net", short)


@pytest.fixture(scope="session")
def net() -> Any:
    """A net with logits, trained on the first 60 digits; for tests that leave it as it is."""
    return nets.fitted(nets.logits_net())
