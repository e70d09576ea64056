"""The picture of learning curves."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from sklearn.naive_bayes import GaussianNB

from skfishermask import ActiveLearningCurveDisplay
from tests.evaluation.test_curve import CV, Noisy, X, Y, curve, first_rows, least_sure

mpl.use("Agg")


@pytest.fixture(scope="module")
def results() -> dict[str, dict[str, np.ndarray]]:
    return {"random": curve("random"), "least sure": curve()}


@pytest.mark.parametrize("band", ["std", "sem"])
def test_display_draws_mean_and_band(results: dict[str, Any], band: str) -> None:
    display = ActiveLearningCurveDisplay.from_results(results, band=band)
    assert list(display.lines_) == list(display.bands_) == list(results)
    for name, result in results.items():
        mean = result["test_score"].mean(axis=0)
        half = result["test_score"].std(axis=0, ddof=1) / (np.sqrt(3) if band == "sem" else 1)
        assert np.array_equal(display.lines_[name].get_xdata(), result["n_labeled"])
        assert np.allclose(display.lines_[name].get_ydata(), mean)
        outline = display.bands_[name].get_paths()[0].vertices
        for n, low, high in zip(result["n_labeled"], mean - half, mean + half, strict=True):
            at = outline[outline[:, 0] == n, 1]
            assert np.isclose(at.min(), low)
            assert np.isclose(at.max(), high)
    assert display.ax_.get_xlabel() == "Labelled samples"
    assert display.ax_.get_ylabel() == "Score"
    assert [t.get_text() for t in display.ax_.get_legend().get_texts()] == list(results)
    assert display.figure_ is display.ax_.figure


def test_display_options(results: dict[str, Any]) -> None:
    from matplotlib import pyplot as plt

    _, ax = plt.subplots()
    display = ActiveLearningCurveDisplay.from_results(
        results, ax=ax, band=None, score_label="accuracy", line_kw={"linestyle": "--"}
    )
    assert display.ax_ is ax
    assert display.bands_ == {}
    assert ax.get_ylabel() == "accuracy"
    assert display.lines_["random"].get_linestyle() == "--"
    again = display.plot(band_style="errorbar", band_kw={"capsize": 5})
    assert again is display
    assert again.ax_ is not ax
    assert len(again.bands_) == 2
    plt.close("all")


def test_display_of_one_split_has_no_band() -> None:
    result = curve(cv=[(np.arange(100), np.arange(100, 150))])
    assert ActiveLearningCurveDisplay.from_results({"a": result}).bands_ == {}


def test_display_names_the_score() -> None:
    result = curve(scoring=["accuracy", "f1_macro"])
    display = ActiveLearningCurveDisplay.from_results({"a": result}, score_name="test_f1_macro")
    assert display.ax_.get_ylabel() == "F1 macro"
    with pytest.raises(ValueError, match=r"'a' have no 'test_score'.*test_accuracy.*test_f1_macro"):
        ActiveLearningCurveDisplay.from_results({"a": result})


def test_display_errors(results: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="at least one strategy, found none"):
        ActiveLearningCurveDisplay.from_results({})
    with pytest.raises(ValueError, match=r"'std', 'sem', None.*found 'both'"):
        ActiveLearningCurveDisplay.from_results(results, band="both")
    with pytest.raises(ValueError, match=r"'fill_between', 'errorbar'.*found 'bar'"):
        ActiveLearningCurveDisplay.from_results(results, band_style="bar")


def test_display_from_estimator(tmp_path: Path, results: dict[str, Any]) -> None:
    options = {
        "n_initial": 9,
        "n_instances": 5,
        "n_queries": 3,
        "cv": CV,
        "random_state": 0,
        "checkpoint": tmp_path,
    }
    model = GaussianNB()
    display = ActiveLearningCurveDisplay.from_estimator(
        model, X, Y, query_strategy={"random": "random", "least sure": least_sure}, **options
    )
    for name, result in results.items():
        assert np.array_equal(display.results[name]["test_score"], result["test_score"])
        assert (tmp_path / name / "run.json").exists()
    options["checkpoint"] = None
    for strategy, name in [
        (least_sure, "least_sure"),
        ("random", "random"),
        (Noisy(), "Noisy"),
        (partial(first_rows), "partial"),
    ]:
        one = ActiveLearningCurveDisplay.from_estimator(
            model, X, Y, query_strategy=strategy, **options, band=None
        )
        assert list(one.results) == [name]


def test_display_from_estimator_pairs_without_random_state() -> None:
    display = ActiveLearningCurveDisplay.from_estimator(
        GaussianNB(),
        X,
        Y,
        query_strategy={"a": "random", "b": "random"},
        n_initial=9,
        n_instances=5,
        n_queries=2,
        cv=CV,
    )
    a, b = (display.results[name]["test_score"] for name in "ab")
    assert np.array_equal(a, b)


def test_without_matplotlib_it_is_said_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match="needs matplotlib: pip install matplotlib"):
        ActiveLearningCurveDisplay.from_estimator(
            None, X, Y, query_strategy="random", n_initial=1, n_instances=1, n_queries=1
        )
