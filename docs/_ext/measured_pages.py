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

RESULTS = Path(__file__).parents[2] / "benchmarks/results"
# Of the benchmarks; those after the third may be missing, because they are measured apart.
BENCHMARKS = (
    *("embedding", "selection", "query", "large", "cluster", "faults", "paper", "waits"),
    *("mask_size", "networks"),
)
PACKAGES = [
    *("numpy", "scipy", "scikit-learn", "torch", "skorch", "modAL-python", "scikit-activeml"),
    *("pandas", "matplotlib"),
]


def versions() -> dict[str, str]:
    found = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"Python": platform.python_version(), **found}


def files(folder: Path = RESULTS) -> dict[str, Path]:
    paths = {name: folder / f"{name}.json" for name in BENCHMARKS}
    return {name: path for name, path in paths.items() if path.exists()}


def measured(folder: Path = RESULTS) -> dict[str, Any]:
    found = dict.fromkeys(BENCHMARKS)
    return found | {
        name: json.loads(path.read_text(encoding="utf-8")) for name, path in files(folder).items()
    }


PAGES: dict[str, Callable[[], dict[str, Any]]] = {
    "versions": lambda: {"versions": versions()},
    "performance": measured,
}


def significant(value: float, digits: int = 2) -> str:
    """Round to a number of digits, with commas and no exponent."""
    rounded = float(f"{value:.{digits}g}")
    return f"{rounded:,.0f}" if abs(rounded) >= 10 ** (digits - 1) else f"{rounded:,g}"


def duration(seconds: float) -> str:
    """Say seconds in the unit that a reader would."""
    if seconds < 1:
        return f"{significant(1000 * seconds)} ms"
    if seconds < 100:
        return f"{significant(seconds)} s"
    return f"{significant(seconds / 60)} min"


def size(n_bytes: float) -> str:
    """Say bytes in the unit that a reader would."""
    if n_bytes < 1e9:
        return f"{significant(n_bytes / 1e6, 3)} MB"
    return f"{significant(n_bytes / 1e9, 3)} GB"


def span(spread: dict[str, float], show: Callable[[float], str] = significant) -> str:
    """Say a median and, in brackets, the smallest and the largest."""
    median, low, high = (show(spread[key]) for key in ("median", "min", "max"))
    return median if low == high == median else f"{median} ({low} to {high})"


def span_of_durations(spread: dict[str, float]) -> str:
    return span(spread, duration)


def span_of_shares(spread: dict[str, float]) -> str:
    """In percent, to a tenth where it is close to all."""
    return span(spread, lambda share: f"{100 * share:.{1 if share > 0.95 else 0}f}%")


def computer(machine: dict[str, Any]) -> str:
    """Say what it was measured on."""
    threads = f"{machine['threads']} thread{'' if machine['threads'] == 1 else 's'}"
    return f"{machine['device']} ({machine['processor']}), {threads}"


def settings(fixed: dict[str, Any]) -> str:
    """Say what a sweep held fixed."""
    said = []
    for key, value in fixed.items():
        name = f"*{key}*" if len(key) == 1 else f"``{key}``"
        said.append(f"{name} = {value:,}" if isinstance(value, int) else f"{name} = {value}")
    return ", ".join(said)


def environment() -> jinja2.Environment:
    made = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True)
    filters = (duration, significant, size, span, span_of_durations, span_of_shares)
    filters += (settings, computer)
    made.filters |= {function.__name__: function for function in filters}
    return made


def redraw(app: Sphinx, page: str) -> None:
    """Remove a page's figures that are older than the results: only scripts are watched."""
    newest = max(path.stat().st_mtime for path in files().values())
    for figure in (Path(app.doctreedir).parent / "plot_directive").rglob(f"{page}*.png"):
        if figure.stat().st_mtime < newest:
            figure.unlink(missing_ok=True)


def render(app: Sphinx, page: str, source: list[str]) -> None:
    if page not in PAGES:
        return
    if PAGES[page] is measured:
        for path in files().values():
            app.env.note_dependency(str(path), docname=page)
        redraw(app, page)
    source[0] = environment().from_string(source[0]).render(PAGES[page]())


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("source-read", render)
    return {"version": "1", "parallel_read_safe": True}
