"""Where embeddings go, by how much memory is free."""

from __future__ import annotations

import dataclasses
import warnings
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from skfishermask.placement import MemoryEstimate, place
from skfishermask.selection import Location
from skfishermask.selection.storage import HostEmbedding, ScratchEmbedding, TensorEmbedding

# 1,600 bytes of embeddings, 1,152 of matrices, 12,800 of chunks and 9,600 of gains.
ESTIMATE = MemoryEstimate(n=50, r=2, k=4, dtype=torch.float32)
BESIDE = 1_152 + 12_800 + 9_600


def free(monkeypatch: pytest.MonkeyPatch, cuda: int, kept: int, host: int, disk: int) -> None:
    """Pretend that these bytes are free; of those on CUDA, PyTorch keeps some for itself."""
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (cuda - kept, 10**12))
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda device: kept + 1000)
    monkeypatch.setattr("torch.cuda.memory_allocated", lambda device: 1000)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=host))
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=disk))


def where(device: str, folder: str | None = None) -> Location:
    return Location(torch.device(device), 0.5, folder)


def test_estimate() -> None:
    assert ESTIMATE.embedding_bytes == 1600
    assert ESTIMATE.matrices_bytes + ESTIMATE.gains_bytes == BESIDE


@pytest.mark.parametrize(("uses_row_space", "dimensions"), [(True, 20), (False, 100)])
def test_few_rows_are_kept_together_with_the_other_samples(
    uses_row_space: bool, dimensions: int
) -> None:
    estimate = MemoryEstimate(6, 2, 100, torch.float16, 4, uses_row_space=uses_row_space)
    assert estimate.dimensions == dimensions
    n_embedded = 10 if uses_row_space else 6
    assert estimate.embedding_bytes == n_embedded * 2 * 100 * 2
    assert estimate.matrices_bytes >= 8 * 8 * dimensions**2
    # As many rows as columns are not few.
    assert MemoryEstimate(46, 2, 100, torch.float16, 4).dimensions == 100


def test_what_reading_holds_counts_beside_the_embedding(monkeypatch: pytest.MonkeyPatch) -> None:
    estimate = dataclasses.replace(ESTIMATE, reading_bytes=40_000)
    for host, expected in [(41_600, "memory"), (41_599, "scratch file")]:
        free(monkeypatch, 0, 0, host, 1_600)
        assert place(estimate, where("cpu")).storage_name == expected


@pytest.mark.parametrize(
    ("device", "cuda", "kept", "host", "disk", "expected"),
    [
        ("cpu", 0, 0, BESIDE + 1_600, 0, "memory"),
        ("cpu", 0, 0, BESIDE + 1_599, 1_600, "scratch file"),  # Not all of it at once.
        ("cpu", 0, 0, BESIDE, 1_600, "scratch file"),
        ("cpu", 0, 0, BESIDE - 1, 1_600, None),
        ("cpu", 0, 0, BESIDE, 1_599, None),
        ("cuda", BESIDE + 1_600, 0, 0, 0, "memory"),
        ("cuda", BESIDE + 1_600, 8_000, 0, 0, "memory"),
        ("cuda", BESIDE, 0, 3_200, 0, "host memory"),
        ("cuda", BESIDE, 0, 3_199, 1_600, "scratch file"),
        ("cuda", BESIDE - 1, 0, 10**9, 10**9, None),
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
    if expected is None:
        message = "50 samples x 2 directions x 4 parameters needs 0.00 GB"
        with pytest.raises(MemoryError, match=message):
            place(ESTIMATE, where(device))
    else:
        assert place(ESTIMATE, where(device)).storage_name == expected


@pytest.mark.parametrize(
    ("disk", "kind"), [(0, TensorEmbedding), (1_600, ScratchEmbedding)], ids=["memory", "file"]
)
def test_allocate(disk: int, kind: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free(monkeypatch, 0, 0, BESIDE + (0 if disk else 1_600), disk)
    placement = place(ESTIMATE, where("cpu", str(tmp_path)))
    # For any memory that is free by then: it was decided.
    free(monkeypatch, 0, 0, 0, 0)
    with ExitStack() as cleanup:
        made = placement.allocate(cleanup)
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
        location = Location(device, 0.5, None)
        made = HostEmbedding.allocate((50, 2, 4), torch.float32, location, cleanup)
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
