"""Inventories for intersphinx that are made here, so that the build needs no network.

Each file ``docs/_intersphinx/<project>.txt`` lists the names of one project that the documentation
refers to. Its first line says where that project's documentation is::

    base https://scikit-learn.org/stable/

Every other line is a role, a name and the page that has it, with $ for the name::

    py:class  sklearn.pipeline.Pipeline  modules/generated/$.html#$

To refer to a name that is not there yet, add such a line. If a reference has no line, the build
says so: "reference target not found".
"""

from __future__ import annotations

import zlib
from pathlib import Path

HEADER = "# Sphinx inventory version 2\n# Project: {}\n# Version: \n# The rest is zlib-packed.\n"


def read(path: Path) -> tuple[str, str]:
    """Return the address of a project's documentation, and its inventory uncompressed."""
    lines = [line.split() for line in path.read_text(encoding="utf-8").splitlines()]
    lines = [words for words in lines if words and not words[0].startswith("#")]
    (keyword, base), *entries = lines
    if keyword != "base" or not base.endswith("/"):
        raise ValueError(f"{path}: expected 'base https://.../' first, found {lines[0]}.")
    rows = []
    for words in entries:
        if len(words) != 3:
            raise ValueError(f"{path}: expected 'role name page', found {' '.join(words)!r}.")
        role, name, page = words
        rows.append(f"{name} {role} 1 {page.replace('$', name)} -\n")
    return base, "".join(rows)


def mapping(source: Path, target: Path) -> dict[str, tuple[str, str]]:
    """Write ``<project>.inv`` for each list in `source`; give ``intersphinx_mapping``."""
    target.mkdir(parents=True, exist_ok=True)
    found = {}
    for path in sorted(source.glob("*.txt")):
        base, rows = read(path)
        inventory = target / f"{path.stem}.inv"
        content = HEADER.format(path.stem).encode() + zlib.compress(rows.encode(), 9)
        # Left alone where it is the same: Sphinx reads all pages anew after a change.
        if not inventory.exists() or inventory.read_bytes() != content:
            inventory.write_bytes(content)
        found[path.stem] = (base, str(inventory))
    return found
