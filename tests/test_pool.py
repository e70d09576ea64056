"""A pool in this process: places for its embedding, few rows, progress."""

from __future__ import annotations

import math
import re
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from skorch import NeuralNet, NeuralNetClassifier, NeuralNetRegressor
from torch import Tensor, nn

from skfishermask import FisherMaskSampler
from skfishermask.placement import LocalPlacement
from skfishermask.selection import HeadEmbedding, StoredEmbedding
from skfishermask.selection.storage import ScratchEmbedding, TensorEmbedding
from tests import nets
from tests.nets import SMALL
from tests.pairs import each_with_one

X, Y = nets.digits()
X_LABELED, Y_LABELED, X_POOL = X[:60], Y[:60], X[60:260]


def test_few_rows_choose_as_in_all_dimensions(net: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    options = SMALL | {"mask_fraction": 700, "embedding_dtype": "float64"}
    few, all_of_them = FisherMaskSampler(**options), FisherMaskSampler(**options)
    found = few(net, X_POOL[:12], 6, X_labeled=X_LABELED)
    monkeypatch.setattr("skfishermask.placement.MemoryEstimate.has_few_rows", False)
    expected = all_of_them(net, X_POOL[:12], 6, X_labeled=X_LABELED)
    assert (few.query_info_["dimensions"], all_of_them.query_info_["dimensions"]) == (648, 700)
    np.testing.assert_array_equal(found[0], expected[0])
    # The network's gradients are float32, and come in other batches.
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-7)
    one, other = (s.query_info_["objective"] for s in (few, all_of_them))
    np.testing.assert_allclose(one, other, rtol=1e-7)


def test_verbose_shows_progress(net: Any, capsys: pytest.CaptureFixture) -> None:
    FisherMaskSampler(verbose=1, **SMALL)(net, X_POOL, 5, X_labeled=X_LABELED)
    shown = capsys.readouterr()
    for step in (
        "Fisher diagonal",
        "Labelled samples",
        "Fisher embedding",
        "Fisher matrix",
        "Preparing",
        "Selection",
    ):
        assert re.search(rf"^{step}: (\d+)/\1, \d+\.\d s$", shown.err, re.MULTILINE)
    assert re.search(r"^Fisher embedding 0.00 GB, matrices .* \(memory\)$", shown.err, re.MULTILINE)
    # A line a step: it is no terminal that they go to.
    assert shown.err.count("\n") == 8
    assert shown.out == ""
    FisherMaskSampler(**SMALL)(net, X_POOL, 5, X_labeled=X_LABELED)
    assert capsys.readouterr() == ("", "")


class Counting(nn.Module):
    """Counts the samples that it has read, and stops like a Ctrl-C after a number of them."""

    def __init__(self, stops_at: float = math.inf) -> None:
        super().__init__()
        self.mlp = nets.mlp()
        self.n_read, self.stops_at = 0, stops_at

    def forward(self, x: Tensor) -> Tensor:
        self.n_read += len(x)
        if self.n_read > self.stops_at:
            raise KeyboardInterrupt
        return self.mlp(x)


def counting_net(stops_at: float = math.inf) -> Any:
    return NeuralNetClassifier(
        Counting(stops_at), criterion=nn.CrossEntropyLoss, **nets.options()
    ).initialize()


@pytest.mark.parametrize(
    ("share", "later", "storage"),
    [(0.5, 0, TensorEmbedding), (1e-9, 1 << 60, ScratchEmbedding), (1e-9, 0, ScratchEmbedding)],
)
def test_an_embedding_goes_where_it_was_told_to_go(
    net: Any, monkeypatch: pytest.MonkeyPatch, share: float, later: int, storage: Any
) -> None:
    """However much memory is free by then."""
    memory = SimpleNamespace(available=1 << 36)
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory)
    made: list[type] = []
    allocate = LocalPlacement.allocate

    def watched(placement: LocalPlacement, cleanup: ExitStack) -> StoredEmbedding:
        memory.available = later
        made.append(type(embedding := allocate(placement, cleanup)))
        return embedding

    monkeypatch.setattr(LocalPlacement, "allocate", watched)
    sampler = FisherMaskSampler(memory_share=share, **SMALL)
    sampler(net, X_POOL, 3)
    assert made == [storage]
    assert sampler.query_info_["embedding_storage"] == storage.storage_name


def test_too_large_for_memory_is_said_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    class Little:
        available = 10_000

    monkeypatch.setattr("psutil.virtual_memory", Little)
    net = counting_net()
    with pytest.raises(MemoryError, match=r"200 samples x 9 directions x 160 .* max_candidates"):
        FisherMaskSampler(**SMALL)(net, X_POOL, 3)
    assert net.module_.n_read < 100  # the first batch is compared with a prediction


SCRATCH = SMALL | {"memory_share": 1e-9}


@pytest.mark.parametrize("max_candidates", [None, 120])
def test_scratch_file_gives_the_same_batch(
    net: Any, max_candidates: int | None, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"max_candidates": max_candidates, "oversample": 1.5}
    expected = FisherMaskSampler(**SMALL | options)
    scratch = FisherMaskSampler(**SCRATCH | options, scratch_folder=tmp_path)
    one, other = (s(net, X_POOL, 20, X_labeled=X_LABELED) for s in (expected, scratch))
    assert scratch.query_info_["embedding_storage"] == "scratch file"
    np.testing.assert_array_equal(one[0], other[0])
    np.testing.assert_allclose(one[1], other[1], rtol=1e-9)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("moment", ["embedding", "selection"])
def test_scratch_file_is_gone_after_an_exception(
    moment: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    options = {"mask": "output_layer", "scratch_folder": tmp_path}
    sampler, process = FisherMaskSampler(**SCRATCH | options), psutil.Process()
    sampler(counting_net(), X_POOL, 3)
    assert sampler.query_info_["embedding_storage"] == "scratch file"
    n_open = process.num_fds()

    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    if moment == "selection":
        monkeypatch.setattr("skfishermask.pool.select", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sampler(counting_net(*[100] * (moment == "embedding")), X_POOL, 3)
    assert process.num_fds() == n_open
    assert list(tmp_path.iterdir()) == []


def test_too_large_for_the_scratch_folder_is_said_before_the_work(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Full:
        free = 1_000_000

    monkeypatch.setattr("shutil.disk_usage", lambda folder: Full)
    net = counting_net()
    with pytest.raises(MemoryError, match=r"0.00 GB in .*scratch_folder"):
        FisherMaskSampler(**SCRATCH, scratch_folder=tmp_path)(net, X_POOL, 3)
    assert net.module_.n_read < 100  # the first batch is compared with a prediction


def head_net(module: nn.Module, kind: str, dtype: str) -> tuple[Any, Any]:
    """Return a net with its own labels, trained for a moment, in float32 or float64."""
    torch.manual_seed(0)
    X, y = X_LABELED.astype(dtype), Y_LABELED
    if kind == "gaussian":
        y = y[:, None].repeat(3, 1).astype(dtype)
        net: Any = NeuralNetRegressor(module, **nets.options())
    elif kind == "bernoulli":
        y = (y[:, None] >> np.arange(4) & 1).astype(dtype)
        net = NeuralNet(module, criterion=nn.BCEWithLogitsLoss, **nets.options())
    else:
        n_classes = list(module.parameters())[-1].shape[0]
        net, y = (
            NeuralNetClassifier(module, criterion=nn.CrossEntropyLoss, **nets.options()),
            y % n_classes,
        )
    module.to(getattr(torch, dtype))
    return net.fit(X, y), X


def frozen_trunk() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 30).requires_grad_(False), nn.ReLU(), nn.Linear(30, 10))


# Network, kind of labels, and options of the sampler.
HEADS: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "three classes": (lambda: nn.Linear(64, 3), "classes", {"n_directions": None}),
    "ten classes": (lambda: nn.Linear(64, 10), "classes", {"n_directions": None}),
    "hundred classes": (
        lambda: nn.Linear(64, 100),
        "classes",
        {"mask_fraction": 1000, "n_directions": 20},
    ),
    "few directions": (lambda: nn.Linear(64, 10), "classes", {"n_directions": 6}),
    "a partial mask": (lambda: nn.Linear(64, 10), "classes", {"mask_fraction": 300}),
    "without bias": (lambda: nn.Linear(64, 10, bias=False), "classes", {}),
    "output layer": (nets.mlp, "classes", {"mask": "output_layer", "n_directions": None}),
    "a frozen trunk": (frozen_trunk, "classes", {"oversample": 1.5}),
    "several labels": (lambda: nn.Linear(64, 4), "bernoulli", {}),
    "numbers": (lambda: nn.Linear(64, 3), "gaussian", {}),
}


OTHERS, DTYPES = ("alone", "labelled", "target"), ("float32", "float64")


@pytest.mark.parametrize(("name", "setting"), each_with_one(HEADS, product(OTHERS, DTYPES)))
def test_a_linear_head_chooses_as_whole_embeddings(
    name: str, setting: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    others, dtype = setting
    make, kind, more = HEADS[name]
    net, X_labeled = head_net(make(), kind, dtype)
    pool = X_POOL.astype(dtype)
    pool[120:130] = pool[20:30]
    options = SMALL | {"mask_fraction": 1.0, "n_directions": None, "embedding_dtype": dtype} | more
    given: dict[str, Any] = {} if others == "alone" else {"X_labeled": X_labeled}
    given |= {"X_target": pool[:40]} if others == "target" else {}
    monkeypatch.setattr("skfishermask.pool._LEAST_SAVING", 0)
    monkeypatch.setattr("skfishermask.placement.MemoryEstimate.has_few_rows", False)
    made: list[HeadEmbedding] = []
    monkeypatch.setattr(HeadEmbedding, "write", watched(made, HeadEmbedding.write))
    sampler = FisherMaskSampler(**options)
    found = sampler(net, pool, 8, **given)
    assert made
    assert sampler.query_info_["embedding_bytes"] == made[0].n_bytes
    monkeypatch.setattr("skfishermask.pool.find_linear_head", lambda *args: None)
    expected = FisherMaskSampler(**options)(net, pool, 8, **given)
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-9 if dtype == "float64" else 1e-4)


def watched(made: list[HeadEmbedding], write: Any) -> Any:
    def note(embedding: HeadEmbedding, start: int, values: Tensor) -> None:
        made.append(embedding)
        write(embedding, start, values)

    return note


def test_a_batch_that_takes_another_way_is_embedded_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    class Two(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if len(x) < 20 else x @ self.weight.T + self.bias

    net, _ = head_net(Two(64, 10), "classes", "float32")
    options = SMALL | {"mask_fraction": 1.0, "n_directions": None}
    found = FisherMaskSampler(**options)(net, X_POOL, 5)
    monkeypatch.setattr("skfishermask.pool.find_linear_head", lambda *args: None)
    expected = FisherMaskSampler(**options)(net, X_POOL, 5)
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1], expected[1])
