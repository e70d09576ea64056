"""Who may import whom, where tests lie, how long files are, and which words they use."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "skfishermask"
STEPS = {
    "compat",
    "parameters",
    "placement",
    "progress",
    "coverage",
    "coverage_batch",
    "first_batch",
    "pool",
    "query",
}
ALL = STEPS | {"jacobian", "fisher", "selection", "data", "cluster"}
# Folders and modules -> what of the package they may import, and other packages.
MAY_IMPORT: list[tuple[set[str], set[str], set[str]]] = [
    ({"jacobian"}, set(), {"torch", "numpy"}),
    ({"fisher"}, {"jacobian"}, {"torch", "numpy", "sklearn"}),
    ({"selection"}, set(), {"torch", "numpy", "psutil", "threadpoolctl"}),
    (
        {"data"},
        {"jacobian", "fisher", "compat"},
        {"torch", "numpy", "scipy", "sklearn", "skorch", "dask"},
    ),
    (
        {"cluster"},
        STEPS - {"coverage", "coverage_batch", "first_batch", "query"}
        | {"jacobian", "fisher", "selection", "data"},
        {"torch", "numpy", "psutil", "sklearn", "dask", "distributed", "cloudpickle"},
    ),
    (
        STEPS,
        ALL,
        {"torch", "numpy", "sklearn", "skorch", "tqdm", "dask"},
    ),
    (
        {"sampler", "classifier", "targets", "activeml", "query_table"},
        ALL | {"classifier", "sampler", "targets"},
        {"torch", "numpy", "sklearn", "skorch", "skactiveml"},
    ),
    (
        {"evaluation", "modal"},
        {"data", "jacobian", "progress", "parameters", "first_batch"},
        {"torch", "numpy", "sklearn", "joblib", "matplotlib", "modAL"},
    ),
    (
        {"__init__"},
        {"fisher", "selection", "sampler", "evaluation", "parameters", "query_table"},
        set(),
    ),
]
OPTIONAL = [
    *("modAL", "torchvision", "matplotlib", "dask", "distributed", "skactiveml"),
    *("polars", "h5py", "zarr", "xarray", "datasets"),
]
# These two are used by one file each.
ONE_FILE = {"modAL": "modal", "skactiveml": "activeml"}


def unit(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found.append(node.module)
    return [name for name in found if name.split(".")[0] not in sys.stdlib_module_names]


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports(path: Path) -> None:
    name = unit(path)
    [(own, others)] = [(own, others) for units, own, others in MAY_IMPORT if name in units]
    for imported in imports(path):
        first, *rest = imported.split(".")
        if first != "skfishermask":
            assert first in others
            assert ONE_FILE.get(first, name) == name
        elif rest[0] != name:
            assert rest[0] in own
            # Another folder is what its __init__ gives.
            assert len(rest) == 1


FOLDERS = [".", *sorted({path.parent.name for path in FILES} - {PACKAGE.name})]
# Test files of no module: they are of the whole package, or of what lies beside it.
OF_ALL = {
    f"test_{name}"
    for name in (
        "architecture",
        "errors",
        "hints",
        "quickstart",
        "readme",
        "release",
        "tutorials",
        "wrappings",
    )
}


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_module_has_its_test_file(folder: str) -> None:
    modules = {path.stem for path in (PACKAGE / folder).glob("*.py")} - {"__init__"}
    tested = {path.stem for path in (Path(__file__).parent / folder).glob("test_*.py")}
    assert {f"test_{name}" for name in modules} == tested - OF_ALL


def test_no_private_files() -> None:
    names = {path.name for path in FILES if path.name.startswith("_")}
    assert names == {"__init__.py"}


def test_no_file_is_long() -> None:
    long = [unit_and_name(path) for path in FILES if len(lines(path)) > 450]
    assert long == []


def test_no_function_is_long() -> None:
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef):
                n_lines = node.end_lineno - node.lineno + 1
                if ast.get_docstring(node) is not None:
                    docstring = node.body[0]
                    n_lines -= docstring.end_lineno - docstring.lineno + 1
                assert n_lines <= 55, f"{unit_and_name(path)}: {node.name}"


ROOT = PACKAGE.parent
PROSE = ["skfishermask", "tests", "benchmarks", "examples", "docs"]
BUILT = {"_build", "auto_examples", "generated", "results"}
TEXTS = [
    path
    for path in [*ROOT.glob("*.md"), *(p for folder in PROSE for p in (ROOT / folder).rglob("*"))]
    if path.suffix in (".py", ".rst", ".md") and not BUILT & {*path.relative_to(ROOT).parts}
]
# A number has a name, and a tensor is no person.
NO_PROSE = re.compile(r"\b(so many|whose|whatever)\b", re.IGNORECASE)
# A docstring says what is returned or done: Return, Compute, Check ...
NO_VERBS = {"Give", "Say", "Tell", "Put", "Take", "Let"}
# Names of variables that would stand for anything.
CATCH_ALL = {"found", "thing", "things", "part", "parts", "place", "stuff"}


def test_words() -> None:
    written = {path: path.read_text("utf-8") for path in TEXTS if path != Path(__file__)}
    assert [path.name for path, text in written.items() if NO_PROSE.search(text)] == []


def docstrings(path: Path) -> list[str]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    nodes = [
        node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, kinds)
    ]
    return [text for node in nodes if (text := ast.get_docstring(node))]


def test_docstrings_begin_with_what_is_returned_or_done() -> None:
    for path in TEXTS:
        if path.suffix == ".py":
            assert not NO_VERBS & {text.split()[0] for text in docstrings(path)}, path


def test_no_name_stands_for_anything() -> None:
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = []
            if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
                names = [node.id if isinstance(node, ast.Name) else node.attr.strip("_")]
            elif isinstance(node, ast.arg):
                names = [node.arg]
            assert not CATCH_ALL & {*names}, f"{unit_and_name(path)}:{node.lineno}: {names}"


def unit_and_name(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def lines(path: Path) -> list[str]:
    return path.read_text("utf-8").splitlines()


def test_optional_packages_are_not_imported() -> None:
    code = f"import sys, skfishermask; print([p for p in {OPTIONAL} if p in sys.modules])"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert found.strip() == "[]"
