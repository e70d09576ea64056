"""Where embeddings go, by how much memory is free."""

from __future__ import annotations

import dataclasses
import warnings
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from skfishermask.selection.storage import Needs, Room, ScratchEmbedding, TensorEmbedding

# 1,600 bytes of embeddings, 768 of matrices and 9,600 of states: see the first test.
NEEDS = Needs(n=50, r=2, k=4, dtype=torch.float32)


def free(monkeypatch: pytest.MonkeyPatch, cuda: int, kept: int, host: int, disk: int) -> None:
    """Let so many bytes be free; of those on CUDA, PyTorch keeps some for itself."""
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (cuda - kept, 10**12))
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda device: kept + 1000)
    monkeypatch.setattr("torch.cuda.memory_allocated", lambda device: 1000)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=host))
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=disk))


def test_needs() -> None:
    assert (NEEDS.embedding, NEEDS.matrices, NEEDS.states) == (1600, 768, 9600)


def test_what_reading_holds_counts_beside_the_embedding(monkeypatch: pytest.MonkeyPatch) -> None:
    needs = dataclasses.replace(NEEDS, reading=20_000)
    room = Room(torch.device("cpu"), share=0.5, folder=None)
    for host, expected in [(21_600, "memory"), (21_599, "scratch file")]:
        free(monkeypatch, 0, 0, host, 1_600)
        assert room.place(needs) == expected


@pytest.mark.parametrize(
    ("device", "cuda", "kept", "host", "disk", "expected"),
    [
        ("cpu", 0, 0, 11_968, 0, "memory"),
        ("cpu", 0, 0, 11_967, 1_600, "scratch file"),  # Not all of it at once.
        ("cpu", 0, 0, 10_368, 1_600, "scratch file"),
        ("cpu", 0, 0, 10_367, 1_600, None),
        ("cpu", 0, 0, 10_368, 1_599, None),
        ("cuda", 11_968, 0, 0, 0, "memory"),
        ("cuda", 11_968, 8_000, 0, 0, "memory"),
        ("cuda", 10_368, 0, 3_200, 0, "host memory"),
        ("cuda", 10_368, 0, 3_199, 1_600, "scratch file"),
        ("cuda", 10_367, 0, 10**9, 10**9, None),
    ],
)
def test_place(
    device: str,
    cuda: int,
    kept: int,
    host: int,
    disk: int,
    expected: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    free(monkeypatch, cuda, kept, host, disk)
    room = Room(torch.device(device), share=0.5, folder=None)
    if expected is None:
        message = "50 candidates x 2 directions x 4 parameters needs 0.00 GB"
        with pytest.raises(MemoryError, match=message):
            room.place(NEEDS)
    else:
        assert room.place(NEEDS) == expected


@pytest.mark.parametrize(
    ("place", "kind"), [("memory", TensorEmbedding), ("scratch file", ScratchEmbedding)]
)
def test_make(place: str, kind: type, tmp_path: Path) -> None:
    room = Room(torch.device("cpu"), share=0.5, folder=str(tmp_path))
    with ExitStack() as cleanup:
        made = room.make(place, NEEDS, cleanup)
        made.write(0, torch.arange(400.0).view(50, 2, 4))
        assert (type(made), made.shape, made.dtype) == (kind, (50, 2, 4), torch.float32)
        assert made.take([49])[0, 1, 3] == 399
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [0, 2])
def test_pinned_memory_is_released_and_may_fail(
    error: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # CUDA's runtime is pretended.
    called: list[tuple[object, ...]] = []

    class Runtime:
        def cudaHostRegister(self, pointer: int, size: int, flags: int) -> int:
            called.append(("register", pointer, size))
            return error

        def cudaHostUnregister(self, pointer: int) -> None:
            called.append(("unregister", pointer))

    monkeypatch.setattr("torch.cuda.cudart", Runtime)
    monkeypatch.setattr("torch.cuda.synchronize", lambda device: called.append(("wait", device)))
    device = torch.device("cuda", 1)
    with ExitStack() as cleanup, warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        made = Room(device, share=0.5, folder=None).make("host memory", NEEDS, cleanup)
        assert (made.device, made.shape) == (device, (50, 2, 4))
        pointer = made._values.data_ptr()
        assert called == [("register", pointer, 1600)]
    if error:
        [warning] = told
        assert "could not be pinned for cuda:1 (CUDA error 2)" in str(warning.message)
        assert len(called) == 1
    else:
        assert not told
        assert called[1:] == [("wait", device), ("unregister", pointer)]
