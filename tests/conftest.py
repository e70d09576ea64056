from __future__ import annotations

import os
import random

import numpy as np
import pytest
import torch

# They start processes of their own: `make test` runs them in one of its two, one after the other.
WITH_PROCESSES = {"test_cluster.py", "test_places.py", "test_pretended.py", "test_private_names.py"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.name in WITH_PROCESSES:
            item.add_marker(pytest.mark.xdist_group("processes"))
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if item.get_closest_marker("pretended") and "PRETENDED_DEVICE" not in os.environ:
            item.add_marker(pytest.mark.skip(reason="test_pretended.py runs it on its own"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for report in terminalreporter.getreports("passed"):
        for name, counts in report.user_properties:
            if name == "check_estimator":
                terminalreporter.write_line(f"{report.nodeid}: scikit-learn's checks: {counts}")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    random.seed(0)
