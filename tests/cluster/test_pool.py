"""Queries on a Dask cluster: what one machine would choose, also where workers die."""

from __future__ import annotations

import contextlib
import copy
import gc
import math
import os
import pickle
import re
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from skorch import NeuralNetClassifier
from torch import Tensor, nn
from torch.utils.data import default_collate

from skfishermask import FisherMaskSampler, fisher_mask_sampling
from skfishermask.cluster import worker
from skfishermask.cluster.remote import Request
from skfishermask.placement import MemoryEstimate
from tests import forked
from tests.nets import digits, fitted, logits_net, mlp, options
from tests.problems import problem

pytestmark = pytest.mark.xdist_group("processes")

dask = pytest.importorskip("dask", reason="needs Dask, which is an extra")
distributed = pytest.importorskip("distributed", reason="needs Dask, which is an extra")
da = pytest.importorskip("dask.array", reason="needs Dask, which is an extra")

UNEVEN = ((40, 1, 119, 14, 226), (64,))
N_POOL = sum(UNEVEN[0])


class DoubleNet(NeuralNetClassifier):
    """In float64 throughout, so that two orders of summation agree to the last digits."""

    def initialize_module(self) -> DoubleNet:
        super().initialize_module()
        self.module_.double()
        return self


@pytest.fixture(scope="module")
def pool() -> np.ndarray:
    return digits()[0][100 : 100 + N_POOL].astype("float64")


@pytest.fixture(scope="module")
def labeled() -> np.ndarray:
    return digits()[0][:60].astype("float64")


@pytest.fixture(scope="module")
def net() -> Any:
    X, y = digits()
    torch.manual_seed(0)
    made = DoubleNet(mlp(), criterion=nn.CrossEntropyLoss, **options(max_epochs=40))
    return made.fit(X[:60].astype("float64"), y[:60])


@pytest.fixture(scope="module")
def in_this_process() -> Iterator[Any]:
    with cluster(2, processes=False) as client:
        yield client


@pytest.fixture(scope="module")
def in_processes() -> Iterator[Any]:
    with cluster(2, processes=True, threads_per_worker=2) as client:
        yield client


@pytest.fixture
def threads(in_this_process: Any) -> Iterator[Any]:
    """Two workers in this process."""
    with in_this_process.as_current():
        yield in_this_process


@pytest.fixture
def processes(in_processes: Any) -> Iterator[Any]:
    """Two workers in processes of their own, with two threads each."""
    with in_processes.as_current():
        yield in_processes


class WatchedClient(distributed.Client):
    """Tells the names of the functions whose tasks were started."""

    on_start: Callable[[str], None] = staticmethod(lambda name: None)

    def submit(self, function: Any, *args: Any, **options: Any) -> Any:
        self.on_start(function.__name__)
        return super().submit(function, *args, **options)

    def compute(self, collections: Any, *args: Any, **options: Any) -> Any:
        started = super().compute(collections, *args, **options)
        if isinstance(started, list):
            self.on_start(str(started[0].key).split("-")[0])
        return started


def cluster(n_workers: int, **more: Any) -> Any:
    forked.server()
    made = distributed.LocalCluster(
        **({"n_workers": n_workers, "threads_per_worker": 1, "dashboard_address": ":0"} | more)
    )

    class Both(WatchedClient):
        def __exit__(self, *error: Any) -> Any:
            closed = super().__exit__(*error)
            made.close()
            return closed

    return Both(made)


def at_request(number: int, act: Callable[[], object]) -> Callable[[str], None]:
    """Act once, before the first worker is asked so many requests of the selection."""
    asked = 0

    def on_start(name: str) -> None:
        nonlocal asked
        asked += name == "ask"
        if name == "ask" and asked == number:
            act()

    return on_start


def sampler(**more: Any) -> FisherMaskSampler:
    given = {"random_state": 0, "embedding_dtype": "float64", "coverage_share": 0} | more
    return FisherMaskSampler(**given)


def chosen_by(sampler: FisherMaskSampler, net: Any, X: Any, X_labeled: Any, n: int = 12) -> Any:
    return sampler(net, X, n, X_labeled=X_labeled)


def assert_same(found: Any, expected: Any, rtol: float = 1e-10) -> None:
    assert found[0].tolist() == expected[0].tolist()
    np.testing.assert_allclose(found[1], expected[1], rtol=rtol)


def tasks(client: Any) -> list[str]:
    """List what is left on the scheduler, once it has heard of everything."""
    for _ in range(100):
        left = client.run_on_scheduler(lambda dask_scheduler: list(map(str, dask_scheduler.tasks)))
        if not left:
            break
        time.sleep(0.05)
    return left


# --- The same choice ------------------------------------------------------------------


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"oversample": 1.5, "n_mask_samples": 100},
        {"n_directions": 0.9},
        {"coverage_share": "auto"},
        {"max_candidates": 200, "target": "identity", "use_labeled": False},
        {"mask": "output_layer", "batch_size": 7},
        {"mask": "relative"},
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
    for name in ("n_candidates", "n_labeled", "n_directions", "mask_size", "embedding_bytes"):
        assert there.query_info_[name] == here.query_info_[name]
    assert tasks(processes) == []


def test_same_choice_with_target_samples(
    threads: Any, net: Any, pool: np.ndarray, labeled: np.ndarray
) -> None:
    target = digits()[0][60:100].astype("float64")
    asked = {"X_labeled": labeled, "X_target": target}
    expected = sampler()(net, pool, 12, **asked)
    assert expected[0].tolist() != chosen_by(sampler(), net, pool, labeled)[0].tolist()
    assert_same(sampler()(net, da.from_array(pool, UNEVEN), 12, **asked), expected)


@pytest.mark.parametrize("n_workers", [1, 4])
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
        (DoubleNet(Scores, criterion=nn.CrossEntropyLoss), {"to_logits": lambda z: z["scores"]}),
        (
            DoubleNet(mlp(), criterion=nn.CrossEntropyLoss, compile=True, compile__backend="eager"),
            {},
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


def kill_one(client: Any) -> None:
    pids = client.run(os.getpid)
    os.kill(pids[min(pids)], signal.SIGKILL)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
@pytest.mark.kills
@pytest.mark.parametrize("phase", ["embedding", "selection"])
def test_a_killed_worker_changes_nothing(
    processes: Any,
    net: Any,
    pool: np.ndarray,
    labeled: np.ndarray,
    phase: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = chosen_by(sampler(), net, pool, labeled)
    killed: list[str] = []

    def kill() -> None:
        if not killed:
            killed.append(phase)
            kill_one(processes)

    third = at_request(3, kill)
    on_start = third if phase == "selection" else at_start("embedding_of", kill)
    monkeypatch.setattr(processes, "on_start", on_start)
    found = chosen_by(sampler(), net, da.from_array(pool, UNEVEN), labeled)
    assert killed == [phase]
    assert tasks(processes) == []
    assert_same(found, expected)
    # As the other tests have found it.
    processes.wait_for_workers(2)


def at_start(function: str, act: Callable[[], object]) -> Callable[[str], None]:
    return lambda name: act() if name == function else None


def test_a_shard_that_travels_says_that_it_has_lost_its_state(threads: Any) -> None:
    embedding, target = problem(30, 2, 10)
    start = worker.InitialState(1.0, target, picks_per_round=1)
    all_of_them = torch.tensor([-math.inf], dtype=torch.float64)

    def ask() -> list[Any]:
        shard = worker.Shard([worker.ChunkEmbedding(0, embedding)])
        shard.initialize(start, [], 0)
        request = Request(0, 0, [], [], [], [], all_of_them, count=3, n_picks=1)
        again = pickle.loads(pickle.dumps(shard))
        return [shard.reply(request), shard.reply(request), again.reply(request)]

    answered, asked_twice, travelled = threads.submit(ask).result()
    assert len(answered.sent) == 3
    assert asked_twice is None
    assert travelled is None


@pytest.mark.parametrize("phase", ["diagonal", "embedding", "selection"])
def test_interrupting_leaves_nothing_on_the_cluster(
    threads: Any,
    net: Any,
    pool: np.ndarray,
    labeled: np.ndarray,
    phase: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Ctrl-C comes while this process waits: here as soon as it does so in the phase.
    wait = distributed.wait
    started = {"diagonal": "diagonal_of", "embedding": "embedding_of", "selection": "ask"}

    def interrupted(futures: Any, *args: Any, **options: Any) -> Any:
        if any(str(future.key).startswith(started[phase]) for future in futures):
            raise KeyboardInterrupt
        return wait(futures, *args, **options)

    monkeypatch.setattr(distributed, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        chosen_by(sampler(), net, da.from_array(pool, UNEVEN), labeled)
    assert tasks(threads) == []
    # And the cluster goes on.
    assert threads.submit(sum, [1, 2]).result() == 3


def test_data_of_the_user_stay(threads: Any, net: Any, pool: np.ndarray) -> None:
    X = da.from_array(pool, UNEVEN).persist()
    distributed.wait(X)
    sampler()(net, X, 3)
    assert len(distributed.futures_of(X)) == 5
    np.testing.assert_array_equal(X.compute(), pool)


# How long to look for a cluster that does not answer.
SOON = {"distributed.comm.timeouts.connect": "500ms"}


def test_a_cluster_without_workers_is_gone(net: Any, pool: np.ndarray) -> None:
    with cluster(1, processes=False) as client, dask.config.set(SOON):
        client.on_start = at_request(3, lambda: client.cluster.scale(0))
        with pytest.raises(ConnectionError, match=r"cluster at .* is gone: it has had no worker"):
            sampler()(net, da.from_array(pool, UNEVEN), 10)


def test_a_cluster_that_never_had_a_worker_is_gone(net: Any, pool: np.ndarray) -> None:
    with (
        cluster(0),
        dask.config.set(SOON),
        pytest.raises(ConnectionError, match="it has had no worker"),
    ):
        sampler()(net, da.from_array(pool, UNEVEN), 10)


def run_a_scheduler(sender: Connection) -> None:
    options = {"n_workers": 1, "processes": False, "dashboard_address": ":0"}
    made = distributed.LocalCluster(protocol="tcp://", **options)
    sender.send(made.scheduler_address)
    time.sleep(600)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
@pytest.mark.kills
def test_a_scheduler_that_is_killed_is_gone(net: Any, pool: np.ndarray) -> None:
    process, receiver = forked.begin(run_a_scheduler)

    def kill() -> None:
        process.kill()
        process.join()

    try:
        with (
            dask.config.set({"distributed.comm.timeouts.connect": "2s"}),
            WatchedClient(receiver.recv()) as client,
        ):
            client.on_start = at_request(3, kill)
            with pytest.raises(ConnectionError, match=r"Dask cluster at tcp://.* is gone"):
                sampler()(net, da.from_array(pool, UNEVEN), 10)
    finally:
        kill()


def test_a_cluster_that_is_closed_is_gone(net: Any, pool: np.ndarray) -> None:
    with cluster(1, processes=False) as client:
        client.on_start = at_request(3, client.cluster.close)
        with pytest.raises(ConnectionError, match=r"Dask cluster at .* is gone"):
            sampler()(net, da.from_array(pool, UNEVEN), 10)


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


def test_few_rows_need_all_of_the_matrices(net: Any, pool: np.ndarray) -> None:
    # Eight samples have 72 rows; the 700 x 700 matrices of a worker take 47 MB.
    shares = ("target", "spill", "pause", "terminate")
    with (
        dask.config.set({f"distributed.worker.memory.{share}": False for share in shares}),
        cluster(2, processes=False, memory_limit="40MB"),
        pytest.raises(MemoryError, match=r"each of which needs 0\.05 GB for 700 x 700"),
    ):
        sampler(mask_fraction=700)(net, da.from_array(pool[:8], (4, 64)), 5)


@pytest.mark.slow
def test_workers_take_no_more_than_was_estimated() -> None:
    def peak() -> int:
        import resource

        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def query(k: int) -> dict[str, Any]:
        X = np.random.default_rng(0).normal(size=(520, k // 10)).astype("float32")
        module = nn.Linear(k // 10, 10, bias=False)
        net = NeuralNetClassifier(module, criterion=nn.CrossEntropyLoss).initialize()
        asked = FisherMaskSampler(mask="all", n_directions=2, coverage_share=0, random_state=0)
        asked(net, da.from_array(X[:500], (50, k // 10)), 5, X_labeled=X[500:])
        return asked.query_info_

    # Larger than what malloc keeps for later.
    k = 2200
    with cluster(2, processes=True, threads_per_worker=1) as client, client.as_current():
        query(60)
        before = client.run(peak)
        info = query(k)
        taken = [peak - before[address] for address, peak in client.run(peak).items()]
    estimate = MemoryEstimate(500, 2, k, torch.float32, uses_row_space=False)
    spread = info["embedding_bytes"] + estimate.gains_bytes
    assert max(taken) <= worker.matrices_bytes(k, 1) + spread


class OnTheGpuOfAWorker(nn.Module):
    """Refuses to be run on a worker's CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = mlp()

    def forward(self, x: Tensor) -> Tensor:
        with contextlib.suppress(ValueError):
            distributed.get_worker()
            assert x.device.type == "cuda"
        return self.mlp(x)


@pytest.mark.cuda
def test_workers_use_their_gpu(processes: Any, pool: np.ndarray) -> None:
    X = pool.astype("float32")
    net = NeuralNetClassifier(OnTheGpuOfAWorker, criterion=nn.CrossEntropyLoss, verbose=0)
    net.initialize()
    expected = sampler()(net, X, 20)
    found = sampler()(net, da.from_array(X, UNEVEN), 20)
    assert_same(found, expected, rtol=1e-4)
