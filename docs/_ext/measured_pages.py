"""Pages with measured numbers: Jinja templates of reStructuredText, rendered from the results.

``PAGES`` names them, with their values and the files these come from.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from sphinx.application import Sphinx

RESULTS = Path(__file__).parents[2] / "benchmarks/results"
# Of the benchmarks; those after the third may be missing, because they are measured apart.
BENCHMARKS = (
    *("embedding", "selection", "query", "large", "cluster", "faults", "paper", "waits"),
    *("mask_size", "networks", "defaults", "knobs"),
)
PACKAGES = [
    *("numpy", "scipy", "scikit-learn", "torch", "skorch", "modAL-python", "scikit-activeml"),
    *("pandas", "matplotlib", "transformers"),
]


def versions() -> dict[str, str]:
    found = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"Python": platform.python_version(), **found}


def files(folder: Path = RESULTS) -> dict[str, Path]:
    paths = {name: folder / f"{name}.json" for name in BENCHMARKS}
    return {name: path for name, path in paths.items() if path.exists()}


def measured(folder: Path = RESULTS) -> dict[str, Any]:
    found = dict.fromkeys((*BENCHMARKS, "reduced"))
    return found | {
        name: json.loads(path.read_text(encoding="utf-8")) for name, path in files(folder).items()
    }


def study() -> dict[str, Any]:
    """Compute the values of the page on label efficiency."""
    from benchmarks.study import report

    return report.values(RESULTS)


def performance() -> dict[str, Any]:
    """Return the values of the page on performance."""
    from benchmarks.study import report

    return measured() | {"reduced": report.reduced(RESULTS)}


def study_files() -> list[Path]:
    parts = ("", "_heads", "_pixels", "_likelihoods")
    folders = [*(RESULTS / f"label_efficiency{part}" for part in parts), RESULTS / "foreign"]
    return [path for folder in folders for path in sorted(folder.rglob("*.*"))]


@dataclass(frozen=True)
class Page:
    """The values of a template, and the files that they are read from."""

    values: Callable[[], dict[str, Any]]
    files: Callable[[], list[Path]] = list


PAGES = {
    "versions": Page(lambda: {"versions": versions()}),
    "performance": Page(performance, lambda: [*files().values(), *study_files()]),
    "label_efficiency": Page(study, study_files),
}


def significant(value: float, digits: int = 2) -> str:
    """Round to a number of significant digits, with commas and no exponent."""
    rounded = float(f"{value:.{digits}g}")
    return f"{rounded:,.0f}" if abs(rounded) >= 10 ** (digits - 1) else f"{rounded:,g}"


def duration(seconds: float) -> str:
    """Return seconds in the unit that a reader would use."""
    if seconds < 1:
        return f"{significant(1000 * seconds)} ms"
    if seconds < 100:
        return f"{significant(seconds)} s"
    return f"{significant(seconds / 60)} min"


def size(n_bytes: float) -> str:
    """Return bytes in the unit that a reader would use."""
    if n_bytes < 1e6:  # the process used again what it had freed before
        return "none new"
    if n_bytes < 1e9:
        return f"{significant(n_bytes / 1e6, 3)} MB"
    return f"{significant(n_bytes / 1e9, 3)} GB"


def span(spread: dict[str, float], show: Callable[[float], str] = significant) -> str:
    """Return a median and, in brackets, the smallest and the largest."""
    median, low, high = (show(spread[key]) for key in ("median", "min", "max"))
    return median if low == high == median else f"{median} ({low} to {high})"


def span_of_durations(spread: dict[str, float]) -> str:
    return span(spread, duration)


def span_of_shares(spread: dict[str, float]) -> str:
    """Return a spread in percent, to a tenth where it is close to 100."""
    return span(spread, lambda share: f"{100 * share:.{1 if share > 0.95 else 0}f}%")


def computer(machine: dict[str, Any]) -> str:
    """Return the name of the machine."""
    threads = f"{machine['threads']} thread{'' if machine['threads'] == 1 else 's'}"
    return f"{machine['device']} ({machine['processor']}), {threads}"


def settings(fixed: dict[str, Any]) -> str:
    """Return what a sweep held fixed."""
    said = []
    for key, value in fixed.items():
        name = f"*{key}*" if len(key) == 1 else f"``{key}``"
        said.append(f"{name} = {value:,}" if isinstance(value, int) else f"{name} = {value}")
    return ", ".join(said)


def points(value: float) -> str:
    """Return a difference of accuracies in points of a hundred, with its sign."""
    return f"{100 * value:+.1f}".replace("-", "\N{MINUS SIGN}")


def points_unsigned(value: float) -> str:
    return f"{100 * value:.1f}"


def mark(verdict: str) -> str:
    return {"better": "▲ ", "worse": "▼ "}.get(verdict, "")


def with_interval(comparison: Any) -> str:
    """Return a difference in points with its 95% interval."""
    low, high = points(comparison.low), points(comparison.high)
    return f"{points(comparison.mean)} ({low} to {high})"


def percent(share: float) -> str:
    """Return a share in percent, nothing where there is none."""
    return f"{100 * share:.0f}" if share == share else ""


def beside(found: dict[str, Any] | None) -> str:
    """Return a mean in points of a hundred, and in brackets what others report of the same."""
    if found is None:
        return ""
    mean, theirs = points_unsigned(found["mean"]), found["theirs"]
    if theirs is None:
        return mean
    return f"{mean} ({' ± '.join(map(points_unsigned, theirs))})"


def with_error(comparison: Any) -> str:
    """Return a difference in points, marked, with its standard error."""
    error = f" ({100 * comparison.error:.1f})" if comparison.n_seeds > 1 else " (one seed)"
    return f"{mark(comparison.verdict)}{points(comparison.mean)}{error}"


FILTERS = (
    *(duration, significant, size, span, span_of_durations, span_of_shares, settings, computer),
    *(points, points_unsigned, mark, with_interval, with_error, percent, beside),
)


def environment() -> jinja2.Environment:
    made = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True)
    made.filters |= {function.__name__: function for function in FILTERS}
    return made


def redraw(app: Sphinx, page: str, files: list[Path]) -> None:
    """Remove a page's figures that are older than the results: only scripts are watched."""
    newest = max((path.stat().st_mtime for path in files), default=0)
    for figure in (Path(app.doctreedir).parent / "plot_directive").rglob(f"{page}*.png"):
        if figure.stat().st_mtime < newest:
            figure.unlink(missing_ok=True)


def render(app: Sphinx, page: str, source: list[str]) -> None:
    if page not in PAGES:
        return
    files = PAGES[page].files()
    for path in files:
        app.env.note_dependency(str(path), docname=page)
    redraw(app, page, files)
    source[0] = environment().from_string(source[0]).render(PAGES[page].values())


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("source-read", render)
    return {"version": "1", "parallel_read_safe": True}
