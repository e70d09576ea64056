"""The third round's part of the page on label efficiency."""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
import pytest

pytest.importorskip("skactiveml")

from benchmarks.study import run as study
from benchmarks.study.heads import all_settings
from benchmarks.study.results import DEFAULT
from benchmarks.study.third_round import ALONE, HEADS, NAMES, TIMED, UHERDING, values
from tests.benchmarks.pages import measured_pages, render

pytestmark = pytest.mark.slow

GAINS = {"random": 0.0, "margin": 0.01, UHERDING: 0.02, ALONE: 0.03}


def write(folder: Path, name: str, gains: dict[str, float], first: float = 0.0) -> None:
    """Write three seeds of a registered setting, with these gains after the first labels."""
    [setting] = [s for s in all_settings() if s["name"] == name]
    start, step = setting["n_initial"], setting["n_instances"]
    rows = []
    for seed in range(TIMED, TIMED + 3):
        for strategy, gain in gains.items():
            for query in range(setting["n_queries"] + 1):
                score = 0.5 + first + 0.01 * (seed - TIMED) + (query > 0) * (gain + 0.01 * query)
                seconds = 2.0 if (strategy, seed) == (ALONE, TIMED) else 1.0
                rows.append((strategy, seed, start + step * query, score, score, score, 1, seconds))
    study.write_setting(folder / name, argparse.Namespace(**setting, device="cpu"))
    table = pd.DataFrame(rows, columns=study.COLUMNS)
    table.to_csv(folder / name / "results.csv", index=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "label_efficiency_heads"
    write(path, "mlp16_letter_balanced_coverage_20_10x10", GAINS | {DEFAULT: 0.025})
    write(path, "ridge_wordnet_50to1_random_20_3x100", GAINS | {ALONE: 0.01, UHERDING: 0.05})
    for start, gain in (("coverage", 0.08), ("random", 0.0)):
        write(path, f"first_mlp16_letter_balanced_{start}_20_1x1", {"random": 0.0}, gain)
        write(path, f"first_ridge_wordnet_50to1_{start}_20_1x1", {"random": 0.0}, -gain / 8)
    return path


def test_every_registered_setting_has_a_name() -> None:
    assert {s["dataset"] for s in all_settings()} <= set(NAMES)
    assert {s["network"] for s in all_settings()} <= set(HEADS)


def test_values(folder: Path) -> None:
    found = values(folder)
    assert (found["n_settings"], found["n_seeds"]) == (2, (3, 3))
    minus = found["minus"]
    assert minus["balanced"][UHERDING].mean == pytest.approx(0.01)
    assert minus["long-tailed"][UHERDING].mean == pytest.approx(-0.04)
    assert minus["all"]["random"].mean == pytest.approx(0.02)
    assert found["over_random"]["all"]["margin"].mean == pytest.approx(0.01)
    mean, worst, where = found["regret"][ALONE]
    assert (mean, worst) == pytest.approx((0.02, 0.04))
    assert where == ("definitions of nouns, linear head, 50:1, 20 + 3 x 100 labels, random first")
    n_before, before = found["in_some"][DEFAULT]
    assert (n_before, before.mean) == (1, pytest.approx(0.005))
    names = [*found["wins"]]
    assert found["wins"]["the default"][names.index("UHerding")] == 0.5  # one setting each
    assert found["wins"]["margin"][names.index("random")] == 1
    assert found["wins"]["the default before"][names.index("UHerding")] == 1  # where both ran
    assert found["below"] == []
    assert found["errors"] == pytest.approx((0, 0))  # each seed gains the same
    assert found["inexact"] == []
    assert found["least"][1] == pytest.approx(0.01)
    assert found["seconds"] == 2
    first = found["first"][20]
    assert first["gain"].mean == pytest.approx((0.08 - 0.01) / 2)
    assert first["lost"] == ["definitions of nouns, linear head, 50:1"]
    assert values(folder / "nowhere") is None


def test_strategies_are_compared_on_the_seeds_that_both_have(folder: Path) -> None:
    for file in folder.glob("[mr]*/results.csv"):
        table = pd.read_csv(file)
        table[(table.strategy != "margin") | (table.seed == TIMED)].to_csv(file, index=False)
    found = values(folder)
    assert found["n_seeds"] == (3, 3)
    assert found["minus"]["all"]["margin"].n_seeds == 1
    assert found["minus"]["all"][UHERDING].n_seeds == 3
    assert found["regret"]["margin"][0] == pytest.approx((0.02 + 0.04) / 2)


def test_the_order_of_refine(folder: Path) -> None:
    """One setting with a linear head; margin, then UHerding."""
    order = values(folder)["order"]
    assert order["names"] == ["random", "margin", UHERDING]
    assert (order["n_settings"], order["shares"], order["broken"]) == (1, [1, 1], [])
    name = "ridge_wordnet_50to1_random_20_3x100"
    write(folder, name, GAINS | {UHERDING: 0.005})
    assert values(folder)["order"]["broken"] == [UHERDING]


def test_a_setting_below_random_is_named(folder: Path) -> None:
    write(folder, "ridge_wordnet_balanced_coverage_100_5x20", GAINS | {ALONE: -0.02})
    [name] = values(folder)["below"]
    assert name.startswith("definitions of nouns, linear head, balanced, 100 + 5 x 20")


def test_the_page_shows_it(folder: Path) -> None:
    page = render("label_efficiency", measured_pages().study() | {"third": values(folder)})
    text = " ".join(page.split())
    assert "a network needed about" in text
    assert "On balanced pools the default minus random sampling is +3.0 (+3.0 to +3.0)" in text
    assert "It is *not* shown to be better than UHerding" in text
    assert "3 to 3 seeds have run, so the tests are not decided" in text
    assert "with 20 labels that gains +3.5" in text
    assert "Here each beats the one before in 100, 100 percent" in text
    assert "so the order holds." in text
    assert "nan" not in page.replace("named", "")
