"""The README's code runs as it is written there."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_python_blocks_run_one_after_the_other(capsys: pytest.CaptureFixture) -> None:
    expected = (
        "label these rows next: [",
        "70 labels, accuracy 0.",
        "FisherMask  [50 70 90] [0.",
        "gain of",
    )
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    namespace: dict = {}
    for block, beginning in zip(blocks, expected, strict=True):
        exec(block, namespace)
        assert beginning in capsys.readouterr().out, block


def test_what_the_python_blocks_import_is_installed_before_them() -> None:
    installation = README[: README.index("```python")]
    places = [
        installation.index(line)
        for line in (
            "whl/cpu",
            "\npip install .\n",
            '\npip install ".[dask]"',
            "\npip install pandas",
            "\npip install --no-deps modAL-python==0.4.2.1",
        )
    ]
    assert places == sorted(places)


@pytest.mark.parametrize(
    ("imported", "said"),
    [("from skfishermask.modal", "the two lines for modAL"), ("import dask", "extra `dask`")],
)
def test_what_a_python_block_needs_is_said_above_it(imported: str, said: str) -> None:
    assert said in README[: README.index(imported)].rpartition("```\n")[2]


def test_the_extras_are_those_of_the_package() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    named = re.findall(r"# extras: (.*)", README)[0].split(", ")
    assert named
    assert set(named) == set(project["optional-dependencies"]) - {"test", "docs", "bench", "dev"}


def test_it_is_short() -> None:
    assert len(README.splitlines()) < 130


def test_local_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", README):
        path = Path(__file__).parents[1] / target
        assert path.exists(), target
        # A page with measured numbers is readable only once it is rendered.
        assert path.suffix != ".rst" or "{%" not in path.read_text(encoding="utf-8"), target


@pytest.mark.parametrize("command", ["make demo", "make test"])
def test_the_two_commands_are_targets_of_the_makefile(command: str) -> None:
    assert command in README
    makefile = (Path(__file__).parents[1] / "Makefile").read_text()
    assert f"\n{command.removeprefix('make ')}:" in makefile
