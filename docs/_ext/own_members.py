"""Reference pages list the members that this package writes, not those that it inherits.

What modAL and scikit-activeml bring along is documented there.
"""

from __future__ import annotations

from typing import Any

from sphinx.application import Sphinx

FOREIGN = ("modAL", "skactiveml")


def skip(
    app: Sphinx, what: str, name: str, member: Any, skipped: bool, options: Any
) -> bool | None:
    module = getattr(member, "__module__", None) or ""
    return True if module.split(".")[0] in FOREIGN else None


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("autodoc-skip-member", skip)
    return {"version": "1", "parallel_read_safe": True}
