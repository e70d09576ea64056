"""Who may import whom: data flow down one list, and optional packages stay optional."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "skfishermask"
ENGINE = {"_guard", "directions", "jacobian", "mask", "network", "storage"}

# module -> modules of the package that it may import, and third-party packages.
MAY_IMPORT = {
    "__init__": ({"display", "evaluation", "fisher", "mask", "sampler", "selection"}, set()),
    "_guard": (set(), {"numpy", "torch"}),
    "directions": (set(), {"torch"}),
    "layers": (set(), {"torch"}),
    "mask": (set(), {"numpy", "sklearn", "torch"}),
    "network": ({"_guard"}, {"torch"}),
    "jacobian": ({"_guard", "layers", "network"}, {"torch"}),
    "fisher": (ENGINE, {"torch"}),
    "storage": (set(), {"torch"}),
    "placement": ({"storage"}, {"psutil", "torch"}),
    "candidates": (set(), {"torch"}),
    "gains": (set(), {"torch"}),
    "embedded": ({"candidates", "gains", "storage"}, {"torch"}),
    "greedy": ({"candidates", "embedded", "gains"}, {"torch"}),
    "shortlist": ({"candidates", "embedded"}, {"torch"}),
    "selection": ({"candidates", "embedded", "gains", "greedy", "storage"}, {"torch"}),
    "_skorch": ({"network"}, {"numpy", "sklearn", "skorch", "torch"}),
    "unwrap": ({"_skorch"}, {"sklearn"}),
    "_dask": ({"_rows", "_skorch", "network"}, {"dask", "numpy"}),
    "query": (
        {
            *("_dask", "_rows", "_skorch", "directions", "fisher", "mask", "network", "placement"),
            *("selection", "storage"),
        },
        {"numpy", "sklearn", "torch", "tqdm"},
    ),
    "distributed": (
        {
            *("_dask", "_skorch", "_worker", "candidates", "greedy", "placement", "query"),
            *("selection", "shortlist"),
        },
        {"cloudpickle", "dask", "distributed", "numpy", "psutil", "sklearn", "torch", "tqdm"},
    ),
    "_worker": (
        {"_dask", "_skorch", "candidates", "embedded", "fisher", "mask", "shortlist"},
        {"cloudpickle", "distributed", "numpy", "torch"},
    ),
    "default": (set(), {"skorch", "torch"}),
    "classifier": (
        {"_guard", "_rows", "_skorch", "default", "unwrap"},
        {"numpy", "sklearn", "torch"},
    ),
    "sampler": (
        {
            *("_dask", "_rows", "classifier", "directions", "distributed", "mask", "placement"),
            *("query", "unwrap"),
        },
        {"numpy", "sklearn"},
    ),
    "_rows": (set(), {"numpy", "pandas", "scipy", "sklearn", "torch"}),
    "activeml": (
        {
            *(
                "candidates",
                "directions",
                "embedded",
                "gains",
                "greedy",
                "mask",
                "query",
                "sampler",
            ),
            *("storage", "unwrap"),
        },
        {"numpy", "skactiveml", "sklearn", "skorch", "torch"},
    ),
    "_initial": (set(), {"numpy"}),
    "_checkpoint": ({"_rows"}, {"numpy", "torch"}),
    "evaluation": (
        {"_checkpoint", "_guard", "_initial", "_rows", "unwrap"},
        {"joblib", "numpy", "sklearn", "torch", "tqdm"},
    ),
    "display": ({"evaluation"}, {"matplotlib", "numpy", "sklearn"}),
    "modal": ({"_rows"}, {"modAL", "sklearn", "torch"}),
}
OPTIONAL = ["modAL", "torchvision", "matplotlib", "dask", "distributed", "skactiveml"]


def imports(module: str) -> tuple[set[str], set[str]]:
    own, others = set(), set()
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "skfishermask":
            names = [f"skfishermask.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = [node.module]
        else:
            continue
        for name in names:
            first, *rest = name.split(".")
            if first == "skfishermask":
                own.add(rest[0])
            elif first not in sys.stdlib_module_names:
                others.add(first)
    return own, others


def test_every_module_stands_in_the_table() -> None:
    assert {path.stem for path in PACKAGE.glob("*.py")} == set(MAY_IMPORT)


@pytest.mark.parametrize("module", MAY_IMPORT)
def test_imports(module: str) -> None:
    own, others = imports(module)
    may_own, may_others = MAY_IMPORT[module]
    assert own <= may_own
    assert others <= may_others


def test_optional_packages_are_not_imported() -> None:
    code = f"import sys, skfishermask; print([p for p in {OPTIONAL} if p in sys.modules])"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert found.strip() == "[]"
