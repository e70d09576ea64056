"""The tutorials for users' own data do what their texts say."""

from __future__ import annotations

import csv
import re
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

matplotlib = pytest.importorskip("matplotlib", reason="the tutorials draw")
pytest.importorskip("torchvision", reason="one of the tutorials reads images")
Image = pytest.importorskip("PIL.Image", reason="torchvision brings it")


def run(name: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    matplotlib.use("Agg")
    monkeypatch.setattr("sys.argv", [name])
    try:
        return runpy.run_path(str(Path(__file__).parents[1] / f"examples/plot_{name}.py"))
    finally:
        matplotlib.pyplot.close("all")


def table_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8-sig") as table:
        return list(csv.DictReader(table))


@pytest.mark.slow
def test_features_first(monkeypatch: pytest.MonkeyPatch) -> None:
    curves = run("features_first", monkeypatch)["curves"]
    chosen, at_random = (np.mean(curves[name], axis=0) for name in ("chosen", "at random"))
    assert chosen[-1] > 0.9
    assert (chosen > at_random).all()


@pytest.mark.slow
def test_a_folder_of_images(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    seen = run("images_on_disk", monkeypatch)
    printed = capsys.readouterr().out
    assert printed.count("day_2/599.png is left out") == 3
    steps = re.findall(r"(\d+) labels so far; (\S+) asks for (\d+)", printed)
    assert [int(n_labels) for n_labels, _, _ in steps] == [0, 19, 58]
    assert [int(n_asked) for _, _, n_asked in steps] == [20, 40, 40]
    assert np.mean(seen["right"]) > 0.7
    tables = [table_of(seen["work"] / name) for _, name, _ in steps]
    assert [list(table[0]) for table in tables[::2]] == [
        ["rank", "row", "file", "label"],
        ["rank", "row", "file", "predicted", "uncertainty", "label"],
    ]
    labelled = {line["file"] for table in tables[:2] for line in table if line["label"] != "O"}
    assert not labelled & {line["file"] for line in tables[2]}


class Own:
    """A folder of photographs, with the script made from the tutorial as its text says."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.photographs, self.work = root, root / "photographs", root / "a" / "tables"
        self.truth: dict[str, str] = {}
        rng = np.random.default_rng(0)
        for number in range(24):
            size = (20 + number % 7, 16 + number % 5, 3)
            pixels = (rng.random(size) * 100 + 140 * (number % 2)).astype("uint8")
            image = Image.fromarray(pixels)
            file = f"{number % 3}/x/IMG_{number}.{('jpg', 'JPG', 'jpeg', 'png')[number % 4]}"
            if number == 7:
                image.putalpha(128)
            if number == 8:
                image = image.convert("L")
            (self.photographs / file).parent.mkdir(parents=True, exist_ok=True)
            image.save(self.photographs / file)
            self.truth[file] = ("dark", "light")[number % 2]
        whole = (self.photographs / "0/x/IMG_0.jpg").read_bytes()
        (self.photographs / "cut.jpg").write_bytes(whole[: len(whole) // 2])
        (self.photographs / "notes.txt").write_text("no image")
        # A network that is quick, in place of a ResNet-18.
        small = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten())
        monkeypatch.setattr("torchvision.models.resnet18", lambda weights: small)

    def script(self) -> str:
        text = (Path(__file__).parents[1] / "examples/plot_images_on_disk.py").read_text()
        digits = r"# ==== Only for this page: delete from here ====.*?: to here ====\n"
        text, n_removed = re.subn(digits, "", text, flags=re.DOTALL)
        assert n_removed == 1
        text, end, _ = text.partition("# ==== Only for this page: delete from here to the end")
        assert end
        changes = {
            "folder": f"Path({str(self.photographs)!r})",
            "work": f"Path({str(self.work)!r})",
            "names": '["dark", "light"]',
            "n_first, n_batch": "10, 6",
        }
        for name, value in changes.items():
            line = re.compile(rf"^{name} = .*$", flags=re.MULTILINE)
            text, n_changed = line.subn(lambda _, new=f"{name} = {value}": new, text)
            assert n_changed == 1, name
        return text

    def run(self) -> dict[str, Any]:
        """Run it in a namespace of its own, as a new process would."""
        path = self.root / "my_script.py"
        path.write_text(self.script())
        return runpy.run_path(str(path))

    def fill_in(self, name: str) -> None:
        self.write(name, [f"{file},{self.truth[file]}" for file in self.asked(name)])

    def asked(self, name: str) -> list[str]:
        return [line["file"] for line in table_of(self.work / name)]

    def write(self, name: str, lines: list[str], head: str = "file,label", **how: str) -> None:
        (self.work / name).write_text("\n".join([head, *lines]), **{"encoding": "utf-8", **how})

    def result(self) -> dict[str, str]:
        return {line["file"]: line["label"] for line in table_of(self.work / "result.csv")}

    def contents(self, folder: Path) -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Own:
    return Own(tmp_path, monkeypatch)


def test_an_own_folder_is_labelled_by_running_the_script_again(
    own: Own, capsys: pytest.CaptureFixture
) -> None:
    photographs = own.contents(own.photographs)
    own.run()
    assert capsys.readouterr().out.count("cut.jpg is left out") == 1
    first = own.contents(own.work)
    own.run()  # Nothing is answered yet.
    assert "the last table has none yet" in capsys.readouterr().out
    assert own.contents(own.work) == first
    for number in range(1, 5):
        name = f"batch_{number:03d}"
        assert (own.work / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        own.fill_in(f"{name}.csv")
        own.run()
    assert "All images have labels" in capsys.readouterr().out
    asked = [own.asked(f"batch_00{number}.csv") for number in range(1, 5)]
    assert [len(table) for table in asked] == [10, 6, 6, 2]
    assert sorted(file for table in asked for file in table) == sorted(own.truth)
    assert own.result() == own.truth
    assert own.contents(own.photographs) == photographs


def test_the_tables_are_enough_to_go_on_and_features_are_kept(own: Own) -> None:
    own.run()
    own.fill_in("batch_001.csv")
    own.run()
    expected = own.contents(own.work)
    for name in ("result.csv", "batch_002.csv", "batch_002.png"):
        (own.work / name).unlink()
    (own.work / "features.pt").rename(own.work / "kept.pt")
    lines = (own.work / "batch_001.csv").read_text().splitlines()
    own.write("batch_001.csv", lines[:0:-1])  # Sorted otherwise.
    own.run()
    for name in ("result.csv", "batch_002.csv"):
        assert (own.work / name).read_bytes() == expected[str(own.work / name)]
    assert not set(own.asked("batch_001.csv")) & set(own.asked("batch_002.csv"))
    # Only a new image is opened.
    Image.new("RGB", (9, 9)).save(own.photographs / "new.png")
    kept = torch.load(own.work / "features.pt")
    kept["0/x/IMG_0.jpg"] += 100
    torch.save(kept, own.work / "features.pt")
    files, X = own.run()["read_features"]()
    assert sorted(files) == sorted([*own.truth, "new.png"])
    assert (X[list(files).index("0/x/IMG_0.jpg")] > 99).all()


def test_a_correction_in_a_table_takes_effect(own: Own, capsys: pytest.CaptureFixture) -> None:
    own.run()
    files = own.asked("batch_001.csv")
    wrong = {"dark": "light", "light": "dark"}[own.truth[files[3]]]
    other = next(file for file in own.truth if file not in files and own.truth[file] != wrong)
    good = [f"{file},{own.truth[file]}" for file in files]
    bad = [f"{files[0]},", f"{files[1]},lihgt", f"missing_{files[2]},light", f"{files[3]},{wrong}"]
    own.write("batch_001.csv", [*bad, *good[4:], f"{other},{own.truth[other]}"])
    own.run()
    printed = capsys.readouterr().out
    assert f"no image {files[1]!r}, or no label 'lihgt'" in printed
    assert f"no image 'missing_{files[2]}', or no label 'light'" in printed
    assert "8 labels so far" in printed
    assert own.result()[files[3]] == wrong
    assert own.result()[other] == own.truth[other]
    own.write("batch_001.csv", good)
    own.fill_in("batch_002.csv")
    own.run()
    assert " no label " not in capsys.readouterr().out
    assert all(own.result()[file] == own.truth[file] for file in files)


def test_tables_as_spreadsheets_save_them(own: Own) -> None:
    (own.photographs / "0/x/IMG_0.jpg").rename(own.photographs / "é, ü.jpg")
    seen = own.run()
    rows = ['"é, ü.jpg"~1~dark', "1/x/IMG_1.JPG~2~", "2/x/IMG_2.jpeg", "~~"]
    for encoding in ("utf-8", "utf-8-sig"):
        for separator in (",", ";"):
            for newline in ("\n", "\r\n"):
                lines = [row.replace("~", separator) for row in rows]
                head = "file~rank~label".replace("~", separator)
                own.write("batch_001.csv", lines, head, encoding=encoding, newline=newline)
                answers, _ = seen["read_tables"](seen["read_features"]()[0])
                assert answers[["file", "label"]].to_numpy().tolist() == [["é, ü.jpg", "dark"]]


def test_images_are_read_upright(own: Own) -> None:
    turned = Image.fromarray(np.zeros((10, 30, 3), "uint8"))
    exif = Image.Exif()
    exif[0x0112] = 6  # As phones say: turned by 90 degrees.
    turned.save(own.photographs / "turned.jpg", exif=exif)
    assert own.run()["open_image"]("turned.jpg").size == (10, 30)


def test_a_folder_without_images_is_named(own: Own) -> None:
    own.photographs = own.root / "empty"
    with pytest.raises(ValueError, match=r"no readable \.jpg.* in .*empty"):
        own.run()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers", reason="models of Hugging Face are fine-tuned")
    pytest.importorskip("accelerate", reason="its Trainer needs it")
    seen = run("texts", monkeypatch)
    assert seen["words_after"] > seen["words_before"] + 0.1
    before, after = seen["tokens_scores"]
    assert after > before + 0.1
    assert min(seen["trainer_before"], seen["trainer_after"]) > 0.9
    assert all(isinstance(text, str) for text in seen["X_labeled"])
    assert len(seen["X_labeled"]) == len(seen["y_labeled"]) == 72
    assert len(seen["X_pool"]) == 400 - 72
    assert set(seen["output"]) <= set(seen["mask"].indices)
    assert seen["trained"] == [
        "bert.encoder.layer.1.intermediate.dense.down",
        "bert.encoder.layer.1.intermediate.dense.up",
        "classifier.down",
        "classifier.up",
    ]
    assert set(seen["in_mask"]) <= set(seen["trained"])
    assert sum(seen["in_mask"].values()) == 100


def test_a_trained_network_and_a_pool_in_files(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = run("trained_network", monkeypatch)
    assert seen["unchanged"]
    assert seen["after"] > seen["before"]
    # The new digits are asked for more often than a random batch would.
    assert seen["counts"][8:].sum() > seen["expected"][8:].sum()


@pytest.mark.slow
def test_breaks_change_nothing_and_a_batch_goes_to_a_labelling_tool_and_back(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen = run("person_in_the_loop", monkeypatch)
    in_one_go = seen["sitting"](tmp_path / "record.json", seen["look_up"], n_labels=60)
    assert [int(row) for row in in_one_go.labels] == seen["labelled"]
    data = [task["data"] for task in seen["tasks"]]
    assert [d["row"] for d in data] == seen["table"]["row"].tolist()
    assert [d["rank"] for d in data] == list(range(1, 11))
    assert [d["gain"] for d in data] == seen["gains"].tolist()
    assert all(d["image"].startswith("data:image/png;base64,iVBOR") for d in data)
    # The third was skipped; the others have their labels.
    answered = [d["row"] for d in data if d["rank"] != 3]
    assert seen["answers"] == {row: seen["y_true"][row] for row in answered}
