"""Pages with measured numbers, and their figures, from any folder of results."""

from __future__ import annotations

import importlib
import runpy
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def measured_pages() -> ModuleType:
    """Return the extension that renders them."""
    pytest.importorskip("sphinx")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "docs/_ext")
        return importlib.import_module("measured_pages")


def render(name: str, values: dict[str, Any]) -> str:
    template = (ROOT / f"docs/{name}.rst").read_text(encoding="utf-8")
    return measured_pages().environment().from_string(template).render(values)


def draw(name: str, results: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Draw a figure from the results in ``results``, a folder ``benchmarks/results``."""
    plt = pytest.importorskip("matplotlib.pyplot")
    folder = results.parents[1] / "docs/figures"
    folder.mkdir(parents=True, exist_ok=True)
    monkeypatch.chdir(folder)
    plt.close("all")
    drawn = runpy.run_path(str(ROOT / f"docs/figures/{name}.py"))
    drawn["figure"].savefig("drawn.png")
    plt.close("all")
    return folder / "drawn.png"
