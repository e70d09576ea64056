"""The numbers in README.md and on the page of questions are those of the results."""

from __future__ import annotations

import copy
import importlib
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tests.benchmarks.pages import ROOT, measured_pages

# In one process: all intervals of the study are computed for both.
pytestmark = pytest.mark.xdist_group("readme numbers")


@pytest.fixture(scope="module")
def module() -> ModuleType:
    measured_pages()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "docs/_ext")
        return importlib.import_module("readme_numbers")


@pytest.fixture(scope="module")
def measured(module: ModuleType) -> dict[str, Any]:
    values: dict[str, Any] = module.values()
    return values


def test_they_are_rendered_from_the_results(module: ModuleType, measured: dict[str, Any]) -> None:
    values = copy.deepcopy(measured)
    for block in module.BLOCKS:
        written = block.written().strip("\n")
        assert written, block.begin
        rendered = block.rendered(values).strip("\n")
        assert written == rendered, "run PYTHONPATH=. python docs/_ext/readme_numbers.py"

    values["query"]["query"]["ours"]["total"]["median"] = 7.0
    assert "parameters take 7 s; in" in " ".join(module.README.rendered(values).split())
    first, *_ = values["defaults"]["cases"].values()
    first["seconds"] = 90
    assert "100 picks" in module.SECONDS.rendered(values)
    assert " 90 s  " in module.SECONDS.rendered(values)


def test_a_third_round_and_defaults_are_shown_where_they_were_measured(
    module: ModuleType, measured: dict[str, Any]
) -> None:
    def comparison(mean: float) -> SimpleNamespace:
        return SimpleNamespace(mean=mean, low=mean - 0.01, high=mean + 0.01, verdict="better")

    third = {
        "needed": 0.62,
        "n_settings": 28,
        "minus": {kind: {"random": comparison(0.05)} for kind in ("balanced", "long-tailed")},
        "first": {20: {"gain": comparison(0.08)}},
    }
    cases = {
        "200,000 rows": {"seconds": 3.2, "bytes": 2e8},
        "texts": {"seconds": 1, "bytes": 1e7},
        "500 images": {"seconds": 0.4, "bytes": 1e7},
    }
    machine = measured["defaults"]["machine"] | {"processor": "Z80", "threads": 1}
    more = {"third": third, "defaults": {"cases": cases, "machine": machine}}
    text = " ".join(module.README.rendered(measured | more).split())
    for said in (
        "needed about 62 chosen ones, in the median of 28",
        "over random ones, +8.0 (+7.0 to +9.0) points with 20.",
        "with defaults: 200,000 rows: 3.2 s, 200 MB; 500 images: 400 ms, 10 MB, on CPU (Z80), 1",
    ):
        assert said in text
