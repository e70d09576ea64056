"""What the demo says at its end follows from its numbers."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(scope="module")
def quickstart():
    path = Path(__file__).parents[1] / "examples/quickstart.py"
    spec = importlib.util.spec_from_file_location("quickstart", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RANDOM = np.array([[0.5, 0.6, 0.8], [0.5, 0.7, 0.8]])


def seen(quickstart, ahead) -> str:
    gained = np.column_stack([np.zeros(2), ahead, ahead])
    curves = {"random": RANDOM, "FisherMask": RANDOM + gained}
    return quickstart.what_was_seen([20, 40, 60], curves)


def test_a_difference_beyond_the_spread_is_a_difference(quickstart) -> None:
    sentence = seen(quickstart, [0.1, 0.12])
    assert "was more accurate than random sampling: by +11.0 points" in sentence
    assert "standard error 1.0; +10.0 to +12.0 in 2 seeds" in sentence
    # Its mean curve is 0.5, 0.76, 0.91: 0.8 lies 4 / 15 of the way from 40 to 60 labels.
    assert "with 45 labels as accurate as random with 60" in sentence


def test_a_difference_within_the_spread_is_none(quickstart) -> None:
    assert "could not be told from random sampling" in seen(quickstart, [0.1, -0.02])


def test_a_loss_is_a_loss(quickstart) -> None:
    sentence = seen(quickstart, [-0.1, -0.12])
    assert "was less accurate than random sampling: by -11.0 points" in sentence
    assert "as accurate as" not in sentence
