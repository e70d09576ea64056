"""Who may import whom: data flow down one list, and optional packages stay optional."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "skfishermask"
# module or folder -> modules and folders of the package that it may import, and other packages.
MAY_IMPORT: dict[str, tuple[set[str], set[str]]] = {
    "__init__": ({"display", "evaluation", "fisher", "sampler", "selection"}, set()),
    "_checkpoint": ({"_rows"}, {"numpy", "torch"}),
    "_dask": ({"_rows", "_skorch", "fisher"}, {"dask", "numpy"}),
    "_initial": (set(), {"numpy"}),
    "_rows": (set(), {"numpy", "pandas", "scipy", "sklearn", "torch"}),
    "_skorch": ({"fisher"}, {"numpy", "sklearn", "skorch", "torch"}),
    "_worker": (
        {"_dask", "_skorch", "fisher", "selection"},
        {"cloudpickle", "distributed", "numpy", "torch"},
    ),
    "activeml": (
        {"fisher", "query", "sampler", "selection", "unwrap"},
        {"numpy", "skactiveml", "sklearn", "skorch", "torch"},
    ),
    "classifier": (
        {"_rows", "_skorch", "default", "fisher", "unwrap"},
        {"numpy", "sklearn", "torch"},
    ),
    "default": (set(), {"skorch", "torch"}),
    "display": ({"evaluation"}, {"matplotlib", "numpy", "sklearn"}),
    "distributed": (
        {"_dask", "_skorch", "_worker", "query", "selection"},
        {"cloudpickle", "dask", "distributed", "numpy", "psutil", "sklearn", "torch"},
    ),
    "evaluation": (
        {"_checkpoint", "_initial", "_rows", "_skorch", "fisher"},
        {"joblib", "numpy", "sklearn", "torch", "tqdm"},
    ),
    "fisher": (set(), {"numpy", "sklearn", "torch"}),
    "modal": ({"_rows", "_skorch"}, {"modAL", "sklearn", "torch"}),
    "query": (
        {"_dask", "_rows", "_skorch", "fisher", "selection"},
        {"numpy", "sklearn", "torch", "tqdm"},
    ),
    "sampler": (
        {
            "_dask",
            "_rows",
            "_skorch",
            "classifier",
            "distributed",
            "fisher",
            "query",
            "selection",
            "unwrap",
        },
        {"numpy", "sklearn"},
    ),
    "selection": (set(), {"psutil", "torch"}),
    "unwrap": ({"_skorch"}, {"sklearn"}),
}
OPTIONAL = ["modAL", "torchvision", "matplotlib", "dask", "distributed", "skactiveml"]


def unit(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(name: str) -> tuple[set[str], set[str]]:
    own, others = set(), set()
    nodes = (
        node
        for path in PACKAGE.rglob("*.py")
        if unit(path) == name
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
    )
    for node in nodes:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "skfishermask":
            names = [f"skfishermask.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = [node.module]
        else:
            continue
        for imported in names:
            first, *rest = imported.split(".")
            if first == "skfishermask":
                own.update(rest[:1])
            elif first not in sys.stdlib_module_names:
                others.add(first)
    return own - {name}, others


def test_everything_stands_in_the_table() -> None:
    assert {unit(path) for path in PACKAGE.rglob("*.py")} == set(MAY_IMPORT)


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_imports(name: str) -> None:
    own, others = imports(name)
    may_own, may_others = MAY_IMPORT[name]
    assert own <= may_own
    assert others <= may_others


def test_optional_packages_are_not_imported() -> None:
    code = f"import sys, skfishermask; print([p for p in {OPTIONAL} if p in sys.modules])"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert found.strip() == "[]"
