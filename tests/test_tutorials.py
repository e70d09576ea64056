"""The tutorials for users' own data do what their texts say."""

from __future__ import annotations

import ast
import csv
import re
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from skfishermask import FisherMaskSampler

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
    files, truth, tables = seen["files"], seen["truth"], tmp_path / "tables"
    assert sorted(path.name for path in (tmp_path / "scans").iterdir()) == [
        "half_a_scan.PNG",
        *files,
    ]
    assert printed.count("half_a_scan.PNG is left out") == 1

    # Of the first batch two answers are missing, and one until its file name is corrected.
    assert printed.count("is not among the names") == 3
    assert printed.count("is not an image of the folder") == 1
    tables_of = [table_of(tables / f"batch_00{number}.csv") for number in (1, 2)]
    assert [len(table) for table in tables_of] == [20, 40]
    lines = [line for table in tables_of for line in table]
    answered = {line["file"] for line in lines if line["label"] in seen["names"]}
    steps = re.findall(r"(\d+) labels, accuracy (\S+) on 200 other", printed)
    assert [int(n_labels) for n_labels, _ in steps] == [20 + 17, 20 + len(answered)]
    assert float(steps[0][1]) < float(steps[1][1])
    assert "Fewer than half of the images have a label in batch_002.csv\n" in printed

    # Every image has a label in the end, the least certain first.
    result = table_of(tables / "result.csv")
    assert sorted(line["file"] for line in result) == files
    by_person = [line for line in result if line["source"] == "person"]
    assert len(by_person) == 200 + len(answered)
    assert all(line["label"] == truth[line["file"]] for line in by_person)
    probabilities = [float(line["probability"]) for line in result if line["source"] == "network"]
    assert probabilities == sorted(probabilities)
    assert len(probabilities) + len(by_person) == len(result)


def table_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8-sig") as table:
        return list(csv.DictReader(table))


class Own:
    """A folder of photographs, with the script made from the tutorial as its text says."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.photographs, self.work = root, root / "photographs", root / "a" / "tables"
        self.monkeypatch = monkeypatch
        self.sorted_folder = "None"
        self.photographs.mkdir()
        self.truth: dict[str, str] = {}
        rng = np.random.default_rng(0)
        for number in range(40):
            label = ("dark", "light")[number % 2]
            size = (20 + number % 7, 16 + number % 5, 3)
            pixels = (rng.random(size) * 100 + 140 * (number % 2)).astype("uint8")
            image = Image.fromarray(pixels)
            name = f"IMG_{number:03d}.{('jpg', 'JPG', 'jpeg', 'png')[number % 4]}"
            if number == 7:
                image.putalpha(128)
            if number == 8:
                image = image.convert("L")
            image.save(self.photographs / name)
            self.truth[name] = label
        whole = (self.photographs / "IMG_000.jpg").read_bytes()
        (self.photographs / "cut.jpg").write_bytes(whole[: len(whole) // 2])
        (self.photographs / "notes.txt").write_text("no image")

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
            "sorted_folder": self.sorted_folder,
            "names": '["dark", "light"]',
            "size": "(8, 9)",
            "mode": '"RGB"',
            "n_test, n_first, n_batch": "8, 10, 3",
        }
        docstring = ast.get_docstring(ast.parse(text)) or ""
        for name, value in changes.items():
            assert all(f"``{part}``" in docstring for part in name.split(", ")), name
            text, n_changed = re.subn(
                rf"^{name} = .*", lambda _, to=f"{name} = {value}": to, text, flags=re.MULTILINE
            )
            assert n_changed == 1, name
        return text

    def run(self) -> dict[str, Any]:
        """In a namespace of its own, as a new process would."""
        matplotlib.use("Agg")
        path = self.root / "my_script.py"
        path.write_text(self.script().replace("max_epochs=60", "max_epochs=4"))
        try:
            return runpy.run_path(str(path))
        finally:
            matplotlib.pyplot.close("all")

    def fill_in(self, *names: str) -> None:
        for name in names:
            lines = [f"{line['file']},{self.truth[line['file']]}" for line in self.table(name)]
            self.write(name, lines)

    def table(self, name: str) -> list[dict[str, str]]:
        return table_of(self.work / name)

    def write(self, name: str, lines: list[str]) -> None:
        (self.work / name).write_text("\n".join(["file,label", *lines]), encoding="utf-8")

    def lines(self, name: str) -> list[str]:
        return (self.work / name).read_text(encoding="utf-8-sig").splitlines()[1:]

    def contents(self, folder: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    def by_person(self) -> dict[str, str]:
        result = self.table("result.csv")
        return {line["file"]: line["label"] for line in result if line["source"] == "person"}


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Own:
    return Own(tmp_path, monkeypatch)


def test_an_own_folder_is_labelled_by_running_the_script_again(
    own: Own, capsys: pytest.CaptureFixture
) -> None:
    photographs = own.contents(own.photographs)
    own.run()
    assert capsys.readouterr().out.count("cut.jpg is left out") == 1
    assert sorted(own.contents(own.work)) == ["batch_001.csv", "test.csv"]
    first = own.contents(own.work)
    own.run()  # Nothing is answered yet.
    printed = capsys.readouterr().out
    assert "Fewer than half of the images have a label in test.csv batch_001.csv\n" in printed
    assert own.contents(own.work) == first

    own.fill_in("test.csv", "batch_001.csv")
    own.run()
    assert "10 labels, accuracy " in capsys.readouterr().out
    filled = own.contents(own.work)
    own.run()
    assert own.contents(own.work) == filled
    capsys.readouterr()
    n_tables = 1
    while True:  # Until all have been asked for; the last batch is a smaller one.
        n_tables += 1
        own.fill_in(f"batch_{n_tables:03d}.csv")
        own.run()
        if "All images have a label of yours" in capsys.readouterr().out:
            break
    assert (own.work / f"batch_{n_tables:03d}.png").read_bytes().startswith(b"\x89PNG")

    asked = [own.table("test.csv"), *(own.table(f"batch_{i + 1:03d}.csv") for i in range(n_tables))]
    assert [len(table) for table in asked] == [8, 10, *[3] * 7, 1]
    assert sorted(line["file"] for table in asked for line in table) == sorted(own.truth)
    assert own.by_person() == own.truth
    for name in ("test.csv", "batch_001.csv"):
        assert own.contents(own.work)[name] == filled[name]
    assert own.contents(own.photographs) == photographs


def test_the_tables_are_enough_to_go_on(own: Own) -> None:
    own.run()
    own.fill_in("test.csv", "batch_001.csv")
    own.run()
    own.fill_in("batch_002.csv")
    query, labelled = FisherMaskSampler.query, []

    def spied(sampler: FisherMaskSampler, X_pool: Any, n_instances: int, X_labeled: Any) -> Any:
        labelled.append({path.name for path in X_labeled.paths})
        return query(sampler, X_pool, n_instances, X_labeled=X_labeled)

    own.monkeypatch.setattr(FisherMaskSampler, "query", spied)
    own.run()
    batches = own.table("batch_001.csv") + own.table("batch_002.csv")
    assert labelled == [{line["file"] for line in batches}]
    expected = own.contents(own.work)
    for name in ("result.csv", "batch_003.csv", "batch_002.png", "batch_003.png"):
        (own.work / name).unlink()
    own.write("batch_001.csv", own.lines("batch_001.csv")[::-1])  # Sorted otherwise.
    own.run()
    for name in ("result.csv", "batch_003.csv"):
        assert own.contents(own.work)[name] == expected[name]
    # Nothing chosen is labelled or tested.
    asked = [own.table(name) for name in ("test.csv", "batch_001.csv", "batch_002.csv")]
    known = {line["file"] for table in asked for line in table}
    assert not known & {line["file"] for line in own.table("batch_003.csv")}


def test_a_correction_in_a_table_takes_effect(own: Own, capsys: pytest.CaptureFixture) -> None:
    own.run()
    own.fill_in("test.csv", "batch_001.csv")
    good = own.lines("batch_001.csv")
    files = [line.partition(",")[0] for line in good]
    wrong = {"dark": "light", "light": "dark"}[own.truth[files[3]]]
    tested = own.table("test.csv")[0]["file"]
    bad = [
        f"{files[0]},",
        f"{files[1]},lihgt",
        f"missing_{files[2]},light",
        f"{files[3]},{wrong}",
        *good[4:],
        f"{tested},light",  # Tested on, so not trained on.
    ]
    own.write("batch_001.csv", bad)
    own.run()
    printed = capsys.readouterr().out
    assert f"batch_001.csv: 'lihgt', for {files[1]}, is not among the names" in printed
    assert f"batch_001.csv: 'missing_{files[2]}' is not an image of the folder" in printed
    assert "7 labels, accuracy " in printed
    by_person = own.by_person()
    assert by_person[files[3]] == wrong
    assert by_person[tested] == own.truth[tested]
    assert not set(files[:3]) & set(by_person)

    other = next(file for file in own.truth if file not in by_person and file not in files)
    own.fill_in("batch_002.csv")
    own.write("batch_001.csv", [*good, f"{other},{own.truth[other]}"])
    own.run()
    assert " is not " not in capsys.readouterr().out
    by_person = own.by_person()
    assert {*files, other} <= set(by_person)
    assert all(own.truth[file] == label for file, label in by_person.items())


def test_a_table_that_is_half_answered_is_enough(own: Own, capsys: pytest.CaptureFixture) -> None:
    own.run()
    own.fill_in("test.csv", "batch_001.csv")
    by_label = sorted(own.lines("batch_001.csv"), key=lambda line: line.split(",")[1])
    good = by_label[::2] + by_label[1::2]  # Both labels are among the last.
    for n_blank, goes_on in ((6, False), (5, True)):
        blank = [f"{line.partition(',')[0]}," for line in good[:n_blank]]
        own.write("batch_001.csv", [*blank, *good[n_blank:]])
        capsys.readouterr()
        own.run()
        assert ("5 labels, accuracy " in capsys.readouterr().out) == goes_on
        assert (own.work / "batch_002.csv").exists() == goes_on


def test_tables_as_spreadsheets_save_them(own: Own, capsys: pytest.CaptureFixture) -> None:
    image = own.photographs / "IMG_000.jpg"
    image.rename(own.photographs / "é.jpg")
    seen = own.run()

    def answers(text: str, encoding: str = "utf-8") -> dict[str, str]:
        (own.work / "batch_001.csv").write_bytes(text.encode(encoding))
        return seen["read_table"]("batch_001.csv")

    rows = ["file,rank,label", "é.jpg,1, dark ", "IMG_001.JPG,2,", "IMG_002.jpeg", "", ",,"]
    good = {"é.jpg": "dark", "IMG_001.JPG": "", "IMG_002.jpeg": ""}
    for encoding in ("utf-8", "utf-8-sig"):
        for separator in (",", ";"):
            for end in ("\n", "\r\n"):
                text = end.join(rows).replace(",", separator)
                labels = answers(text, encoding)
                assert {file: label for file, label in labels.items() if file} == good
    capsys.readouterr()
    for encoding in ("cp1252", "utf-16"):
        with pytest.raises(
            ValueError, match=r"batch_001\.csv is not in UTF-8: save it as CSV UTF-8"
        ):
            answers("file,label\né.jpg,dark", encoding)
    for text in ("name,label\na.jpg,dark\n", "file\ta\n", ""):
        with pytest.raises(
            ValueError, match=r"batch_001\.csv has the columns .*needs file and label"
        ):
            answers(text)
    with pytest.raises(FileExistsError):
        seen["write_table"]("test.csv", ["file"], [])


def test_images_are_read_upright_and_with_the_colours_that_are_wanted(own: Own) -> None:
    turned = Image.fromarray(np.zeros((10, 30, 3), "uint8"))
    exif = Image.Exif()
    exif[0x0112] = 6  # As phones say: turned by 90 degrees.
    turned.save(own.photographs / "turned.jpg", exif=exif)
    seen = own.run()
    assert seen["open_image"](own.photographs / "turned.jpg").size == (10, 30)
    assert seen["files"] == sorted([*own.truth, "turned.jpg"])
    assert {tuple(image.shape) for image, _ in seen["Images"](seen["files"])} == {(3, 8, 9)}


def test_images_that_are_sorted_already_are_trained_on(
    own: Own, capsys: pytest.CaptureFixture
) -> None:
    sorted_folder = own.root / "sorted"
    for label, grey in (("dark", 10), ("light", 240)):
        (sorted_folder / label).mkdir(parents=True)
        Image.new("L", (9, 9), grey).save(sorted_folder / label / "same_name.png")
    own.sorted_folder = f"Path({str(sorted_folder)!r})"
    own.run()
    own.fill_in("test.csv", "batch_001.csv")
    own.run()
    assert "12 labels, accuracy " in capsys.readouterr().out
    assert len(own.by_person()) == 18
    (sorted_folder / "grey").mkdir()
    Image.new("L", (9, 9)).save(sorted_folder / "grey" / "image.png")
    with pytest.raises(ValueError, match=r"'grey', 'light'\] are not all among the names"):
        own.run()


def test_a_folder_without_images_is_named(own: Own) -> None:
    own.photographs = own.root / "empty"
    with pytest.raises(FileNotFoundError, match="empty"):
        own.run()
    own.photographs.mkdir()
    with pytest.raises(ValueError, match=r"empty: 0 readable \.jpg"):
        own.run()


def test_no_digits_are_written_among_photographs(own: Own, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where somebody forgets to delete the part that makes them."""
    own.photographs.rename(own.root / "scans")
    before = own.contents(own.root / "scans")
    monkeypatch.setattr("tempfile.TemporaryDirectory", lambda: Kept(own.root))
    with pytest.raises(FileExistsError):
        run("images_on_disk", monkeypatch)
    assert own.contents(own.root / "scans") == before


def test_of_the_pretrained_network_only_the_new_layer_is_trained(
    own: Own, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = own.run()
    resnet18 = seen["models"].resnet18
    monkeypatch.setattr(seen["models"], "resnet18", lambda weights: resnet18())  # No download.
    network = seen["pretrained"]()
    trained = [name for name, p in network.named_parameters() if p.requires_grad]
    assert trained == ["1.fc.weight", "1.fc.bias"]
    pool = seen["Images"](seen["files"][:12])
    net = seen["net"].set_params(module=seen["pretrained"], max_epochs=1)
    sampler = seen["FisherMaskSampler"](net, mask="output_layer", random_state=0)
    rows, _ = sampler.fit(pool, ["dark", "light"] * 6).query(pool, n_instances=2)
    assert len(set(rows)) == 2
    assert list(sampler.mask_.indices) == trained


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
    assert set(seen["in_mask"]) <= set(seen["trained"])
    assert sum(seen["in_mask"].values()) == 100


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
