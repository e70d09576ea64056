"""The statistics of the label-efficiency study, and its page."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

pytest.importorskip("skactiveml")

from benchmarks.study import report, results
from benchmarks.study import run as study
from benchmarks.study.results import CANDIDATES, DEFAULT, OF_PIXELS, PUBLISHED, Setting, compare
from benchmarks.study.strategies import PEERS
from tests.benchmarks.pages import draw, measured_pages, render

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
    """Write curves that differ by these gaps after the first labels."""
    rng = np.random.default_rng(0)
    rows = []
    for seed in range(n_seeds):
        base = rng.normal(0.7, 0.05)
        for name, gap in gaps.items():
            for step in range(3):
                score = base + gap * (step > 0) * 1.5 + 0.05 * step
                score += rng.normal(0, noise)
                rows.append((name, seed, 20 + 20 * step, score, score, score, 1.0, 0.5))
    table = pd.DataFrame(rows, columns=study.COLUMNS)
    options = argparse.Namespace(
        dataset=dataset,
        imbalance=imbalance,
        n_initial=20,
        initial="random",
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
    PUBLISHED: 0.02,
    DEFAULT: 0.025,
}


def test_statistics_of_a_setting(tmp_path: Path) -> None:
    write_setting(tmp_path / "one", GAPS)
    (setting,) = results.load(tmp_path)
    assert setting.name == "Letters, balanced, 20 a batch"
    table = setting.table.set_index(["strategy", "seed", "n_labeled"]).accuracy.unstack()
    expected = (table.loc["BADGE"] - table.loc[PUBLISHED]).mean(axis=1)
    assert np.allclose(setting.difference("BADGE", PUBLISHED), expected)
    assert setting.scores["BADGE"] - setting.scores[PUBLISHED] == pytest.approx(expected.mean())
    found = compare([setting], "BADGE", PUBLISHED)
    assert found.error == pytest.approx(expected.sem())
    assert found.low < found.mean < found.high
    assert found.high - found.low == pytest.approx(2 * 1.96 * expected.sem(), rel=0.25)
    regret = results.regrets([setting], GAPS)[setting.name]
    assert regret["BADGE"] == 0
    assert regret[PUBLISHED] == pytest.approx(expected.mean())


def test_strategies_are_compared_on_the_seeds_that_both_have(tmp_path: Path) -> None:
    write_setting(tmp_path / "one", GAPS)
    file = tmp_path / "one/results.csv"
    table = pd.read_csv(file)
    table[(table.strategy != "margin") | (table.seed > 2)].to_csv(file, index=False)
    (setting,) = results.load(tmp_path)
    means = setting.means
    difference = (means["margin"] - means[PUBLISHED])[3:]
    assert setting.scores["margin"] == pytest.approx(difference.mean() + means[PUBLISHED].mean())
    assert setting.scores["BADGE"] == pytest.approx(means["BADGE"].mean())
    assert compare([setting], "margin", PUBLISHED).n_seeds == 7
    assert [len(curve) for curve in setting.paired("margin", "BADGE")] == [7, 7]


def test_interval_over_settings_and_seeds() -> None:
    rng = np.random.default_rng(1)
    apart = [rng.normal(mean, 0.001, 20) for mean in (-0.03, 0.03, 0.06, -0.02)]
    mean, low, high = results.bootstrap(apart)
    centres = np.array([part.mean() for part in apart])
    assert mean == pytest.approx(centres.mean())
    # Settings that differ make it wide, however many seeds each has.
    assert high - low == pytest.approx(2 * 1.96 * centres.std() / 2, rel=0.1)
    alike = [rng.normal(0.01, 0.02, 20) for _ in range(4)]
    _, low, high = results.bootstrap(alike)
    assert high - low > 1.8 * 1.96 * 0.02 / np.sqrt(80)


def test_a_verdict_needs_an_interval_without_zero_and_enough_seeds() -> None:
    better = results.Comparison(0.1, 0.05, 0.15, 0.02, results.MIN_SEEDS)
    assert better.verdict == "better"
    assert replace(better, low=-0.01).verdict == "open"
    assert replace(better, low=-0.2, high=-0.1).verdict == "worse"
    assert replace(better, n_seeds=results.MIN_SEEDS - 1).verdict == "open"


def setting_of(curves: dict[str, list[list[float]]]) -> Setting:
    """A setting with 10, 20, 30 ... labels."""
    rows = [
        (name, seed, 10 * (step + 1), accuracy, 0.1)
        for name, by_seed in curves.items()
        for seed, curve in enumerate(by_seed)
        for step, accuracy in enumerate(curve)
    ]
    names = ["strategy", "seed", "n_labeled", "accuracy", "query_time"]
    info = {"dataset": "some", "imbalance": 1, "n_instances": 10}
    return Setting(info, pd.DataFrame(rows, columns=names))


def test_labels_needed_by_hand() -> None:
    random = [[0.4, 0.5, 0.6], [0.4, 0.5, 0.6]]
    setting = setting_of(
        {
            "random": random,
            "steep": [[0.4, 0.5, 0.7], [0.4, 0.6, 0.8]],  # .55 at 20, .75 at 30
            "falls": [[0.4, 0.65, 0.5]] * 2,
            "flat": [[0.4, 0.45, 0.5]] * 2,
        }
    )
    assert setting.labels_needed("steep") == pytest.approx((20 + 10 / 4) / 30)
    assert setting.labels_needed("falls") == pytest.approx((10 + 10 * 0.2 / 0.25) / 30)
    assert setting.labels_needed("flat") == 1


def test_wins_by_hand() -> None:
    one = setting_of({"a": [[0.1, 0.5, 0.6], [0.1, 0.5, 0.6]], "b": [[0.9, 0.4, 0.6], [0, 0.6, 0]]})
    two = setting_of({"a": [[0.1, 0.2]], "b": [[0.1, 0.3]]})
    # Of the four pairs of the first setting a wins two and ties one; first labels do not count.
    found = results.wins([one, two], ["a", "b"])
    assert found.loc["a", "b"] == pytest.approx((2.5 / 4 + 0) / 2)
    assert found.loc["b", "a"] == pytest.approx((1.5 / 4 + 1) / 2)
    assert np.isnan(found.loc["a", "a"])


def write_study(folder: Path) -> None:
    """Write the results of two settings of the study, and of all that the page has beside them."""
    study_folder = folder / "label_efficiency"
    turned = GAPS | {"BADGE": 0.0, "margin": 0.04}
    candidates = dict.fromkeys(CANDIDATES[0], 0.001)
    write_setting(study_folder / "one", GAPS | candidates)
    write_setting(study_folder / "two", turned | candidates, imbalance=100)
    write_setting(study_folder / "old", {"random": 0.0, PUBLISHED: 0.1}, dataset="digits")
    write_setting(study_folder / "unfinished", {"random": 0.0})
    few = {"random": 0.0, "BADGE": 0.02, PUBLISHED: 0.01}
    write_setting(study_folder / "paper", few, 3, dataset="cifar10-images")
    curves_with_signals(falling=True).to_csv(study_folder / report.STOPPING, index=False)
    pixels = {"random": 0.0, PUBLISHED: 0.02, OF_PIXELS: 0.03}
    write_setting(folder / "label_efficiency_pixels/one", pixels, network="cnn")


def test_page_is_rendered_from_the_results(tmp_path: Path) -> None:
    write_study(tmp_path)
    values = report.values(tmp_path)
    page = render("label_efficiency", values)
    text = " ".join(page.split())
    assert [s.name for s in values["settings"]] == [
        "Letters, balanced, 20 a batch",
        "Letters, 100:1, 20 a batch",
    ]
    beats = "beats 12 of 13 other strategies, loses to"
    assert f"On balanced pools *{DEFAULT}* {beats} BADGE" in text
    assert f"On long-tailed pools *{DEFAULT}* {beats} margin" in text
    assert "Digits" in text
    assert "(one seed)" not in text
    share = compare(results.load(tmp_path / "label_efficiency_pixels"), OF_PIXELS, PUBLISHED)
    assert f"minus none: {measured_pages().with_interval(share)} points" in text
    assert "That lies above 0" in text
    assert "The best in that column: relative fall of the objective by the batch." in text
    assert "nan" not in page


def test_page_without_the_optional_results(tmp_path: Path) -> None:
    write_setting(tmp_path / "label_efficiency/one", GAPS, results.MIN_SEEDS - 1)
    page = render("label_efficiency", report.values(tmp_path))
    assert "beats 0 of 13 other strategies, loses to none" in " ".join(page.split())
    assert "▲ +" not in page
    for title in ("Photographs as inputs\n\n   Cov", "When to stop", "Round 1", "paper's setting"):
        assert title not in page
    assert "nan" not in page


@pytest.mark.parametrize("name", ["", "_wins"])
def test_figures_are_drawn_from_the_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder = tmp_path / "benchmarks/results"
    write_study(folder)
    drawn = draw(f"label_efficiency{name}", folder, monkeypatch)
    assert drawn.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("gaps", "n_seeds", "passes", "n_lost"),
    [
        ([0.015, 0.015], 13, True, 0),
        ([0.015, -0.001], 13, False, 0),
        ([0.04, 0.03, 0.03, 0.03, -0.005], 13, False, 1),
        # The first seed decides nothing.
        ([0.015, 0.015], results.MIN_SEEDS, False, 0),
    ],
)
def test_a_candidate_passes_only_if_it_wins_and_loses_nowhere(
    tmp_path: Path, gaps: list[float], n_seeds: int, passes: bool, n_lost: int
) -> None:
    first, *others = CANDIDATES[0]
    for i, gap in enumerate(gaps):
        some = GAPS | dict.fromkeys(others, 0.0) | {first: GAPS[PUBLISHED] + gap}
        write_setting(tmp_path / str(i), some, n_seeds, imbalance=1 + 9 * i)
    (one,) = report.rounds(results.load(tmp_path))
    assert one["n_settings"] == len(gaps)
    found, *rest = one["candidates"]
    assert found["passes"] == passes
    assert not any(other["passes"] for other in rest)
    assert len(found["lost"]) == n_lost


def test_a_round_is_decided_by_its_own_seeds(tmp_path: Path) -> None:
    write_setting(tmp_path / "one", GAPS)
    write_setting(tmp_path / "old", {"random": 0.0, PUBLISHED: 0.1}, dataset="digits")
    settings = results.load(tmp_path)
    one = report.Round([], range(2, 5), range(6, 8))
    assert [[*one.scores(s).index] for s in settings] == [[2, 3, 4], [6, 7]]
    assert set(one.scores(settings[0])) == set(GAPS) - {DEFAULT}
    table = settings[0].table
    table.loc[(table.strategy == "BADGE") & (table.seed < 5), "accuracy"] = np.nan
    again = Setting(settings[0].info, table)
    assert set(one.scores(again)) == set(GAPS) - {DEFAULT, "BADGE"}


def curves_with_signals(falling: bool) -> pd.DataFrame:
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
    found = report.judge_signals(curves_with_signals(falling=True))
    fall, before, uncertainty, count = found.index
    assert found.loc[fall].tolist() == [1.0, 1.0, 1.0]
    assert found.loc[count, ["mean", "lowest"]].tolist() == [1.0, 1.0]
    assert 0.5 < found.loc[count, "one_threshold"] < 1
    for name in (before, uncertainty):
        assert 0.3 < found.loc[name, "one_threshold"] < 0.7
    apart = report.judge_signals(curves_with_signals(falling=False))
    assert apart.loc[fall, "one_threshold"] < 0.7
