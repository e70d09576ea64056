"""One version and one date, wherever they are written."""

from __future__ import annotations

import re
from pathlib import Path

import skfishermask

ROOT = Path(__file__).parents[1]


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_version_and_date() -> None:
    [version, date] = re.findall(r"^## \[(\d+\.\d+\.\d+)\] - (\S+)$", text("CHANGELOG.md"), re.M)[0]
    citation = dict(re.findall(r"^([\w-]+): (.+)$", text("CITATION.cff"), re.M))
    assert version == skfishermask.__version__ == citation["version"]
    assert date == citation["date-released"].strip('"')
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", date)


def test_the_text_of_the_release_is_of_this_version() -> None:
    release = ROOT / ".github" / "RELEASE.md"
    if release.exists():  # not in the sdist
        assert release.read_text(encoding="utf-8").startswith(
            f"# skfishermask {skfishermask.__version__}\n"
        )


def test_the_oldest_versions_are_those_in_the_text() -> None:
    project = text("pyproject.toml")
    release = ROOT / ".github" / "RELEASE.md"
    if release.exists():
        said = release.read_text(encoding="utf-8")
        for name, shown in (("torch", "PyTorch"), ("scikit-learn", "scikit-learn")):
            oldest = re.findall(rf'"{name}>=([\d.]+)"', project)[0]
            assert f"{shown} {oldest} and later" in said
