"""The numbers in README.md are those of the results."""

from __future__ import annotations

import copy
import importlib
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tests.benchmarks.pages import ROOT, measured_pages


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
    text = module.README.read_text(encoding="utf-8")
    written = text.split(module.BEGIN)[1].split(module.END)[0]
    values = copy.deepcopy(measured)
    assert written == module.numbers(values), "run PYTHONPATH=. python docs/_ext/readme_numbers.py"

    values["query"]["query"]["ours"]["total"]["median"] = 7.0
    assert "parameters take 7 s; in" in " ".join(module.numbers(values).split())


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
    more = {"third": third, "defaults": {"cases": cases}}
    text = " ".join(module.numbers(measured | more).split())
    for said in (
        "needed about 62 chosen ones, in the median of 28",
        "over random ones, \N{BLACK UP-POINTING TRIANGLE} +8.0 (+7.0 to +9.0) points with 20.",
        "with defaults: 200,000 rows: 3.2 s, 200 MB; 500 images: 400 ms, 10 MB.",
    ):
        assert said in text
