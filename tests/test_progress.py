"""Bars on a terminal, lines in a log, and nothing at all where nothing was asked for."""

from __future__ import annotations

import contextlib
import io
import itertools
import threading

import pytest
import torch

from skfishermask.progress import Progress, progress_bar
from tests import forked


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


def unasked() -> tuple[int, str]:
    """Return the number of threads, and what was written."""
    progress, written = Progress(False, torch.device("cpu")), io.StringIO()
    with contextlib.redirect_stderr(written), contextlib.redirect_stdout(written):
        with progress.bar(3, "Selection", "pick") as bar:
            bar.update(3)
        assert list(progress.each([1, 2], 2, "Embedding")) == [1, 2]
    return threading.active_count(), written.getvalue()


@pytest.mark.xdist_group("processes")
def test_nothing_is_shown_and_no_thread_started_unasked() -> None:
    assert forked.run(unasked) == (0, (1, ""))
