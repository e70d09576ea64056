"""The tutorials for users' own data do what their texts say."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

matplotlib = pytest.importorskip("matplotlib", reason="the tutorials draw")
pytest.importorskip("torchvision", reason="one of the tutorials reads image folders")


def run(name: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    matplotlib.use("Agg")
    monkeypatch.setattr("sys.argv", [name])
    try:
        return runpy.run_path(str(Path(__file__).parents[1] / f"examples/plot_{name}.py"))
    finally:
        matplotlib.pyplot.close("all")


@pytest.mark.slow
def test_images_on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = run("images_on_disk", monkeypatch)
    assert len({path.name for path in seen["files"]}) == len(seen["chosen"]) == 40
    assert {path.parent.name for path in seen["files"]} == {"no_label_yet"}
    assert set(seen["sampler"].classes_) <= set(seen["names"])
    assert seen["after"] > seen["before"]


def test_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = run("texts", monkeypatch)
    assert seen["accuracy_after"] > seen["accuracy_before"]
    assert all(isinstance(text, str) for text in seen["chosen"])
    assert seen["trained"] == [
        "encoder.linear1.down",
        "encoder.linear1.up",
        "classifier.down",
        "classifier.up",
    ]
    assert seen["shares"]["adapters"] > 0
    assert seen["shares"]["frozen"] > 0


def test_a_trained_network_and_a_pool_in_files(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = run("trained_network", monkeypatch)
    assert seen["unchanged"]
    assert seen["after"] > seen["before"]
    # The new digits are asked for more often than a random batch would.
    assert seen["counts"][8:].sum() > seen["expected"][8:].sum()


@pytest.mark.slow
def test_a_batch_goes_to_a_labelling_tool_and_back(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = run("person_in_the_loop", monkeypatch)
    assert seen["same_answers"]
    data = [task["data"] for task in seen["tasks"]]
    assert [d["row"] for d in data] == seen["batch_rows"].tolist()
    assert [d["rank"] for d in data] == list(range(1, 11))
    assert [d["gain"] for d in data] == seen["gains"].tolist()
    assert all(d["image"].startswith("data:image/png;base64,iVBOR") for d in data)
    # The third was skipped; the others have their labels.
    answered = [d["row"] for d in data if d["rank"] != 3]
    assert seen["from_tool"] == seen["from_table"] == {r: seen["y_true"][r] for r in answered}
