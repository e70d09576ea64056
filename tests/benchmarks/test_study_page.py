"""The statistics and the page of the label-efficiency study."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

pytest.importorskip("skactiveml")

from benchmarks.study import pixels, report, stopping
from benchmarks.study import run as study
from benchmarks.study.run import CANDIDATES
from benchmarks.study.strategies import (
    PEERS,
)

pytestmark = pytest.mark.slow


def write_setting(
    folder: Path,
    gaps: dict[str, float],
    n_seeds: int = 10,
    imbalance: float = 1,
    dataset: str = "letter",
    noise: float = 0.002,
    network: str = "mlp16",
) -> None:
    rng = np.random.default_rng(0)
    rows = []
    for seed in range(n_seeds):
        base = rng.normal(0.7, 0.05)
        for name, gap in gaps.items():
            for step in range(3):
                score = base + gap + 0.05 * step + rng.normal(0, noise)
                rows.append((name, seed, 20 + 20 * step, score, score, score, 1.0, 0.5))
    table = pd.DataFrame(rows, columns=study.COLUMNS)
    options = argparse.Namespace(
        dataset=dataset,
        imbalance=imbalance,
        n_initial=20,
        n_instances=20,
        n_queries=2,
        network=network,
        pool_size=1000,
        test_size=500,
        trainings=1,
        device="cpu",
    )
    study.write_setting(folder, options)
    table.to_csv(folder / "results.csv", index=False)


GAPS = {name: 0.001 * i for i, name in enumerate(PEERS)} | {
    "random": 0.0,
    "BADGE": 0.03,
    "FisherMask": 0.02,
}


def test_statistics_of_a_setting(tmp_path: Path) -> None:
    write_setting(tmp_path / "one", GAPS)
    (setting,) = report.load(tmp_path)
    assert setting.name == "Letters, balanced, 20 a batch"
    assert setting.best_peer == "BADGE"
    difference = setting.difference("BADGE")
    table = setting.table.set_index(["strategy", "seed", "n_labeled"]).accuracy.unstack()
    expected = (table.loc["BADGE"] - table.loc["FisherMask"]).mean(axis=1)
    assert np.allclose(difference, expected)
    assert report.error(difference) == pytest.approx(expected.sem())
    low, high = report.interval(difference)
    assert low < difference.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * expected.sem(), rel=0.25)
    assert setting.regret["BADGE"] == 0
    assert setting.regret["FisherMask"] == pytest.approx(expected.mean())


def test_strategies_are_compared_on_the_seeds_that_both_have(tmp_path: Path) -> None:
    write_setting(tmp_path / "one", GAPS)
    file = tmp_path / "one/results.csv"
    table = pd.read_csv(file)
    table[(table.strategy != "margin") | (table.seed > 2)].to_csv(file, index=False)
    (setting,) = report.load(tmp_path)
    assert setting.n_seeds == 7
    by_seed = setting.means
    expected = (by_seed["margin"] - by_seed["FisherMask"])[3:].mean() + by_seed["FisherMask"].mean()
    assert setting.scores["margin"] == pytest.approx(expected)
    assert setting.scores["BADGE"] == pytest.approx(by_seed["BADGE"].mean())
    assert len(setting.difference("margin")) == 7
    assert len(setting.difference("BADGE")) == 10


def test_interval_over_settings_and_seeds() -> None:
    rng = np.random.default_rng(1)
    apart = [rng.normal(mean, 0.001, 20) for mean in (-0.03, 0.03, 0.06, -0.02)]
    mean, low, high = report.bootstrap(apart)
    centres = np.array([part.mean() for part in apart])
    assert mean == pytest.approx(centres.mean())
    # Settings that differ make it wide, however many seeds each has.
    assert high - low == pytest.approx(2 * 1.96 * centres.std() / 2, rel=0.1)
    alike = [rng.normal(0.01, 0.02, 20) for _ in range(4)]
    _, low, high = report.bootstrap(alike)
    assert high - low > 1.8 * 1.96 * 0.02 / np.sqrt(80)
    assert [report.verdict(*x) for x in ((0.1, 0.2), (-0.1, 0.2), (-0.2, -0.1))] == [
        "better",
        "level",
        "worse",
    ]


def test_a_first_look_claims_nothing(tmp_path: Path) -> None:
    write_setting(tmp_path / "results/one", GAPS, report.MIN_SEEDS - 1)
    write_setting(tmp_path / "results/two", GAPS, imbalance=100)
    page = report.page_of(report.load(tmp_path / "results"), tmp_path)
    assert "with 7 seeds in each: a first look that decides nothing." in page
    assert "Seeds in each setting: 7 to 10. With fewer than 8" in page
    assert "it beats" not in page
    assert "▲ +" not in page.split("Details\n")[0]


def test_page_is_written_from_the_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turned = GAPS | {"BADGE": 0.0, "margin": 0.025}
    write_setting(tmp_path / "results/one", GAPS)
    write_setting(tmp_path / "results/two", turned, imbalance=100)
    write_setting(tmp_path / "results/old", {"random": 0.0, "FisherMask": 0.1}, dataset="digits")
    write_setting(tmp_path / "results/unfinished", {"random": 0.0})
    few = {"random": 0.0, "BADGE": 0.02, "FisherMask": 0.01}
    write_setting(tmp_path / "results/paper", few, 3, dataset="cifar10-images")
    told(falling=True).to_csv(tmp_path / "results/stopping.csv", index=False)
    helps = dict(zip(pixels.COMPARED, (0.0, -0.01, 0.02, 0.03), strict=True))
    write_setting(tmp_path / pixels.RESULTS.name / "one", helps, network="cnn")
    argv = ["report", "--results", str(tmp_path / "results"), "--docs", str(tmp_path / "docs")]
    monkeypatch.setattr("sys.argv", argv)
    report.main()
    page = (tmp_path / "docs/label_efficiency.rst").read_text()
    assert "Of 13 other strategies in 2 settings (Letters) on balanced pools it beats 12" in page
    balanced, tailed = page.split("; on long-tailed pools it ")
    assert balanced.endswith("cannot be told from none and loses to 1 (BADGE)")
    assert tailed.startswith("beats 12, cannot be told from none and loses to 1 (margin).\n")
    assert "▲ +" in page.split("Details\n")[0]
    assert "- **Balanced pool**: BADGE, with a mean regret of 0.000" in page
    assert "- **Long-tailed pool**: margin, with a mean regret of 0.000" in page
    worst = "- **You cannot tell**: FisherMask is never further than 0.010 from the best"
    assert worst in page
    assert "- balanced, 20 a batch, 3 seeds: BADGE 0.7" in page
    assert "Of 13 other strategies in 3" not in page
    assert "The best single threshold is on: relative fall of the objective by the batch." in page
    assert "minus none: +0.010" in " ".join(page.split())
    assert "That\nlies above 0" in page
    for image in ("label_efficiency", "label_efficiency_curves", "label_efficiency_paper"):
        assert (tmp_path / f"docs/images/{image}.png").stat().st_size > 10_000
    assert "nan" not in page


@pytest.mark.parametrize(
    ("gaps", "n_seeds", "outcome"),
    [
        ([0.015, 0.015], 10, "passes the test"),
        ([0.015, 0.0], 10, "None passes the test: the default stays."),
        ([0.04, 0.03, 0.03, 0.03, -0.005], 10, "None passes the test: the default stays."),
        ([0.015, 0.015], 8, "the default stays."),
    ],
)
def test_a_candidate_passes_only_if_it_wins_and_loses_nowhere(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    gaps: list[float],
    n_seeds: int,
    outcome: str,
) -> None:
    monkeypatch.setattr(report, "STUDY", [{}] * len(gaps))
    first, *others = CANDIDATES[0]
    for i, gap in enumerate(gaps):
        some = GAPS | dict.fromkeys(others, 0.0) | {first: GAPS["FisherMask"] + gap}
        write_setting(tmp_path / str(i), some, n_seeds, imbalance=1 + 9 * i)
    settings, of = report.load(tmp_path), report.ROUNDS[0]
    text = report.defaults(settings, of)
    assert outcome in text
    assert "not been done in all settings" in report.defaults(settings[1:], of)
    assert "not been done in all settings" in report.defaults(settings, report.ROUNDS[1])
    found = report.passes({s.name: report.confirming(s, of) for s in settings}, first)
    assert (found["lost"] == []) == (min(gaps) >= 0)
    if n_seeds == 8:  # the first one decides nothing
        assert "Some setting has 7 of the 8 seeds" in text


def test_a_round_is_decided_by_its_own_seeds(tmp_path: Path) -> None:
    write_setting(tmp_path / "one", GAPS)
    write_setting(tmp_path / "old", {"random": 0.0, "FisherMask": 0.1}, dataset="digits")
    settings = report.load(tmp_path)
    of = report.Round([], range(2, 5), range(6, 8))
    assert [[*report.confirming(s, of).index] for s in settings] == [[2, 3, 4], [6, 7]]
    assert set(report.confirming(settings[0], of)) == set(GAPS)
    table = settings[0].table
    table.loc[(table.strategy == "BADGE") & (table.seed < 5), "accuracy"] = np.nan
    again = report.Setting(settings[0].info, table)
    assert set(report.confirming(again, of)) == set(GAPS) - {"BADGE"}


def told(falling: bool) -> pd.DataFrame:
    """Curves that saturate at different numbers of labels, and signals before each batch."""
    rows = []
    for imbalance, scale in ((1, 40.0), (50, 400.0)):
        for n in range(20, 540, 20):
            slope = np.exp(-n / scale)
            before = 1.0 + n % 3
            after = before * (1 - 0.5 * slope if falling else 0.5 + 0.1 * (n % 7))
            rows.append(("letter", imbalance, 1, n, 0.9 - 0.5 * slope, before, after, n % 7))
    names = ["dataset", "imbalance", "seed", "n_labeled", "accuracy", "before", "after"]
    return pd.DataFrame(rows, columns=[*names, "uncertainty"])


def test_what_tells_when_to_stop_is_judged_by_the_gain_to_come() -> None:
    found = stopping.judged(told(falling=True))
    fall, before, uncertainty, count = found.index
    assert found.loc[fall].tolist() == [1.0, 1.0, 1.0]
    assert found.loc[count, ["mean", "lowest"]].tolist() == [1.0, 1.0]
    assert 0.5 < found.loc[count, "one threshold"] < 1
    for name in (before, uncertainty):
        assert 0.3 < found.loc[name, "one threshold"] < 0.7
    assert stopping.judged(told(falling=False)).loc[fall, "one threshold"] < 0.7
