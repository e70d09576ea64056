"""Bars on a terminal, lines in a log, and nothing at all where nothing was asked for."""

from __future__ import annotations

import io
import itertools
import subprocess
import sys

import pytest

from skfishermask.progress import progress_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch, n: int = 500) -> str:
    monkeypatch.setattr("sys.stderr", stream)
    with progress_bar(n, "Selection", "pick", is_shown=True) as bar:
        for _ in range(n):
            bar.update(1)
    return stream.getvalue()


def test_a_terminal_has_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "Selection: 100%" in shown(Terminal(), monkeypatch)


def test_a_log_has_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(io.StringIO(), monkeypatch)
    assert text.startswith("Selection: 500/500, ")
    assert text.count("\n") == 1
    assert "\r" not in text


def test_a_log_of_a_long_step_has_a_line_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(0, 25)  # seconds; each update looks once, each line once more
    monkeypatch.setattr("time.perf_counter", clock.__next__)
    lines = shown(io.StringIO(), monkeypatch, 9).splitlines()
    assert [line.split(",")[0] for line in lines] == [f"Selection: {n}/9" for n in (3, 6, 9)]


def test_nothing_is_shown_and_no_thread_started_unasked() -> None:
    code = (
        "import threading, torch; from skfishermask.progress import Progress\n"
        "progress = Progress(False, torch.device('cpu'))\n"
        "with progress.bar(3, 'Selection', 'pick') as bar: bar.update(3)\n"
        "assert list(progress.each([1, 2], 2, 'Embedding')) == [1, 2]\n"
        "print(threading.active_count())"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (found.stdout.strip(), found.stderr) == ("1", "")
