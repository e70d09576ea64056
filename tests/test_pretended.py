"""What runs on a pretended device, in a process of its own: the others know of no such device."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration

TESTS = Path(__file__).parent


@pytest.mark.slow
def test_on_a_pretended_device() -> None:
    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("devices written in Python are newer than this torch")
    command = [sys.executable, "-m", "pytest", "-q", "-m", "pretended", "-p", "no:cacheprovider"]
    names = ("linalg", "places", "selection", "storage", "waits")
    found = subprocess.run(
        [*command, *(str(TESTS / f"test_{name}.py") for name in names)],
        env=os.environ | {"PRETENDED_DEVICE": "1"},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stdout[-4000:]
    assert "skipped" not in found.stdout
