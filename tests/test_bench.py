"""The benchmarks: that what they compare is the same, and that results become a page."""

from __future__ import annotations

import importlib.util
import json
import runpy
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("skactiveml")

from benchmarks import (
    bench_cluster,
    bench_embedding,
    bench_faults,
    bench_paper,
    bench_query,
    bench_selection,
    harness,
)
from benchmarks.networks import CifarResNet18, MaskedText
from skfishermask import ParameterMask, fisher_diagonal, fisher_embedding
from skfishermask.fisher import fisher_matrix
from skfishermask.selection import select_batch
from tests.networks import images, masked_tokens

ROOT = Path(__file__).parents[1]
SCRIPTS = {"embedding": bench_embedding, "selection": bench_selection, "query": bench_query}


# The shared parts


@pytest.mark.parametrize("power", [0, 1, 2.5])
def test_exponent_of_a_power(power: float) -> None:
    sizes = [10, 30, 200]
    assert harness.exponent(sizes, [3 * size**power for size in sizes]) == pytest.approx(power)


def test_exponent_is_least_squares() -> None:
    # Symmetric deviations in the middle leave the slope as it is.
    assert harness.exponent([1, 10, 100, 1000], [1, 20, 50, 1000]) == pytest.approx(
        np.polyfit([0, 1, 2, 3], np.log10([1, 20, 50, 1000]), 1)[0]
    )


def test_sweep_fits_the_medians() -> None:
    found = harness.sweep("a", "N", [1, 10], {"a": [[9, 1, 2], [20, 30, 19]]}, {})
    line = found["lines"]["a"]
    assert line["seconds"][0] == {"median": 2, "min": 1, "max": 9}
    assert line["exponent"] == pytest.approx(1)
    assert harness.about_linear("", found)["met"]


def test_alternate_takes_turns() -> None:
    order: list[str] = []
    works = {name: (lambda name=name: order.append(name)) for name in "ab"}
    times = harness.alternate(works, 2, "cpu", "")
    assert "".join(order) == "ababab"
    assert {name: len(values) for name, values in times.items()} == {"a": 2, "b": 2}


def test_targets_are_judged_by_the_median() -> None:
    one = harness.ratio([1, 4, 9], [2, 2, 3])
    assert one == {"median": 2, "min": 0.5, "max": 3}
    assert harness.at_most("", one, 2)["met"]
    assert not harness.at_least("", one, 2.1)["met"]


# What is compared is the same


@pytest.fixture(scope="module")
def network() -> tuple[nn.Module, Tensor, ParameterMask]:
    torch.manual_seed(0)
    module = CifarResNet18(width=2, n_classes=4).double().eval()
    x = images(6).double()
    return module, x, bench_embedding.make_mask(fisher_diagonal(module, [x]), 150)


def information(V: Tensor | np.ndarray) -> Tensor:
    V = torch.as_tensor(V).double()
    return V.mT @ V


def test_naive_embeddings_are_ours(network: Any) -> None:
    module, x, mask = network
    V = fisher_embedding(module, [x], mask, dtype=torch.float64)
    kept = bench_embedding.kept_entries(module, mask)
    looped = bench_embedding.looped_embedding(module, x, kept, 4)
    assert looped.shape == (4, 4, 150)
    assert torch.allclose(information(looped), information(V[:4]))
    assert np.allclose(bench_embedding.one_by_one(module, x[:4], kept), looped)
    assert torch.allclose(bench_embedding.jacobian_embedding(module, x, mask), V)
    assert torch.allclose(bench_embedding.hooked_embedding(module, x, mask), V)
    assert bench_embedding.hooks_read(module, x, mask)
    rows = bench_selection.authors_rows(module, x.split(4), mask)
    # The embedding is kept in float32.
    assert torch.allclose(information(rows), information(V), rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_whole_jacobians_of_keyword_inputs_are_ours() -> None:
    module, x = MaskedText(9, 5, 4, 2, 1, 3).double().eval(), masked_tokens(4)
    mask = ParameterMask.from_diagonal(
        fisher_diagonal(module, [x]), "global", 50, output_layer=["output.weight", "output.bias"]
    )
    V = fisher_embedding(module, [x], mask, dtype=torch.float64)
    assert torch.allclose(bench_embedding.jacobian_embedding(module, x, mask), V)
    # Its positions have no dimension for samples, which hooks on layers take for granted.
    assert not bench_embedding.hooks_read(module, x, mask)


def test_naive_diagonal_is_ours(network: Any) -> None:
    module, x, _ = network
    ours = fisher_diagonal(module, [x])
    for expected, found in zip(
        ours.values(), bench_embedding.looped_diagonal(module, x, len(x)), strict=True
    ):
        assert np.allclose(expected, found)


@pytest.mark.parametrize(
    "gains", [bench_selection.gains_as_published, bench_selection.gains_with_two_products]
)
def test_naive_selection_is_ours(gains: bench_selection.Gains) -> None:
    torch.manual_seed(0)
    V = torch.randn(230, 3, 20, dtype=torch.float64)
    fisher = fisher_matrix(V)
    ours, _ = select_batch(V, 12, fisher)
    assert bench_selection.select_naively(V, 12, fisher, gains) == ours.tolist()


def test_knobs_are_judged_by_the_exact_batch() -> None:
    given = harness.options("", "query", 1).parse_args(["--quick"])
    case = bench_query.KnobCase(given, 0)
    assert case.compare(case.exact) == (1, 1)
    common, gain = case.compare([*case.exact[:-1], -1])
    assert common == pytest.approx(1 - 1 / len(case.exact))
    assert 0.5 < gain < 1


# The scripts


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clone") / "benchmarks/results"
    for name, script in SCRIPTS.items():
        script.main(["--quick", "--repeats", "2", "--out", str(folder / f"{name}.json")])
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
    result = load(results, "embedding")
    judged = " ".join(target["what"] for target in result["targets"])
    for name, found in result["networks"].items():
        assert found["sizes"]["k"] == 200
        ratios = found["ratio to C ordinary passes"]
        assert {"embedding", "diagonal", "ordinary passes"} <= ratios.keys()
        assert ratios.keys() == found["seconds a batch"].keys()
        assert ratios["ordinary passes"] == {"median": 1, "min": 1, "max": 1}
        assert f"{name}: embedding" in judged
        assert f"{name}: diagonal" in judged


def test_the_query_is_the_authors_query(results: Path) -> None:
    query = load(results, "query")["query"]
    assert query["same_batch"]
    assert query["n_common"] == query["sizes"]["K"]
    assert query["relative_difference_of_information"] < 1e-4
    for side in ("authors'", "kinder"):
        assert query["theirs"][side].keys() == query["ratios"][side].keys()
    # Scaled to the whole query.
    n = query["sizes"]["n_candidates"]
    assert query["factors"]["authors' embedding"] == n / 2


def test_every_knob_is_judged(results: Path) -> None:
    settings = load(results, "query")["knobs"]["settings"]
    assert settings["as it is"]["common"]["median"] == 1
    assert settings["n_directions=1"]["n_directions"] == 1
    assert 1 <= settings["n_directions=0.9"]["n_directions"] <= 9
    assert all(0 < knob["gain"]["max"] < 1.0001 for knob in settings.values())


def test_large_pools(results: Path) -> None:
    bench_query.main(["--quick", "--large", "--out", str(results / "large.json")])
    cases = load(results, "large")["cases"]
    assert [*cases] == [*bench_query.LARGE][:3]
    storage = [case["query"]["embedding_storage"] for case in cases.values()]
    assert storage == ["memory", "memory", "scratch file"]
    for case in cases.values():
        assert case["query"]["n_candidates"] == case["N"]
        assert case["query"]["embedding_bytes"] == 4 * case["N"] * case["r"] * case["k"]
        assert 0 < case["baseline_bytes"] <= case["peak_bytes"]
        assert case["baseline_private_bytes"] <= case["peak_private_bytes"]
    page = render(results)
    assert "Large pools" in page
    assert "% of the picks are those of the proved choice" in page
    assert "nan" not in page


def test_large_pools_beside_each_other() -> None:
    def case(n: int, seconds: float) -> dict[str, Any]:
        return {"N": n, "K": 4, "seconds": {"selection": seconds}, "peak_private_bytes": 3e10}

    small, big = bench_query.TENTHS[0]
    found = {
        "in memory": case(60_000, 50.0),
        "in memory, lazy": case(60_000, 5.0),
        small: case(100_000, 2.0),
        big: case(1_000_000, 24.0),
    }
    indices = {"in memory": {1, 2, 3, 4}, "in memory, lazy": {4, 3, 2, 9}}
    beside = bench_query.compared(found, indices)
    assert beside["growth from a tenth"] == {big: {"selection": 12.0}}
    # A tenth of the time; three of four picks; too many bytes.
    assert [(t["found"], t["met"]) for t in beside["targets"]] == [
        (0.1, True),
        (0.75, False),
        (3e10, False),
    ]


def test_paper(results: Path, device: str) -> None:
    arguments = ["--quick", "--repeats", "2", "--device", device]
    bench_paper.main([*arguments, "--out", str(results / "paper.json")])
    for n_classes, case in load(results, "paper")["cases"].items():
        n, r, k = case["sizes"]["N"], case["query"]["n_directions"], case["query"]["mask_size"]
        assert case["query"]["embedding_bytes"] == 4 * n * r * k
        assert case["sizes"]["n_classes"] == int(n_classes)
        assert case["share of that in the selection"]["median"] > 0
    page = render(results)
    assert "A query of the paper's size" in page
    assert "nan" not in page


def test_cluster_and_faults(results: Path) -> None:
    pytest.importorskip("distributed")
    bench_cluster.main(["--quick", "--out", str(results / "cluster.json")])
    cluster = load(results, "cluster")
    assert cluster["same_picks"]
    assert cluster["cases"]["cluster"]["query"]["embedding_storage"] == "cluster"
    assert cluster["cases"]["local"]["query"]["embedding_storage"] == "scratch file"
    assert len(cluster["cases"]["cluster"]["workers"]) == 2
    for worker in cluster["cases"]["cluster"]["workers"]:
        assert 0 < worker["before_private_bytes"] < worker["peak_private_bytes"]
    bench_faults.main(["--quick", "--runs", "1", "--out", str(results / "faults.json")])
    (run,) = load(results, "faults")["runs"]
    assert run["same_picks"]
    assert run["tasks_left"] == 0
    page = render(results)
    assert "A Dask cluster beside a scratch file" in page
    assert "Workers that die" in page
    assert "nan" not in page


# The page


def measured_pages() -> ModuleType:
    pytest.importorskip("sphinx")
    spec = importlib.util.spec_from_file_location("pages", ROOT / "docs/_ext/measured_pages.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def render(results: Path) -> str:
    pages = measured_pages()
    template = (ROOT / "docs/performance.rst").read_text(encoding="utf-8")
    return pages.environment().from_string(template).render(pages.measured(results))


def test_page_is_written_from_the_results(results: Path) -> None:
    page = render(results)
    query = load(results, "query")["query"]
    assert (
        f"took {query['n_common']} of our {query['sizes']['K']} images, in the same order." in page
    )
    assert page.count("* - ``n_directions=") == 4
    assert "nan" not in page


@pytest.mark.parametrize("name", ["performance", "performance_sweeps"])
def test_figures_are_drawn_from_the_results(
    results: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plt = pytest.importorskip("matplotlib.pyplot")
    folder = results.parents[1] / "docs/figures"
    folder.mkdir(parents=True, exist_ok=True)
    monkeypatch.chdir(folder)
    plt.close("all")
    drawn = runpy.run_path(str(ROOT / f"docs/figures/{name}.py"))
    drawn["figure"].savefig("drawn.png")
    plt.close("all")
    assert Path("drawn.png").stat().st_size > 10_000
