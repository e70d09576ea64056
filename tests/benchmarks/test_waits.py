"""What a device is asked for, counted on a pretended one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.pretended


def test_few_waits_and_operations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks.speed import waits

    waits.main(["--out", str(tmp_path / "waits.json")])
    found = json.loads((tmp_path / "waits.json").read_text("utf-8"))
    picks = found["selection"]
    assert picks["same_picks"]
    # Those of the start are among them: its own checks read some numbers.
    assert 100 / 8 < picks["waits"] <= 100 / 4, picks["lines that wait"]
    assert 0 < picks["operations a pick"] <= 120
    for works in found["networks"].values():
        for work in works.values():
            assert work["same"]
            assert 1 <= work["waits a batch"] <= 3, work["lines that wait"]
            assert work["waits of the first batch"] > work["waits a batch"]
    assert all(target["met"] for target in found["targets"])
    assert "operations a pick: " in capsys.readouterr().out
