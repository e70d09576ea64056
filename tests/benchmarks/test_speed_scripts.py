"""The scripts of the benchmarks run, and their results become a page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests import forked
from tests.benchmarks.pages import draw, measured_pages, render

pytest.importorskip("skactiveml")

from benchmarks.speed import (
    cluster,
    defaults,
    embedding,
    faults,
    knobs,
    large,
    mask_size,
    paper,
    query,
    selection,
)

# They share one run of each script.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("scripts")]

SCRIPTS = {"embedding": embedding, "selection": selection, "query": query}


# The scripts


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clone") / "benchmarks/results"
    for name, script in SCRIPTS.items():
        script.main(["--quick", "--repeats", "2", "--out", str(folder / f"{name}.json")])
    networks = ["--networks", "--quick", "--repeats", "2", "--out", str(folder / "networks.json")]
    embedding.main(networks)
    mask_size.main(["--quick", "--out", str(folder / "mask_size.json")])
    knobs.main(["--quick", "--out", str(folder / "knobs.json")])
    return folder


def load(results: Path, name: str) -> dict[str, Any]:
    return json.loads((results / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_results_say_where_and_how_much(results: Path, name: str) -> None:
    result = load(results, name)
    assert result["quick"]
    assert result["repeats"] == 2
    assert result["machine"]["device"] == "CPU"
    assert result["machine"]["threads"] == torch.get_num_threads()
    assert result["versions"]["torch"] == torch.__version__.split("+")[0]
    assert result["took"] > 0
    for sweep in result["sweeps"]:
        for line in sweep["lines"].values():
            assert len(line["seconds"]) == len(sweep["sizes"])
            assert np.isfinite(line["exponent"])
            assert all(0 < s["min"] <= s["median"] <= s["max"] for s in line["seconds"])
    for target in result["targets"]:
        assert set(target) == {"what", "found", "wanted", "met"}


def test_networks_of_the_field_beside_ordinary_passes(results: Path) -> None:
    result = load(results, "networks")
    judged = " ".join(target["what"] for target in result["targets"])
    for name, found in result["networks"].items():
        assert found["sizes"]["k"] == 200
        ratios = found["ratio to C ordinary passes"]
        assert {"embedding", "diagonal", "ordinary passes"} <= ratios.keys()
        assert ratios.keys() == found["seconds a batch"].keys()
        assert ratios["ordinary passes"] == {"median": 1, "min": 1, "max": 1}
        assert f"{name}: embedding" in judged
        assert f"{name}: diagonal" in judged


def test_masks_are_judged_by_the_largest(results: Path) -> None:
    for found in load(results, "mask_size")["networks"].values():
        *smaller, largest = found["sizes"].values()
        assert (largest["common"], largest["gain"]) == (1, 1)
        for case in smaller:
            assert found["random batch"]["gain"] < case["gain"] < 1.01


def test_the_query_is_the_authors_query(results: Path) -> None:
    result = load(results, "query")["query"]
    assert result["same_batch"]
    assert result["n_common"] == result["sizes"]["K"]
    assert result["relative_difference_of_information"] < 1e-4
    for side in ("authors'", "kinder"):
        assert result["theirs"][side].keys() == result["ratios"][side].keys()
    # Scaled to the whole query.
    n = result["sizes"]["n_candidates"]
    assert result["factors"]["authors' embedding"] == n / 2


def test_every_knob_is_judged(results: Path) -> None:
    for pool in load(results, "knobs")["pools"].values():
        settings = pool["settings"]
        assert settings["as it is"]["common"]["median"] == 1
        assert settings["n_directions=1"]["n_directions"] == 1
        assert 1 <= settings["n_directions=0.9"]["n_directions"] <= 9
        assert all(0 < knob["gain"]["max"] < 1.0001 for knob in settings.values())


def test_defaults(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(defaults, "CASES", dict([*defaults.CASES.items()][2:4]))
    arguments = ["--quick", "--repeats", "2", "--out", str(results / "defaults.json")]
    defaults.main(arguments)
    for found in load(results, "defaults")["cases"].values():
        less, more = found["seconds of all rounds"]
        assert less <= more == found["seconds"]
        assert found["coverage_share"] == 1
        assert found["n_candidates"] == 300
        assert found["seconds"] > 0


def test_large_pools(results: Path) -> None:
    large.main(["--quick", "--out", str(results / "large.json")])
    cases = load(results, "large")["cases"]
    assert [*cases] == [*large.LARGE][:2]
    storage = [case["query"]["embedding_storage"] for case in cases.values()]
    assert storage == ["memory", "scratch file"]
    for case in cases.values():
        assert case["query"]["n_candidates"] == case["N"]
        assert case["query"]["embedding_bytes"] == 4 * case["N"] * case["r"] * case["k"]
        assert 0 < case["baseline_bytes"] <= case["peak_bytes"]
        assert case["baseline_private_bytes"] <= case["peak_private_bytes"]
    page = performance(results)
    assert "Large pools" in page
    assert "nan" not in page
    arguments = ["--quick", "--cases", "in memory", "--out", str(results / "large.json")]
    large.main(arguments)
    again = load(results, "large")["cases"]
    assert again["scratch file"] == cases["scratch file"]
    assert again["in memory"]["seconds"] != cases["in memory"]["seconds"]


def test_paper(results: Path, device: str) -> None:
    arguments = ["--quick", "--repeats", "2", "--device", device]
    paper.main([*arguments, "--out", str(results / "paper.json")])
    for n_classes, case in load(results, "paper")["cases"].items():
        n, r, k = case["sizes"]["N"], case["query"]["n_directions"], case["query"]["mask_size"]
        assert case["query"]["embedding_bytes"] == 4 * n * r * k
        assert case["sizes"]["n_classes"] == int(n_classes)
        assert case["share of that in the selection"]["median"] > 0
    page = performance(results)
    assert "A query of the paper's size" in page
    assert "nan" not in page


def test_cluster_and_faults(results: Path) -> None:
    pytest.importorskip("distributed")
    cluster.main(["--quick", "--out", str(results / "cluster.json")])
    result = load(results, "cluster")
    assert result["same_picks"]
    assert result["cases"]["cluster"]["query"]["embedding_storage"] == "cluster"
    assert result["cases"]["local"]["query"]["embedding_storage"] == "scratch file"
    assert len(result["cases"]["cluster"]["workers"]) == 2
    for worker in result["cases"]["cluster"]["workers"]:
        assert 0 < worker["before_private_bytes"] < worker["peak_private_bytes"]
    forked.server()
    faults.main(["--quick", "--runs", "1", "--out", str(results / "faults.json")])
    (run,) = load(results, "faults")["runs"]
    assert run["same_picks"]
    assert run["tasks_left"] == 0
    page = performance(results)
    assert "A Dask cluster beside a scratch file" in page
    assert "Workers that die" in page
    assert "nan" not in page


# The page


def performance(results: Path) -> str:
    return render("performance", measured_pages().measured(results))


def test_page_is_written_from_the_results(results: Path) -> None:
    page = performance(results)
    result = load(results, "query")["query"]
    assert (
        f"took {result['n_common']} of our {result['sizes']['K']} images, in the same order."
        in page
    )
    assert page.count("* - ``n_directions=") == 5
    assert page.count("* - a random batch") == 3
    for name in load(results, "networks")["networks"]:
        assert f"* - {name}\n" in page
    assert "nan" not in page


@pytest.mark.parametrize("name", ["performance", "performance_sweeps"])
def test_figures_are_drawn_from_the_results(
    results: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert draw(name, results, monkeypatch).stat().st_size > 10_000
