"""Pairs of values for a test, of which some are quick."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def each_with_one(
    first: Iterable[Any], second: Iterable[Any], always: Collection[Any] = ()
) -> list[Any]:
    """Pair each of the first with one of the second, some with all of them; the rest is slow."""
    kinds = [*second]
    return [
        pytest.param(
            one,
            kind,
            marks=() if one in always or i % len(kinds) == j else pytest.mark.slow,
        )
        for i, one in enumerate(first)
        for j, kind in enumerate(kinds)
    ]
