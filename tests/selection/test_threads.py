from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from skfishermask.selection import batch, select_batch
from skfishermask.selection.threads import in_one_thread
from tests.problems import problem


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def threads_elsewhere() -> int:
    found: list[int] = []
    other = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    other.start()
    other.join()
    return found[0]


@pytest.mark.skipif(not torch.backends.openmp.is_available(), reason="needs OpenMP")
# Of the embedding (40 * 2 * 9 numbers), F and M^-1 (9 * 9 each), float64.
@pytest.mark.parametrize(
    ("cache_bytes", "with_labeled", "expected"),
    [(2**26, True, 1), (5760 + 648, False, 1), (5760 + 648, True, 2), (5760, False, 2)],
)
def test_small_problems_are_selected_from_in_one_thread(
    cache_bytes: int, with_labeled: bool, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "_CACHE_BYTES", cache_bytes)
    V, target = problem(40, 2, 9)
    seen: list[tuple[int, int]] = []

    def on_pick(count: int) -> None:
        seen.append((torch.get_num_threads(), threads_elsewhere()))

    labeled = {"fisher_labeled": target, "n_labeled": 3} if with_labeled else {}
    select_batch(V.double(), 5, target, on_pick=on_pick, **labeled)
    assert set(seen) == {(expected, 2)}
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_errors_leave_no_limit(error: type[BaseException]) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(error):
        in_one_thread(fail)
    assert torch.get_num_threads() == 2


def test_an_interrupt_while_the_limit_is_removed_does_not_keep_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from threadpoolctl import OpenMPController

    set_num_threads = OpenMPController.set_num_threads
    interrupts = [KeyboardInterrupt()]

    def interrupted(self: Any, n_threads: int) -> Any:
        if n_threads > 1 and interrupts:
            raise interrupts.pop()
        return set_num_threads(self, n_threads)

    monkeypatch.setattr(OpenMPController, "set_num_threads", interrupted)
    with pytest.raises(KeyboardInterrupt):
        in_one_thread(lambda: None)
    assert torch.get_num_threads() == 2
