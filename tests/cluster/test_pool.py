"""Queries on a Dask cluster: what one machine would choose."""

from __future__ import annotations

import copy
import gc
import re
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from skorch import NeuralNetClassifier
from torch import Tensor, nn
from torch.utils.data import default_collate

from skfishermask import PUBLISHED, FisherMaskSampler, fisher_mask_sampling
from tests.cluster.local import (
    UNEVEN,
    DoubleNet,
    assert_same,
    chosen_by,
    cluster,
    da,
    dask,
    distributed,
    sampler,
    tasks,
)
from tests.nets import digits, fitted, logits_net, mlp

pytestmark = pytest.mark.xdist_group("processes")


# --- The same choice ------------------------------------------------------------------


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"oversample": 1.5, "n_mask_samples": 100},
        pytest.param({"n_directions": 0.9}, marks=pytest.mark.slow),
        pytest.param({"coverage_share": 0.5}, marks=pytest.mark.slow),
        {"max_candidates": 200, "target": "identity", "use_labeled": False},
        {"mask": "output_layer", "batch_size": 7},
        pytest.param({"mask": "relative"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_same_choice(
    processes: Any, net: Any, pool: np.ndarray, labeled: np.ndarray, more: dict[str, Any]
) -> None:
    here, there = sampler(**more), sampler(**more)
    expected = chosen_by(here, net, pool, labeled)
    assert_same(chosen_by(there, net, da.from_array(pool, UNEVEN), labeled), expected)
    assert there.query_info_["n_workers"] == 2
    same = ["n_candidates", "n_labeled", "n_directions", "mask_size"]
    # Workers have embeddings also where a single process has the inputs of a linear head.
    same += ["embedding_bytes"] if "mask" not in more else []
    for name in same:
        assert there.query_info_[name] == here.query_info_[name]
    assert tasks(processes) == []


def test_same_choice_from_a_single_chunk(
    threads: Any, net: Any, pool: np.ndarray, labeled: np.ndarray
) -> None:
    expected = chosen_by(sampler(), net, pool[:30], labeled)
    found = chosen_by(sampler(), net, da.from_array(pool[:30], chunks=-1), labeled)
    assert_same(found, expected)


@pytest.mark.parametrize("inputs", ["inputs", "0"])
def test_same_coverage(
    threads: Any, net: Any, pool: np.ndarray, labeled: np.ndarray, inputs: str
) -> None:
    options = {"coverage_share": 1, "coverage_inputs": inputs}
    here, there = sampler(**options), sampler(**options)
    expected = chosen_by(here, net, pool, labeled)
    assert_same(chosen_by(there, net, da.from_array(pool, UNEVEN), labeled), expected, rtol=1e-5)
    assert there.query_info_["coverage_inputs"] == here.query_info_["coverage_inputs"]
    assert there.query_info_["bytes_moved"]["predictions"] > 0


def test_same_choice_with_target_samples(
    threads: Any, net: Any, pool: np.ndarray, labeled: np.ndarray
) -> None:
    target = digits()[0][60:100].astype("float64")
    asked = {"X_labeled": labeled, "X_target": target}
    expected = sampler()(net, pool, 12, **asked)
    assert expected[0].tolist() != chosen_by(sampler(), net, pool, labeled)[0].tolist()
    assert_same(sampler()(net, da.from_array(pool, UNEVEN), 12, **asked), expected)


@pytest.mark.parametrize("n_workers", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_same_choice_with_other_numbers_of_workers(
    net: Any, pool: np.ndarray, labeled: np.ndarray, n_workers: int
) -> None:
    expected = chosen_by(sampler(), net, pool, labeled)
    with cluster(n_workers, processes=False):
        found = sampler()
        assert_same(chosen_by(found, net, da.from_array(pool, UNEVEN), labeled), expected)
    assert found.query_info_["n_workers"] == n_workers


def test_same_choice_in_float32(threads: Any) -> None:
    X = digits()[0]
    net = fitted(logits_net())
    here, there = (FisherMaskSampler(random_state=0) for _ in range(2))
    pool = X[100:500]
    expected = here(net, pool, 12, X_labeled=X[:60])
    assert_same(there(net, da.from_array(pool, (90, 64)), 12, X_labeled=X[:60]), expected, 1e-4)


def test_every_way_of_calling(threads: Any, pool: np.ndarray, labeled: np.ndarray) -> None:
    from functools import partial

    X, y = labeled.astype("float32"), digits()[1][:60]
    chunked = da.from_array(pool.astype("float32"), UNEVEN)
    fishermask = FisherMaskSampler(logits_net(), random_state=0).fit(X, y)
    indices, instances, gains = fishermask.query(chunked, 6, X_labeled=X, return_metrics=True)
    np.testing.assert_array_equal(instances.compute(), pool[indices].astype("float32"))
    bare = fisher_mask_sampling(fishermask, chunked, 6, X_labeled=X, random_state=0)
    assert_same(bare, (indices, gains))
    modal = pytest.importorskip("skfishermask.modal")
    pytest.importorskip("modAL")
    strategy = partial(fisher_mask_sampling, random_state=0)
    torch.manual_seed(0)
    learner = modal.ActiveLearner(
        fishermask.estimator_, query_strategy=strategy, X_training=X, y_training=y
    )
    found, chosen = learner.query(chunked, n_instances=6)
    assert isinstance(chosen, da.Array)
    assert chosen.shape == (6, 64)
    assert len(set(found)) == 6


def test_transformers_run_where_the_chunks_are(threads: Any, pool: np.ndarray) -> None:
    X, y = digits()
    pipeline = make_pipeline(StandardScaler(), logits_net()).fit(X[:60], y[:60])
    single = pool.astype("float32")
    here, there = (FisherMaskSampler(random_state=0) for _ in range(2))
    expected = here(pipeline, single, 10)
    assert_same(there(pipeline, da.from_array(single, UNEVEN), 10), expected, 1e-4)


class Halved(DoubleNet):
    """An encoder and a head of its own; halves the digits."""

    def initialize_module(self) -> Halved:
        super().initialize_module()
        self.head_ = nn.Linear(12, 10).double()
        # Tied to a part of the encoder, which it must remain on the workers.
        self.head_.bias = self.module_[2].bias
        return self

    def infer(self, x: Any, **fit_params: Any) -> Any:
        return self.head_(super().infer(x / 2, **fit_params))


class Scores(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = mlp()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"scores": self.mlp(x)}


@pytest.mark.parametrize(
    ("net", "more"),
    [
        (
            Halved(nn.Sequential(*mlp(), nn.Linear(10, 12)), criterion=nn.CrossEntropyLoss),
            {"n_directions": 0.8},
        ),
        pytest.param(
            DoubleNet(Scores, criterion=nn.CrossEntropyLoss),
            {"to_logits": lambda z: z["scores"]},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            DoubleNet(mlp(), criterion=nn.CrossEntropyLoss, compile=True, compile__backend="eager"),
            {},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["infer", "to_logits", "compiled"],
)
def test_what_the_net_infers_is_read_on_the_workers(
    processes: Any, net: Any, more: dict[str, Any], pool: np.ndarray, labeled: np.ndarray
) -> None:
    net = net.set_params(verbose=0).initialize()
    here, there = sampler(**more), sampler(**more)
    expected = chosen_by(here, net, pool, labeled, 10)
    assert_same(chosen_by(there, net, da.from_array(pool, UNEVEN), labeled, 10), expected)
    assert list(there.mask_.indices) == list(here.mask_.indices)


class Tagger(nn.Module):
    """A label for each of eight positions."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.output = nn.Linear(8, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(torch.tanh(self.hidden(x.view(-1, 8, 8)))).transpose(1, 2)


@pytest.mark.parametrize(
    "more",
    [
        {"n_directions": 3, "n_mask_samples": 90, "max_candidates": 200},
        pytest.param({"n_directions": None, "batch_size": 7}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_same_choice_where_positions_have_labels(
    threads: Any, pool: np.ndarray, labeled: np.ndarray, more: dict[str, Any]
) -> None:
    net = DoubleNet(Tagger, criterion=nn.CrossEntropyLoss, verbose=0).initialize()
    here, there = (sampler(mask_fraction=20, **more) for _ in range(2))
    expected = chosen_by(here, net, pool, labeled)
    assert_same(chosen_by(there, net, da.from_array(pool, UNEVEN), labeled), expected)
    assert there.query_info_["n_directions"] == here.query_info_["n_directions"]


def test_a_scheduler_that_was_asked_for_is_used(threads: Any, net: Any, pool: np.ndarray) -> None:
    found = sampler()
    with dask.config.set(scheduler="sync"):
        found(net, da.from_array(pool, UNEVEN), 3)
    assert "n_workers" not in found.query_info_


# --- What it tells --------------------------------------------------------------------


def test_what_is_told(
    threads: Any, net: Any, pool: np.ndarray, labeled: np.ndarray, capsys: Any
) -> None:
    asked = sampler(verbose=1)
    chosen_by(asked, net, da.from_array(pool, UNEVEN), labeled, 60)
    info = asked.query_info_
    assert set(info["seconds"]) == {"diagonal", "embedding", "fisher", "selection", "total"}
    assert info["embedding_storage"] == "cluster"
    assert (info["n_workers"], info["n_chunks"]) == (2, 5)
    assert info["round_trips"] < 60 / 4
    # All of them for every request with steps, and there are few of these.
    assert info["candidates_read"] in range(len(pool), 60 // 4 * len(pool), len(pool))
    k, moved = info["mask_size"], info["bytes_moved"]
    assert moved["fisher"] == 8 * k * k
    assert moved["start"] == 2 * 2 * 8 * k * k
    assert set(moved) == {"network", "diagonal", "fisher", "start", "selection"}
    bars = capsys.readouterr().err
    for text in ("Fisher diagonal", "Fisher embedding", "Selection"):
        assert re.search(rf"^{text}: (\d+)/\1, ", bars, re.MULTILINE)


def test_what_crosses_the_network_does_not_grow_with_the_pool(
    threads: Any, net: Any, pool: np.ndarray, labeled: np.ndarray
) -> None:
    larger = np.concatenate(
        [pool, *(pool + np.random.default_rng(0).normal(0, 0.1, (5, *pool.shape)))]
    )
    sizes = []
    for X in (pool, larger):
        asked = sampler()
        asked(net, da.from_array(X, (200, 64)), 12, X_labeled=labeled)
        sizes.append(asked.query_info_["bytes_moved"]["selection"])
    assert sizes[1] < 3 * sizes[0]
    assert sizes[1] < asked.query_info_["embedding_bytes"] / 4


def test_this_process_holds_no_chunk_and_no_embedding(processes: Any) -> None:
    # One direction: quick to embed.
    net = DoubleNet(nn.Linear(64, 2), criterion=nn.CrossEntropyLoss, verbose=0).initialize()
    rng = np.random.default_rng(0)

    def chunk(block_info: Any = None) -> np.ndarray:
        start = block_info[None]["array-location"][0][0]
        return np.random.default_rng(start).random((4_000, 64))

    X = da.map_blocks(chunk, chunks=((4_000,) * 2, (64,)), dtype="float64", meta=rng.random((0, 0)))
    largest = 0

    def arrays() -> list[Any]:
        return [x for x in gc.get_objects() if type(x) in (np.ndarray, Tensor)]

    def watch(name: str) -> None:
        """Look at all arrays and tensors whenever a task starts, but those of other tests."""
        nonlocal largest
        largest = max(largest, *(x.nbytes for x in arrays() if id(x) not in others))

    asked = FisherMaskSampler(random_state=0, mask="all")
    others = {id(x): x for x in arrays()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "on_start", watch)
        asked(net, X, 5)
    # A chunk takes 2 MB, its embeddings as much; what is here are a few hundred rows of these.
    assert 0 < largest < 4_000 * 64 * 8


# --- Faults ---------------------------------------------------------------------------


def test_data_of_the_user_stay(threads: Any, net: Any, pool: np.ndarray) -> None:
    X = da.from_array(pool, UNEVEN).persist()
    distributed.wait(X)
    sampler()(net, X, 3)
    assert len(distributed.futures_of(X)) == 5
    np.testing.assert_array_equal(X.compute(), pool)


# --- Errors ---------------------------------------------------------------------------


def test_bad_rows_are_named(threads: Any, net: Any, pool: np.ndarray) -> None:
    bad = pool.copy()
    bad[270, 3] = np.inf
    X = da.from_array(bad, UNEVEN)
    with pytest.raises(ValueError, match="X_pool contains NaN or infinity, first in row 270"):
        sampler()(net, X, 5)
    assert tasks(threads) == []


def test_a_short_batch_is_named(threads: Any, net: Any, pool: np.ndarray) -> None:
    def readable_only(samples: list[Any]) -> Any:
        return default_collate([sample for sample in samples if sample[0][0] != 7])

    bad, short = pool.copy(), copy.deepcopy(net)
    bad[270, 0] = 7
    short.iterator_valid__collate_fn = readable_only
    with pytest.raises(ValueError, match=r"in batch \d of X_pool \(row \d+ to row \d+\), found"):
        sampler()(short, da.from_array(bad, UNEVEN), 5)
    assert tasks(threads) == []


def test_an_output_that_is_not_finite_is_named(threads: Any) -> None:
    class Overflow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(64, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) / (x[:, :1] != 7)

    net = NeuralNetClassifier(Overflow, criterion=nn.CrossEntropyLoss, verbose=0).initialize()
    X = digits()[0][:300].copy()
    X[123, 0] = 7
    with pytest.raises(ValueError, match="NaN or infinite for row 123 of X_pool"):
        FisherMaskSampler(mask="output_layer")(net, da.from_array(X, (50, 64)), 5)


class Rooted(nn.Module):
    """Finite outputs with gradients that are NaN where the first pixel is 7: a root of zero."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.output = nn.Linear(64, 5), nn.Linear(1, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = self.hidden(x) * (x[:, :1] != 7)
        return self.output(z.square().sum(1, keepdim=True).sqrt())


@pytest.mark.parametrize("mask", ["global", "all"])
@pytest.mark.parametrize("max_candidates", [None, 280])
def test_gradients_that_are_not_finite_are_named(
    threads: Any, mask: str, max_candidates: int | None
) -> None:
    net = NeuralNetClassifier(Rooted, criterion=nn.CrossEntropyLoss, verbose=0).initialize()
    X = digits()[0][:300].copy()
    X[123, 0] = 7
    asked = FisherMaskSampler(
        **PUBLISHED | {"mask": mask, "max_candidates": max_candidates, "random_state": 0}
    )
    with pytest.raises(ValueError, match="gradients are NaN or infinite for row 123 of X_pool"):
        asked(net, da.from_array(X, (50, 64)), 5)
    assert tasks(threads) == []


def test_too_little_memory_is_found_before_the_work(net: Any, pool: np.ndarray) -> None:
    # A worker that has too little memory for itself is not to stop over that.
    shares = ("target", "spill", "pause", "terminate")
    with (
        dask.config.set({f"distributed.worker.memory.{share}": False for share in shares}),
        cluster(2, processes=False, memory_limit="500kB") as client,
    ):
        started: list[str] = []
        client.on_start = started.append
        message = r"Together they may take 0\.00 GB"
        with pytest.raises(MemoryError, match=message):
            sampler()(net, da.from_array(pool, UNEVEN), 5)
    assert started == []


@pytest.mark.parametrize(
    ("rows", "chunks", "options"),
    [
        (8, 4, {}),
        # Fewer rows still, of random combinations; chunks of one sample.
        (8, 4, {"n_directions": 1}),
        (3, 1, {}),
    ],
)
def test_few_rows_need_all_of_the_matrices(
    net: Any, pool: np.ndarray, rows: int, chunks: int, options: dict[str, Any]
) -> None:
    # Eight samples have 72 rows; the 700 x 700 matrices of a worker take 47 MB.
    shares = ("target", "spill", "pause", "terminate")
    with (
        dask.config.set({f"distributed.worker.memory.{share}": False for share in shares}),
        cluster(2, processes=False, memory_limit="40MB"),
        pytest.raises(MemoryError, match=r"each of which needs 0\.05 GB for 700 x 700"),
    ):
        sampler(mask_fraction=700, **options)(net, da.from_array(pool[:rows], (chunks, 64)), 2)
