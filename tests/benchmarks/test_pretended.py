"""The tests of a pretended device, in a process of its own: it changes PyTorch for good."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration

TESTS = Path(__file__).parents[1]
# How a test file asks for the device.
MARKS = ("any_device", "mark.pretended")


@pytest.mark.slow
def test_on_a_pretended_device() -> None:
    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("devices written in Python are newer than this torch")
    files = [
        path
        for path in sorted(TESTS.rglob("test_*.py"))
        if any(mark in path.read_text(encoding="utf-8") for mark in MARKS)
        and path != Path(__file__)
    ]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "pretended", "-p", "no:cacheprovider"]
    found = subprocess.run(
        [*command, *map(str, files)],
        env=os.environ | {"PRETENDED_DEVICE": "1"},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stdout[-4000:]
    assert " passed" in found.stdout
    assert "skipped" not in found.stdout
