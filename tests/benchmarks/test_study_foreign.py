"""Numbers of other benchmarks, repeated: their data, nets and scores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

pytest.importorskip("skactiveml")

from benchmarks.study import foreign, report, three_clusters
from benchmarks.study.three_clusters import COMPARED, FineTuned, NAdam, draw
from tests.benchmarks.pages import measured_pages

pytestmark = pytest.mark.slow


def test_area_by_hand() -> None:
    # Two trapezoids, .65 and .75, over three queries; not the first score.
    assert foreign.area(np.array([0.1, 0.6, 0.7, 0.8])) == pytest.approx((0.65 + 0.75) / 3)


def test_tables_choose_by_their_rules() -> None:
    class Learner:
        X_training = np.array([[0.0, 0.0], [4.0, 0.0]])

        class estimator:
            @staticmethod
            def decision_function(X: np.ndarray) -> np.ndarray:
                return X[:, 0] - 1

    pool = np.array([[1.1, 0.0], [2.0, 3.0], [6.0, 0.0]])
    assert foreign.margin(Learner(), pool) == [0]
    assert foreign.k_center(Learner(), pool) == [1]


@pytest.mark.parametrize("strategy", foreign.STRATEGIES)
def test_a_table_runs(strategy: str) -> None:
    rng = np.random.default_rng(0)
    X = rng.normal(size=(40, 3))
    y = (X[:, 0] + 0.1 * rng.normal(size=40) > 0).astype(int)
    found = foreign.run(X, y, strategy, 0)
    assert found == foreign.run(X, y, strategy, 0)
    assert 0.3 < found < 0.75  # three scores, two trapezoids


def test_one_cluster_has_labels_that_nothing_predicts() -> None:
    X, y = draw(np.random.default_rng(0))
    assert np.bincount(y).tolist() == [300, 300]
    mixed = X[:, 0] > 2
    assert y[mixed].mean() == pytest.approx(0.5, abs=0.05)
    assert (y[~mixed] == (X[~mixed, 1] < 3)).mean() > 0.98


def test_nadam_is_torchs() -> None:
    rng = np.random.default_rng(0)
    ours = NAdam(rng.normal(size=(3, 2)))
    weight = nn.Parameter(torch.as_tensor(ours.parameters.copy()))
    theirs = torch.optim.NAdam([weight], lr=three_clusters.RATE)
    for _ in range(20):
        gradient = rng.normal(size=(3, 2))
        ours.step(gradient)
        weight.grad = torch.as_tensor(gradient)
        theirs.step()
    assert ours.parameters == pytest.approx(weight.detach().numpy(), abs=1e-9)


def test_a_net_goes_on_from_the_weights_with_one_label_less() -> None:
    X, y = draw(np.random.default_rng(0))
    X, y = X[np.argsort(y, kind="stable")][[0, -1, 1, -2]], np.array([0, 1, 0, 1])
    net = FineTuned(nn.Module, validation=(X, y), seed=3)
    three = net.train(X[:3], y[:3]).parameters.copy()
    four = net.train(X, y)
    assert net.train(X[:3], y[:3]).parameters == pytest.approx(three)  # not changed by the fourth
    assert four.steps > net.train(X[:3], y[:3]).steps
    FineTuned._trained.clear()
    assert net.train(X, y).parameters == pytest.approx(four.parameters)


@pytest.mark.parametrize("name", COMPARED)
def test_three_clusters_run(name: str) -> None:
    found = three_clusters.run(name, 0, n_queries=2)
    assert found.shape == (3,)
    assert found[0] == three_clusters.run("random", 0, n_queries=1)[0]


def test_values_and_what_is_far_from_theirs(tmp_path: Path) -> None:
    assert report.beside_foreign(tmp_path) is None
    rows = [("sonar", "random", 0, 0.70), ("sonar", "random", 1, 0.72), ("sonar", "margin", 0, 0.9)]
    pd.DataFrame(rows, columns=["table", "strategy", "split", "area"]).to_csv(
        tmp_path / "tables.csv", index=False
    )
    rows = [("BADGE", 0, 0.5), ("FisherMask", 0, 0.6)]
    pd.DataFrame(rows, columns=["strategy", "seed", "score"]).to_csv(
        tmp_path / "three_clusters.csv", index=False
    )
    found = report.beside_foreign(tmp_path)
    assert found["outside"] == ["sonar (margin)"]
    assert (found["repeats"], found["own_repeats"]) == ((1, 2), 0)
    beside = measured_pages().beside
    row = dict(zip(found["names"], map(beside, found["rows"]["sonar"]), strict=True))
    assert row["random"] == "71.0 (74.6 ± 3.8)"
    assert row["BADGE"] == ""
    row = dict(zip(found["names"], map(beside, found["rows"]["ThreeClust"]), strict=True))
    assert (row["BADGE"], row["FisherMask, as published"]) == ("50.0 (52.4 ± 9.0)", "60.0")
