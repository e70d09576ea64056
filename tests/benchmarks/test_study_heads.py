"""The study's third round: heads fitted in milliseconds, and that its runs go on."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import LogisticRegression

pytest.importorskip("skactiveml")

from benchmarks.common.fast_heads import PENALTIES, choose_penalty, make_fast_net, ridge
from benchmarks.study import heads
from benchmarks.study.heads import (
    COMPARED,
    MLP,
    ORACLE,
    RIDGE,
    all_settings,
    setting,
    strategies_of,
)

RNG = np.random.default_rng(0)
CENTRES = RNG.normal(size=(3, 8))
Y = np.arange(150) % 3
X = (CENTRES[Y] + RNG.normal(size=(150, 8))).astype("float32")


def test_ridge_is_scikit_learns_logistic_regression() -> None:
    rows = slice(0, 40)
    net = make_fast_net(RIDGE, (8,), 3, "cpu").set_params(penalty=0.1).fit(X[rows], Y[rows])
    scale = np.sqrt(((X[rows] - X[rows].mean(0)) ** 2).sum(1).mean())
    expected = LogisticRegression(C=10, max_iter=2000, tol=1e-8).fit(X[rows] / scale, Y[rows])
    assert net.predict_proba(X) == pytest.approx(expected.predict_proba(X / scale), abs=2e-3)


def test_the_penalty_follows_what_there_is_to_learn() -> None:
    targets = np.eye(3)[Y]
    assert choose_penalty(CENTRES[Y] + X / 10, targets) == PENALTIES[0]
    assert choose_penalty(RNG.normal(size=(150, 100)) / 10, targets) == PENALTIES[-1]


def test_a_class_without_labels_keeps_finite_weights() -> None:
    weight, bias = ridge(X[:30], np.eye(4)[Y[:30]], 0.01)
    assert np.isfinite(weight).all()
    assert bias.argmin() == 3


def test_full_batches_learn() -> None:
    torch.manual_seed(0)
    net = make_fast_net(MLP, (8,), 3, "cpu").fit(X[:60], Y[:60])
    assert (net.predict(X[:60]) == Y[:60]).mean() >= 0.95


def test_settings_are_as_registered() -> None:
    names = [s["name"] for s in all_settings()]
    assert len(set(names)) == len(names)
    curves = [s for s in all_settings() if not s["name"].startswith("first")]
    assert len(curves) == 44
    for part in ("n_initial", "n_instances", "imbalance", "initial", "network"):
        counts = Counter(s[part] for s in curves)
        assert min(counts.values()) >= 8, counts
    long = [s for s in curves if s["n_initial"] + s["n_queries"] * s["n_instances"] >= 1000]
    assert len(long) == 8
    assert all(ORACLE not in strategies_of(s) for s in long)
    assert all(ORACLE in strategies_of(s) for s in curves if s not in long)


@pytest.mark.slow
@pytest.mark.parametrize(("network", "initial"), [(RIDGE, "random"), (MLP, "coverage")])
def test_a_setting_runs_and_goes_on(
    network: str, initial: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = {"X_train": X[:110], "y_train": Y[:110], "X_test": X[110:], "y_test": Y[110:]}
    np.savez(tmp_path / "small.npz", **arrays)
    some = setting((network, "small"), 1, initial, (6, 3, 2)) | {"pool_size": 90, "test_size": 30}
    monkeypatch.setattr(heads, "all_settings", lambda: [some])
    monkeypatch.setattr(heads, "N_DRAWN", 5)

    def run(seeds: int) -> pd.DataFrame:
        argv = ["heads", "--data-dir", str(tmp_path), "--seeds", str(seeds), "--out", str(tmp_path)]
        monkeypatch.setattr("sys.argv", [*argv, "--settings", some["name"]])
        heads.main()
        return pd.read_csv(tmp_path / some["name"] / "results.csv")

    one = run(1)
    assert one.groupby("strategy").n_labeled.apply(list).to_dict() == {
        name: [6, 9, 12] for name in COMPARED
    }
    at_first = one[one.n_labeled == 6].groupby("strategy").accuracy.first()
    assert at_first.nunique() == 1  # paired
    two = run(2)
    assert two.iloc[: len(one)].equals(one)  # with its times: not computed again
    assert set(two.seed) == {50, 51}
    assert len(two) == 2 * len(one)
