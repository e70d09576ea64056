"""Files of a run: damaged ones are named, and one writer is at work at a time."""

from __future__ import annotations

import json
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_iris
from sklearn.naive_bayes import GaussianNB

from skfishermask import active_learning_curve
from skfishermask.evaluation.checkpoint import Checkpoint
from tests import forked

RECORDS: Any = [
    {"score": 0.1 * i, "fit_time": 0.5, "query_time": 1e-3, "chosen": [i, i + 3]} for i in range(4)
]
IDENTITY: dict[str, object] = {"training samples": "0a1b"}


def written(folder: Path) -> None:
    with Checkpoint(folder, {"X": "abc", "n_instances": 2}) as kept:
        kept.seed(7, is_given=True)
        assert kept.read(0, IDENTITY) == []
        kept.write(0, IDENTITY, RECORDS)


def read_back(folder: Path) -> tuple[int, Any]:
    with Checkpoint(folder, {"X": "abc", "n_instances": 2}) as kept:
        return kept.seed(7, is_given=False), kept.read(0, IDENTITY)


def test_what_was_written_is_read(tmp_path: Path) -> None:
    written(tmp_path)
    assert read_back(tmp_path) == (7, RECORDS)


def test_no_flipped_bit_changes_a_number(tmp_path: Path) -> None:
    written(tmp_path)
    rng, n_refused = np.random.default_rng(0), 0
    for file in (tmp_path / "run.json", tmp_path / "split_0000.json"):
        whole = file.read_bytes()
        for _ in range(100):
            spoilt = bytearray(whole)
            spoilt[rng.integers(len(whole))] ^= 1 << rng.integers(8)
            file.write_bytes(spoilt)
            try:
                found = read_back(tmp_path)
            except ValueError as error:
                n_refused += str(file) in str(error)
            else:
                assert found == (7, RECORDS)
        file.write_bytes(whole)
    assert n_refused > 190


DAMAGED = {
    "empty": "",
    "half": '{"sha256": "0", "content": {"ste',
    "another kind": "[1, 2]",
    "a number": "3",
    "null": "null",
    "other keys": '{"steps": []}',
    "no dict inside": '{"sha256": "0", "content": []}',
    "a list of its keys": '["sha256", "content"]',
    "a byte order mark": b"\xef\xbb\xbf" + b'{"sha256": "0", "content": {}}',
    "deep": "[" * 200_000,
    "deep inside": '{"sha256": "0", "content": ' + "[" * 50_000 + "]" * 50_000 + "}",
    "not UTF-8": b"\xff\xfe\x00",
    "large number": '{"sha256": "0", "content": ' + "9" * 5_000 + "}",
}


@pytest.mark.parametrize("file", ["run.json", "split_0000.json"])
@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_file_is_named(tmp_path: Path, file: str, kind: str) -> None:
    written(tmp_path)
    content = DAMAGED[kind]
    (tmp_path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=rf"{file} is damaged .* Remove it"):
        read_back(tmp_path)


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    written(tmp_path)
    file = tmp_path / "split_0000.json"
    whole = file.read_bytes()
    for length in range(0, len(whole) - 1, 7):
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"split_0000\.json is damaged"):
            read_back(tmp_path)


def test_a_folder_that_lacks_a_part_of_the_description_is_refused(tmp_path: Path) -> None:
    written(tmp_path)
    more = {"X": "abc", "n_instances": 2, "y": "def"}
    with pytest.raises(ValueError, match=r"another y: it has None.*Use another folder"):
        Checkpoint(tmp_path, more)


def test_nothing_is_written_through_links(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("mine")
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("run.json", "split_0000.json", "run.tmp", "split_0000.tmp"):
        (folder / name).symlink_to(tmp_path / "nowhere" if "json" in name else outside)
    written(folder)
    assert outside.read_text() == "mine"
    assert not (tmp_path / "nowhere").exists()
    assert read_back(folder) == (7, RECORDS)


def test_what_a_killed_run_left_half_written_is_removed(tmp_path: Path) -> None:
    written(tmp_path)
    (tmp_path / "split_0000_x1y2.tmp").write_text('{"steps": [')
    assert read_back(tmp_path) == (7, RECORDS)
    assert list(tmp_path.glob("*.tmp")) == []


def test_a_failed_write_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    written(tmp_path)
    with Checkpoint(tmp_path, {"X": "abc", "n_instances": 2}) as kept:
        kept.read(0, IDENTITY)
        with pytest.raises(TypeError):
            kept.write(0, IDENTITY | {"a set": {1}}, RECORDS)
    assert read_back(tmp_path) == (7, RECORDS)
    assert list(tmp_path.glob("*.tmp")) == []


# Several writers


def test_another_writer_is_named_where_no_lock_kept_it_away(tmp_path: Path) -> None:
    with Checkpoint(tmp_path, {"X": "abc", "n_instances": 2}) as kept:
        kept.seed(7, is_given=True)
        kept.read(0, IDENTITY)
        kept.write(0, IDENTITY, RECORDS[:1])
        content = (tmp_path / "split_0000.json").read_text()
        kept.write(0, IDENTITY, RECORDS[:2])
        (tmp_path / "split_0000.json").write_text(content)
        with pytest.raises(RuntimeError, match=r"Another writer is at work.*split_0000\.json"):
            kept.write(0, IDENTITY, RECORDS)


def test_a_run_inside_a_run_with_the_same_folder_is_refused(tmp_path: Path) -> None:
    def strategy(learner: Any, X_pool: Any, n_instances: int = 1) -> Any:
        small_curve(tmp_path, query_strategy=strategy)
        return np.arange(n_instances)

    with pytest.raises(RuntimeError, match=r"in use by a call around this one: .*run\.lock"):
        small_curve(tmp_path, query_strategy=strategy)


def test_threads_wait_for_each_other_and_read(tmp_path: Path) -> None:
    with warnings.catch_warnings(), ThreadPoolExecutor() as threads:
        warnings.simplefilter("ignore", UserWarning)
        results = [*threads.map(small_curve, [tmp_path] * 4)]
    assert len({str(result) for result in results}) == 1


def small_curve(folder: Path, **more: Any) -> dict[str, np.ndarray]:
    X, y = load_iris(return_X_y=True)
    options: dict[str, Any] = {"query_strategy": "random", "n_initial": 9, "n_instances": 5}
    options |= {"n_queries": 2, "cv": 3, "random_state": None, "checkpoint": folder}
    return active_learning_curve(GaussianNB(), X, y, **options | more)


def send_a_curve(sender: Connection, folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        sender.send({name: values.tolist() for name, values in small_curve(folder).items()})


@pytest.mark.kills
@pytest.mark.xdist_group("processes")
def test_pairs_of_writers_end_with_the_same_numbers(tmp_path: Path) -> None:
    """Without a random_state: the numbers of both are those that one of them has computed."""
    for pair in range(4):
        begun = [forked.begin(send_a_curve, tmp_path / str(pair)) for _ in range(2)]
        found = [receiver.recv() for _, receiver in begun]
        for process, _ in begun:
            process.join()
            assert process.exitcode == 0
        assert found[0] == found[1]
        assert not [f for f in os.listdir(tmp_path / str(pair)) if f.endswith(".tmp")]
        assert json.loads((tmp_path / str(pair) / "split_0002.json").read_text())
