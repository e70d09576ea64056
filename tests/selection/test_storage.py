from __future__ import annotations

import errno
import math
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from skfishermask.selection import select_batch
from skfishermask.selection.storage import (
    STORAGES,
    HostEmbedding,
    ScratchEmbedding,
    StoredEmbedding,
    TensorEmbedding,
    stored,
)

SHAPE = (23, 3, 5)


def filled(
    kind: type[StoredEmbedding], dtype: torch.dtype, device: str, folder: Path
) -> StoredEmbedding:
    if issubclass(kind, TensorEmbedding):
        where = device if kind is TensorEmbedding else "cpu"
        pinned = where == "cpu" and device == "cuda"
        room = torch.empty(SHAPE, dtype=dtype, device=where, pin_memory=pinned)
        # With its index, as the device of a net's parameters has it.
        storage: StoredEmbedding = kind(room, torch.empty(0, device=device).device)
    else:
        storage = kind(SHAPE, dtype, device, folder)
    values = embedding(dtype).to(device)
    # Not in order, and of another dtype than the storage.
    storage.write(9, values[9:].double())
    storage.write(0, values[:9].double())
    return storage


def embedding(dtype: torch.dtype) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).to(dtype)


KINDS = pytest.mark.parametrize("kind", STORAGES, ids=lambda kind: kind.storage_name)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("skfishermask.selection.storage._MIN_CHUNK_VECTORS", 1)
    monkeypatch.setattr("skfishermask.selection.storage._CUDA_CHUNK_FACTOR", 1)


@KINDS
@pytest.mark.parametrize("rows", [1, 7, 23, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_chunks_give_what_was_written(
    kind: type[StoredEmbedding],
    rows: int,
    dtype: torch.dtype,
    any_device: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    storage = filled(kind, dtype, any_device, tmp_path)
    monkeypatch.setattr(
        "skfishermask.selection.storage._CHUNK_BYTES", rows * 15 * storage.work_dtype.itemsize
    )
    # What a chunk holds is overwritten by the next one.
    parts, values = zip(*((part, v.clone()) for part, v in storage.chunks()), strict=True)
    assert [part.stop - part.start for part in parts] == [len(v) for v in values]
    n_chunks = math.ceil(23 / rows)
    assert max(map(len, values)) == math.ceil(23 / n_chunks)
    assert {v.dtype for v in values} == {torch.promote_types(dtype, torch.float32)}
    assert {v.device.type for v in values} == {any_device}
    assert torch.equal(torch.cat(values).cpu().to(dtype), embedding(dtype))
    assert storage.is_fetched == (
        kind is ScratchEmbedding or (kind is HostEmbedding and any_device != "cpu")
    )
    assert storage.n_bytes == 23 * 15 * dtype.itemsize


@pytest.mark.parametrize("shape", [(9000, 9, 1403), (700, 3, 22_000), (40, 3, 22_000), (0, 9, 50)])
def test_chunks_of_one_size_large_enough_to_multiply(
    shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("skfishermask.selection.storage._MIN_CHUNK_VECTORS", 200)
    storage = stored(torch.empty(shape, dtype=torch.float16, device="meta"))
    n, r, k = shape
    size = storage.chunk_rows
    assert size * r >= min(n * r, 200)
    assert size <= max(1, 2**23 / (r * k * 4), 2 * 200 / r)
    assert n == 0 or n - (math.ceil(n / size) - 1) * size > size / 2


@KINDS
def test_take(kind: type[StoredEmbedding], any_device: str, tmp_path: Path) -> None:
    storage = filled(kind, torch.float32, any_device, tmp_path)
    found = storage.take([22, 0, 7])
    assert found.device.type == any_device
    assert torch.equal(found.cpu(), embedding(torch.float32)[[22, 0, 7]])
    assert storage.take([]).shape == (0, 3, 5)


@KINDS
def test_columns(kind: type[StoredEmbedding], any_device: str, tmp_path: Path) -> None:
    storage = filled(kind, torch.bfloat16, any_device, tmp_path)
    for start, stop in ((0, 5), (2, 4), (4, 5)):
        found = storage.columns(start, stop)
        assert found.device.type == any_device
        assert torch.equal(found.cpu(), embedding(torch.bfloat16)[:, :, start:stop])


@pytest.mark.skipif(os.name != "posix", reason="elsewhere a temporary file has a name")
def test_scratch_file_has_no_name_that_a_killed_process_could_leave(tmp_path: Path) -> None:
    with ScratchEmbedding(SHAPE, torch.float32, "cpu", tmp_path) as storage:
        storage.write(0, embedding(torch.float32))
        assert list(tmp_path.iterdir()) == []


def test_scratch_file_is_closed_after_an_exception(tmp_path: Path) -> None:
    with (
        pytest.raises(KeyboardInterrupt),
        ScratchEmbedding(SHAPE, torch.float32, "cpu", tmp_path) as storage,
    ):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="closed file"):
        storage.take([0])


class Reluctant:
    """A file that moves a few bytes at a time, as a system may."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.seek = file.seek

    def write(self, view: memoryview) -> int:
        return self._file.write(view[:7])

    def readinto(self, view: memoryview) -> int:
        return self._file.readinto(view[:5])


def test_scratch_file_moves_bytes_piecemeal(tmp_path: Path) -> None:
    with ScratchEmbedding(SHAPE, torch.float32, "cpu", tmp_path) as storage:
        storage._file, own = Reluctant(storage._file), storage._file
        storage.write(0, embedding(torch.float32))
        assert torch.equal(storage.take(range(23)), embedding(torch.float32))
        storage._file = own


def test_reading_what_was_never_written_is_an_error(tmp_path: Path) -> None:
    with ScratchEmbedding(SHAPE, torch.float32, "cpu", tmp_path) as storage:
        storage.write(0, embedding(torch.float32)[:20])
        with pytest.raises(OSError, match="ended at row 21"):
            storage.take([21])


def test_leaving_chunks_early_leaves_no_thread(tmp_path: Path) -> None:
    with (
        pytest.MonkeyPatch.context() as patch,
        ScratchEmbedding(SHAPE, torch.float32, "cpu", tmp_path) as storage,
    ):
        patch.setattr("skfishermask.selection.storage._CHUNK_BYTES", 60)
        storage.write(0, embedding(torch.float32))
        before = threading.active_count()
        for part, _ in storage.chunks():
            if part.start == 3:
                break
        assert threading.active_count() == before


@pytest.mark.parametrize("speculative", [1, 4])
@pytest.mark.parametrize("oversample", [1.0, 1.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_selection_from_a_scratch_file(
    dtype: torch.dtype,
    oversample: float,
    speculative: int,
    device: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    V = torch.randn(70, 3, 20, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    fisher = torch.eye(20, dtype=torch.float64, device=device)
    options = {"oversample": oversample, "fisher_labeled": fisher, "n_labeled": 5}
    expected = select_batch(V, 15, fisher, **options)
    monkeypatch.setattr("skfishermask.selection.storage._CHUNK_BYTES", 7 * 60 * 4)
    monkeypatch.setattr("skfishermask.selection.storage._PRODUCT_BYTES", 1)
    monkeypatch.setattr("skfishermask.selection.batch._PICKS_PER_FETCH", speculative)
    with ScratchEmbedding(V.shape, dtype, device, tmp_path) as storage:
        storage.write(0, V)
        positions, gains = select_batch(storage, 15, fisher, **options)
    assert torch.equal(positions, expected[0])
    torch.testing.assert_close(gains, expected[1], rtol=1e-10, atol=0)


def test_stored_leaves_storage_alone() -> None:
    values = torch.ones(2, 1, 3)
    storage = stored(values)
    assert stored(storage) is storage
    assert storage.take([1]).shape == (1, 1, 3)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_told_with_its_folder_and_what_to_do(tmp_path: Path, number: int) -> None:
    class Full:
        """Has room for the first 100 bytes."""

        def __init__(self) -> None:
            self.left = 100

        def seek(self, offset: int) -> None: ...

        def close(self) -> None: ...

        def write(self, view: memoryview) -> int:
            if not self.left:
                raise OSError(number, os.strerror(number))
            moved = min(len(view), self.left)
            self.left -= moved
            return moved

    with ScratchEmbedding((10, 2, 5), torch.float32, "cpu", tmp_path) as storage:
        storage._file.close()
        storage._file = Full()
        storage.write(0, torch.ones(2, 2, 5))
        with pytest.raises(OSError, match=r"0\.00 GB .* Set scratch_folder to .*mask") as caught:
            storage.write(2, torch.ones(1, 2, 5))
    assert caught.value.errno == number
    assert caught.value.filename == str(tmp_path)
