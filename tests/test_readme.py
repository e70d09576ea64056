"""The README's code runs as it is written there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_python_blocks_run_one_after_the_other(capsys: pytest.CaptureFixture) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) == 6
    assert len(blocks[0].strip().splitlines()) == 15
    namespace: dict = {}
    for block in blocks:
        exec(block, namespace)
    printed = capsys.readouterr().out
    assert "70 labels, accuracy 0." in printed
    assert "cross-validated accuracy 0." in printed
    assert printed.count("[ 50  70  90 110] [0.") == 2
    assert len(set(namespace["positions"].tolist())) == 20


def test_local_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", README):
        assert (Path(__file__).parents[1] / target).exists(), target


@pytest.mark.parametrize("command", ["make demo", "make test"])
def test_the_two_commands_are_targets_of_the_makefile(command: str) -> None:
    assert command in README
    makefile = (Path(__file__).parents[1] / "Makefile").read_text()
    assert f"\n{command.removeprefix('make ')}:" in makefile
