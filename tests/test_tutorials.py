"""The tutorials for users' own data do what their texts say."""

from __future__ import annotations

import csv
import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

matplotlib = pytest.importorskip("matplotlib", reason="the tutorials draw")
pytest.importorskip("torchvision", reason="one of the tutorials reads images")


def run(name: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    matplotlib.use("Agg")
    monkeypatch.setattr("sys.argv", [name])
    try:
        return runpy.run_path(str(Path(__file__).parents[1] / f"examples/plot_{name}.py"))
    finally:
        matplotlib.pyplot.close("all")


class Kept:
    """A temporary folder that the tutorial does not remove."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)

    def cleanup(self) -> None: ...


@pytest.mark.slow
def test_a_folder_of_images_without_labels(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("tempfile.TemporaryDirectory", lambda: Kept(tmp_path))
    seen = run("images_on_disk", monkeypatch)
    printed = capsys.readouterr().out
    files, labels, truth = seen["files"], seen["labels"], seen["truth"]
    assert sorted(path.name for path in (tmp_path / "scans").iterdir()) == files
    assert seen["after"] > seen["before"]

    # Of each table one answer is blank and one misspelt; the others are those of the person.
    asked = [table_of(tmp_path / f"batch_{number}.csv") for number in (1, 2)]
    assert [len(table) for table in asked] == [100, 40]
    lines = [line for table in asked for line in table]
    answered = {line["file"] for line in lines if line["label"] in seen["names"]}
    assert answered == set(labels)
    assert len(answered) == 136
    assert all(labels[file] == truth[file] for file in answered)
    assert printed.count("is not among the names") == 2
    # The second batch was asked in the order of the query, and asks nothing twice.
    assert [line["file"] for line in asked[1]] == [seen["pool"][row] for row in seen["rows"]]
    assert not {line["file"] for line in asked[1]} & {
        line["file"] for line in asked[0] if line["label"] in seen["names"]
    }

    # Every file has a label in the end, the least certain first.
    predicted = table_of(tmp_path / "predicted.csv")
    assert sorted([line["file"] for line in predicted] + list(labels)) == files
    probabilities = [float(line["probability"]) for line in predicted]
    assert probabilities == sorted(probabilities)

    # The answers on disk are enough to go on.
    again = seen["fit"](json.loads((tmp_path / "labels.json").read_text(encoding="utf-8")))
    expected = seen["sampler"].predict_proba(seen["test"])
    np.testing.assert_array_equal(again.predict_proba(seen["test"]), expected)

    # Tables as spreadsheets save them.
    def answers(text: str, encoding: str = "utf-8") -> dict[str, str]:
        path = tmp_path / "table.csv"
        path.write_text(text, encoding=encoding)
        return seen["read_answers"](path, seen["names"])

    good = {"é.png": "one"}
    for encoding in ("utf-8", "utf-8-sig"):
        assert answers("file,label\né.png, one \nb.png,\nc.png,onne\nd.png\n", encoding) == good
    assert capsys.readouterr().out.count("c.png") == 2
    for text in ("file;label\na.png;one\n", "name,label\na.png,one\n", ""):
        with pytest.raises(ValueError, match=r"table\.csv: no columns file and label"):
            answers(text)
    with pytest.raises(FileExistsError):
        seen["write_table"](tmp_path / "batch_1.csv", ["file"], [])


def table_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8-sig") as table:
        return list(csv.DictReader(table))


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
