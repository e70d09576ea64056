"""Numbers in pages come from where they were measured, not from the keyboard.

The pages named in ``PAGES`` are Jinja templates of reStructuredText. Their values are made here.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
from sphinx.application import Sphinx

ROOT = Path(__file__).parents[2]
QUERY = ROOT / "benchmarks/results/query_resnet18.json"
PACKAGES = [
    *("numpy", "scipy", "scikit-learn", "torch", "skorch", "modAL-python", "scikit-activeml"),
    *("pandas", "matplotlib"),
]


def versions() -> dict[str, str]:
    found = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"Python": platform.python_version(), **found}


PAGES: dict[str, Callable[[], dict[str, Any]]] = {
    "installation": lambda: {"versions": versions()},
    "performance": lambda: {"result": json.loads(QUERY.read_text(encoding="utf-8"))},
}


def significant(value: float, digits: int = 2) -> str:
    """Round to so many digits, with commas and no exponent."""
    rounded = float(f"{value:.{digits}g}")
    return f"{rounded:,.0f}" if abs(rounded) >= 10 ** (digits - 1) else f"{rounded:,g}"


def duration(seconds: float) -> str:
    """Say seconds in the unit that a reader would."""
    if seconds < 1:
        return f"{significant(1000 * seconds)} ms"
    if seconds < 100:
        return f"{significant(seconds)} s"
    return f"{significant(seconds / 60)} min"


def render(app: Sphinx, page: str, source: list[str]) -> None:
    if page not in PAGES:
        return
    app.env.note_dependency(str(QUERY), docname=page)
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters |= {"duration": duration, "significant": significant}
    source[0] = environment.from_string(source[0]).render(PAGES[page]())


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("source-read", render)
    return {"version": "1", "parallel_read_safe": True}
