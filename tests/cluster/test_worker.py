"""What the tasks of a cluster compute, called in this process."""

from __future__ import annotations

import contextlib
import math
import pickle
import sys
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from skorch import NeuralNetClassifier
from torch import Tensor, nn

from skfishermask import PUBLISHED, FisherMaskSampler, fisher_diagonal, fisher_embedding
from skfishermask.cluster import worker
from skfishermask.cluster.remote import Request
from skfishermask.data import ReadableNet, covered_predictions, read_net
from skfishermask.fisher import ParameterMask, margin_uncertainty
from skfishermask.placement import MemoryEstimate
from tests.cluster.local import UNEVEN, assert_same, cluster, da, distributed, sampler
from tests.nets import digits, fitted, logits_net, mlp
from tests.problems import fisher, problem

pytestmark = pytest.mark.xdist_group("processes")

ROWS = np.array([101, 104, 105, 133])


@pytest.fixture(scope="module")
def net() -> Any:
    return fitted(logits_net())


@pytest.fixture(scope="module")
def chunk() -> np.ndarray:
    return digits()[0][100:140]


@pytest.fixture(scope="module")
def readable(net: Any, chunk: np.ndarray) -> ReadableNet:
    return read_net(net, torch.as_tensor(chunk[:1]), None)[0]


@pytest.fixture(scope="module")
def packed(readable: ReadableNet) -> bytes:
    return worker.pack(readable, None, lambda samples: samples)


@pytest.fixture
def rows() -> worker.ChunkRows:
    return worker.ChunkRows(ROWS, start=100, position=7, batch_size=3)


def test_a_chunk_is_read_like_the_pool(
    net: Any, readable: ReadableNet, chunk: np.ndarray, packed: bytes, rows: worker.ChunkRows
) -> None:
    X = torch.as_tensor(digits()[0][ROWS])
    n, sums = worker.diagonal_of(packed, chunk, rows, 9)
    assert n == 4
    for name, mean in fisher_diagonal(readable.module, [X], n_directions=9).items():
        torch.testing.assert_close(sums[name], 4 * mean, rtol=1e-5, atol=1e-6)
    predicted = worker.predicted_of(packed, chunk, rows, partial(covered_predictions, None))
    margins = margin_uncertainty(torch.as_tensor(net.predict_proba(X.numpy())).double())
    torch.testing.assert_close(predicted.uncertainty, margins, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(predicted.inputs, X / X.norm(dim=1, keepdim=True))


def test_the_embedding_of_a_chunk_has_a_position(
    readable: ReadableNet, chunk: np.ndarray, packed: bytes, rows: worker.ChunkRows
) -> None:
    X = torch.as_tensor(digits()[0][ROWS])
    shapes = {name: p.shape for name, p in readable.module.named_parameters()}
    mask = ParameterMask({next(iter(shapes)): torch.arange(5)}, shapes)
    embedding = worker.embedding_of(packed, chunk, rows, mask, torch.float64, 9)
    assert embedding.position == 7
    expected = fisher_embedding(readable.module, [X], mask, n_directions=9)
    torch.testing.assert_close(embedding.values, expected.double(), rtol=1e-5, atol=1e-6)
    # Dask takes this for the size of a result.
    assert sys.getsizeof(embedding) >= embedding.values.nbytes
    assert sys.getsizeof(worker.Shard([embedding] * 2)) >= 2 * embedding.values.nbytes


def test_sums_are_added_into_new_tensors() -> None:
    V, _ = problem(12, 2, 5)
    parts = [worker.fisher_of(worker.ChunkEmbedding(0, part)) for part in V.split([5, 4, 3])]
    before = [sums[""].clone() for _, sums in parts]
    n, total = worker.add_sums(parts)
    assert n == 12
    torch.testing.assert_close(total[""] / 12, fisher(V))
    for (_, sums), was in zip(parts, before, strict=True):
        assert torch.equal(sums[""], was)
        assert sums[""].data_ptr() != total[""].data_ptr()


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


@pytest.mark.slow
def test_workers_take_no_more_than_was_estimated() -> None:
    def peak() -> int:
        import resource

        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def query(k: int) -> dict[str, Any]:
        X = np.random.default_rng(0).normal(size=(520, k // 10)).astype("float32")
        module = nn.Linear(k // 10, 10, bias=False)
        net = NeuralNetClassifier(module, criterion=nn.CrossEntropyLoss).initialize()
        asked = FisherMaskSampler(
            **PUBLISHED | {"mask": "all", "n_directions": 2, "random_state": 0}
        )
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
