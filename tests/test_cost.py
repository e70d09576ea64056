"""What a query is expected to take."""

from __future__ import annotations

import itertools

import pytest
import torch

from skfishermask.progress import Progress
from skfishermask.selection import Needs, expected_seconds

CPU = torch.device("cpu")


def needs(n: int, r: int = 2, k: int = 40, n_labeled: int = 0) -> Needs:
    return Needs(n, r, k, torch.float32, n_labeled)


@pytest.fixture
def _a_second_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have everything that is timed take one second."""
    monkeypatch.setattr("time.perf_counter", itertools.count().__next__)


# With two rows each 256 candidates are made up, and four picks are timed.
@pytest.mark.usefixtures("_a_second_each")
def test_steps_are_scaled_to_all_candidates_and_picks() -> None:
    found = expected_seconds(needs(25_600), 10, CPU)
    # Of the two quadratic forms that were timed only one is computed: M_0 is a multiple of I.
    assert found["Preparing"] == pytest.approx(100 / 2)
    # Beside those 256 candidates, as many as fill the memory that is timed: all.
    # The products of six steps are in float64, and count twice.
    assert found["Selection"] == pytest.approx(10 / 4 + 16 * (25_600 - 256) / 25_600)
    # A second for 256 candidates' two products with k x k matrices: F takes half of one for all.
    flop = 1 / (256 * 2 * 2 * 40**2)
    assert found["Fisher matrix"] == pytest.approx(flop * 25_600 * 2 * 40**2 / 2)


@pytest.mark.usefixtures("_a_second_each")
def test_labelled_samples_cost_a_quadratic_form_and_an_inverse() -> None:
    found = expected_seconds(needs(25_600, n_labeled=7), 10, CPU, n_labeled=7)
    flop = 1 / (256 * 2 * 2 * 40**2)
    assert found["Preparing"] == pytest.approx(100 + 5 * 40**3 * flop)


@pytest.mark.usefixtures("_a_second_each")
def test_few_rows_are_worked_with_in_their_space() -> None:
    # Six rows of candidates and four of labelled samples, in 100 dimensions.
    found = expected_seconds(needs(3, k=100, n_labeled=2), 1, CPU, n_labeled=2)
    flop = 1 / (3 * 2 * 2 * 6**2)
    assert found["Fisher matrix"] == pytest.approx(flop * (2 * 100 * 10**2 + 10**3 / 3))
    coordinates = 2 * 10**3 + 10 * 6 * (10 + 6 * 6)
    assert found["Preparing"] == pytest.approx(1 / 2 + flop * coordinates)


@pytest.mark.usefixtures("_a_second_each")
def test_what_is_picked_forward_counts() -> None:
    found = expected_seconds(needs(1000), 10, CPU, oversample=1.5)
    assert found["Selection"] == pytest.approx(15 / 4 + 21 * (1000 - 256) / 1000)
    # Of two candidates no more than two picks are timed.
    assert expected_seconds(needs(2), 1, CPU)["Selection"] == pytest.approx(1 / 2)


@pytest.mark.parametrize("n_labeled", [0, 3])
@pytest.mark.parametrize(
    ("n", "r", "k"), [(1, 1, 1), (1, 1, 5), (4, 3, 20), (30, 3, 20), (5, 3, 16)]
)
def test_any_size(n: int, r: int, k: int, n_labeled: int) -> None:
    found = expected_seconds(needs(n, r, k, n_labeled), 1, CPU, n_labeled=n_labeled)
    assert min(found.values()) > 0


def test_the_first_batch_does_not_count_for_the_speed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    # Begun; 10 of 100 after 10 s; 11 after half a second more; 20 after 3 s.
    clock = iter([100.0, 110.0, 110.5, 113.0, 120.0])
    monkeypatch.setattr("time.perf_counter", clock.__next__)
    progress = Progress(True, torch.device("cpu"))
    progress.seconds["diagonal"] = 4.0
    progress.expect({"Selection": 7300.0, "Preparing": 150.0}, "little memory")
    for n in (10, 11):
        progress.embedded(n, 100)
        assert capsys.readouterr().err == ""
    for n in (20, 30):
        progress.embedded(n, 100)
    assert capsys.readouterr().err == (
        "Expected: Fisher diagonal 4.0 s, Fisher embedding 37.0 s, Selection 2.0 h, "
        "Preparing 2.5 min; little memory.\n"
    )
