"""Numbers and several labels a sample: training, peers and that runs go on."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import entropy
from torch import Tensor

pytest.importorskip("skactiveml")

from benchmarks.study import likelihoods
from benchmarks.study.likelihoods import STRATEGIES, farthest, load, make_net
from benchmarks.study.report import by_likelihood

TASKS = ["Friedman 1", "generated labels"]


def fitted(task: str) -> tuple[Any, np.ndarray]:
    """Return a learner of 30 samples and a pool of 60."""
    X, y = load(task)
    torch.manual_seed(0)
    net = make_net(task, X.shape[1], y.shape[1]).fit(X[:30], y[:30])
    return SimpleNamespace(estimator=net, X_training=X[:30], y_training=y[:30]), X[30:90]


@pytest.mark.parametrize("task", TASKS)
def test_training_is_adamw_on_all_samples(task: str) -> None:
    learner, X = fitted(task)
    torch.manual_seed(0)
    net = make_net(task, X.shape[1], learner.y_training.shape[1]).initialize()
    rate, decay = likelihoods.RATE, likelihoods.WEIGHT_DECAY
    optimizer = torch.optim.AdamW(net.module_.parameters(), lr=rate, weight_decay=decay)
    for _ in range(likelihoods.N_STEPS):
        optimizer.zero_grad()
        outputs = net.module_(torch.as_tensor(learner.X_training))
        net.criterion_(outputs, torch.as_tensor(learner.y_training)).backward()
        optimizer.step()
    torch.testing.assert_close(net.forward(X), learner.estimator.forward(X), rtol=0, atol=1e-4)


def nearest(point: Tensor, centers: list[Tensor]) -> tuple[float, int]:
    squares = [float((point - center).square().sum()) for center in centers]
    return min(squares), int(np.argmin(squares))


@pytest.mark.parametrize("in_largest_cluster", [False, True])
def test_farthest_by_hand(in_largest_cluster: bool) -> None:
    pool = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)).double()
    centers, expected = [*pool[:4]], []
    for _ in range(6):
        found = [nearest(point, centers) for point in pool[4:]]
        sizes = [sum(d for d, own in found if own == i) for i in range(len(centers))]
        allowed = [
            distance if not in_largest_cluster or own == np.argmax(sizes) else -1
            for distance, own in found
        ]
        expected.append(int(np.argmax(allowed)))
        centers.append(pool[4 + expected[-1]])
    picks = farthest(pool[4:], pool[:4], 6, in_largest_cluster=in_largest_cluster)
    assert picks.tolist() == expected


def test_bait_forward_by_its_objective() -> None:
    learner, X = fitted("Friedman 1")
    samples = (X, learner.X_training)
    pool, labeled = (likelihoods.gradients(learner.estimator, part).double() for part in samples)
    scale = labeled.square().sum(1).mean().sqrt()
    pool, labeled = pool / scale, labeled / scale
    everything = pool.T @ pool + labeled.T @ labeled
    M = likelihoods.NOISE**2 * torch.eye(pool.shape[1]).double() + labeled.T @ labeled
    expected: list[int] = []
    for _ in range(4):
        after = [float(torch.linalg.solve(M + torch.outer(v, v), everything).trace()) for v in pool]
        expected.append(int(np.argmin(after)))
        M = M + torch.outer(pool[expected[-1]], pool[expected[-1]])
    assert likelihoods.bait_forward(learner, X, 4).tolist() == expected


def test_mean_entropy_by_hand() -> None:
    learner, X = fitted("generated labels")
    p = learner.estimator.forward(X).double().sigmoid().numpy()
    each = entropy(np.stack([p, 1 - p])).mean(axis=1)
    assert likelihoods.mean_entropy(learner, X, 7).tolist() == np.argsort(-each)[:7].tolist()


@pytest.mark.slow
def test_a_task_runs_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("POOL", "TEST"):
        monkeypatch.setattr(likelihoods, name, 100)
    monkeypatch.setattr(likelihoods, "N_QUERIES", 2)

    def run(seeds: int) -> pd.DataFrame:
        argv = ["likelihoods", "--seeds", str(seeds), "--out", str(tmp_path), "--tasks", *TASKS]
        monkeypatch.setattr("sys.argv", argv)
        likelihoods.main()
        return pd.read_csv(tmp_path / "results.csv")

    one = run(1)
    assert [*one.columns[3:]] == ["20", "30", "40"]
    assert one.groupby("task")["20"].nunique().to_dict() == dict.fromkeys(TASKS, 1)  # paired
    two = run(2)
    assert two.iloc[: len(one)].equals(one)
    for task in TASKS:
        part = two[two.task == task]
        assert part.groupby("seed").strategy.apply(set).tolist() == 2 * [{*STRATEGIES[task]}]


def test_the_page_says_what_was_lost(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    gaps = {"random": 0, "FisherMask": 0.02, "coverage alone": 0.05}
    rows = []
    for task, peer, sign in (("a", "k-center", 1), ("b", "k-center", 1), ("c", "mean entropy", -1)):
        for seed in range(10):
            base = rng.normal()
            for name, gap in (gaps | {peer: 0.01}).items():
                scores = base + sign * gap + rng.normal(0, 0.002, size=3)
                rows.append((task, name, seed, base, *scores))
    columns = ["task", "strategy", "seed", "20", "30", "40", "50"]
    pd.DataFrame(rows, columns=columns).to_csv(tmp_path / "results.csv", index=False)
    found = by_likelihood(tmp_path / "results.csv")
    assert found is not None
    assert found["numbers"]["tasks"] == ["a", "b"]
    assert found["labels"]["tasks"] == ["c"]
    assert [*found["numbers"]["rows"]] == ["coverage alone", "FisherMask", "k-center"]
    assert found["numbers"]["coverage"].mean == pytest.approx(0.03, abs=0.003)
    assert found["numbers"]["coverage"].low > 0
    assert found["labels"]["coverage"].high < 0
    assert found["numbers"]["ahead"] == []
    assert found["labels"]["ahead"] == ["mean entropy"]
    assert found["lost"] == ["c (FisherMask)", "c (coverage alone)"]
    assert by_likelihood(tmp_path / "none.csv") is None
