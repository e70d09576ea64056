"""The label-efficiency study: its splits, its networks and its runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F

pytest.importorskip("skactiveml")

from benchmarks.common.networks import NETWORKS, SeveralTrainings, UntilAccuracy, make_net
from benchmarks.study import pixels, stopping
from benchmarks.study import run as study
from benchmarks.study.data import some_of_each, split
from benchmarks.study.run import long_tail, make_split
from benchmarks.study.strategies import STRATEGIES
from tests.nets import digits

pytestmark = pytest.mark.slow

IMAGES, LABELS = digits()
IMAGES = IMAGES.reshape(-1, 1, 8, 8)
LABELS_ALL = load_digits().target


def test_long_tail() -> None:
    sizes = long_tail(10, 500, 50)
    assert sizes[0] == 500
    assert sizes[-1] == 10
    assert np.allclose(sizes[1:] / sizes[:-1], 50 ** (-1 / 9), atol=0.03)
    assert long_tail(4, 7, 1).tolist() == [7] * 4


@pytest.mark.parametrize("n_train", [800, 1000])
@pytest.mark.parametrize("imbalance", [1, 20])
def test_splits_are_as_said(n_train: int, imbalance: float) -> None:
    y = np.random.default_rng(0).permutation(np.repeat(np.arange(5), 200))
    pool, test = make_split(y, n_train, 3, 400, 50, imbalance)
    assert not set(pool) & set(test)
    assert np.bincount(y[test]).tolist() == [10] * 5
    counts = np.sort(np.bincount(y[pool], minlength=5))
    assert len(pool) <= 400
    assert counts[-1] / counts[0] == pytest.approx(imbalance, rel=0.15)
    if n_train < len(y):
        assert pool.max() < n_train <= test.min()
    again = make_split(y, n_train, 3, 400, 50, imbalance)
    assert np.array_equal(pool, again[0])
    assert not np.array_equal(pool, make_split(y, n_train, 4, 400, 50, imbalance)[0])


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32)])
def test_networks_take_the_shapes(name: str, shape: tuple[int, ...]) -> None:
    module = NETWORKS[name](shape, 7).eval()
    assert module(torch.zeros(2, *shape)).shape == (2, 7)


def test_until_accuracy_counts_the_epoch() -> None:
    stop = UntilAccuracy(0.75)
    right, wrong = torch.eye(4), torch.eye(4).roll(1, 0)
    for outputs, stops in [((right, right), True), ((right, wrong), False)]:
        stop.on_epoch_begin(None)
        for output in outputs:
            stop.on_batch_end(None, (None, torch.arange(4)), training=True, y_pred=output)
            stop.on_batch_end(None, (None, torch.arange(4)), training=False, y_pred=wrong)
        if stops:
            with pytest.raises(KeyboardInterrupt):
                stop.on_epoch_end(None)
        else:
            stop.on_epoch_end(None)


def test_several_trainings_differ_and_the_first_is_asked() -> None:
    torch.manual_seed(0)
    several = SeveralTrainings(make_net("mlp", (1, 8, 8), 10, "cpu"), 2)
    several.fit(IMAGES[:60], LABELS[:60])
    p = [net.predict_proba(IMAGES[60:80]) for net in several.estimators_]
    assert not np.allclose(*p)
    assert np.array_equal(several.predict_proba(IMAGES[60:80]), p[0])
    scores = study.mean_scores(several, IMAGES[60:200], LABELS[60:200])
    each = [np.mean(n.predict(IMAGES[60:200]) == LABELS[60:200]) for n in several.estimators_]
    assert scores["accuracy"] == pytest.approx(np.mean(each))


def test_study_runs_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(seeds: int, *strategies: str) -> pd.DataFrame:
        argv = ["study", "--network", "mlp", "--n-queries", "1", "--pool-size", "200"]
        argv += ["--seeds", str(seeds), "--out", str(tmp_path), "--strategies", *strategies]
        monkeypatch.setattr("sys.argv", argv)
        study.main()
        return pd.read_csv(tmp_path / "digits_balanced_20/results.csv")

    one = run(1, "random", "margin")
    two = run(2, "random")
    assert one.groupby("strategy").size().to_dict() == {"random": 2, "margin": 2}
    assert two.groupby("strategy").size().to_dict() == {"random": 4, "margin": 2}
    first = two[(two.strategy == "random") & (two.seed == 0)].reset_index(drop=True)
    assert first.equals(one[one.strategy == "random"].reset_index(drop=True))
    setting = json.loads((tmp_path / "digits_balanced_20/setting.json").read_text())
    assert setting["network"] == "mlp"
    assert setting["versions"]["torch"] == torch.__version__.split("+")[0]
    assert (tmp_path / "digits_balanced_20/curves.png").exists()
    with pytest.raises(SystemExit, match=r"theirs, yours.*'network': \('mlp', 'linear'\)"):
        run(3, "random", "--network", "linear")


def test_what_is_in_the_table_is_not_computed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = [
        "study",
        "--network",
        "linear",
        "--n-queries",
        "1",
        "--pool-size",
        "200",
        "--seeds",
        "2",
    ]
    monkeypatch.setattr("sys.argv", [*argv, "--out", str(tmp_path), "--strategies", "random"])
    study.main()
    folder = tmp_path / "digits_balanced_20"
    shutil.rmtree(folder / "checkpoint")
    before = study.read_results(folder)
    # The second seed is lost, and comes out the same by itself.
    before[before.seed == 0].to_csv(folder / "results.csv", index=False)
    study.main()
    after = study.read_results(folder)
    assert [path.name for path in (folder / "checkpoint").iterdir()] == ["random_1"]
    assert after.drop(columns=["fit_time", "query_time"]).equals(
        before.drop(columns=["fit_time", "query_time"])
    )


def test_study_goes_seed_by_seed_and_survives_a_strategy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flat, labels = IMAGES.reshape(-1, 64), LABELS
    arrays = {"X_train": flat[:400], "y_train": labels[:400]}
    np.savez(tmp_path / "few.npz", **arrays, X_test=flat[400:500], y_test=labels[400:500])
    setting = study.STUDY[0] | {
        "dataset": "few",
        "network": "linear",
        "n_queries": 1,
        "pool_size": 200,
    }
    settings = [setting, setting | {"imbalance": 4}]
    monkeypatch.setattr(study, "STUDY", settings)

    def failing(learner: Any, X_pool: Any, n_instances: int = 1) -> np.ndarray:
        raise RuntimeError("no such thing")

    monkeypatch.setitem(STRATEGIES, "entropy", failing)
    runs = []
    run = study.run
    monkeypatch.setattr(
        study, "run", lambda o, seed: (runs.append((o.imbalance, seed)), run(o, seed))
    )
    argv = ["study", "--study", "--data-dir", str(tmp_path), "--seeds", "2", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", [*argv, "--strategies", "random", "entropy", "margin"])
    study.main()
    assert runs == [(1, 0), (4, 0), (1, 1), (4, 1)]
    for name in ("few_balanced_20", "few_4to1_20"):
        table = pd.read_csv(tmp_path / name / "results.csv")
        assert table.groupby("strategy").size().to_dict() == {"random": 4, "margin": 4}
        assert json.loads((tmp_path / name / "setting.json").read_text())["dataset"] == "few"
    assert "no such thing" in capsys.readouterr().out


def test_seeds_begin_where_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    argv = ["study", "--network", "mlp16", "--n-queries", "1", "--pool-size", "200", "--seeds"]
    argv += ["1", "--first-seed", "7", "--out", str(tmp_path), "--strategies", "random"]
    monkeypatch.setattr("sys.argv", argv)
    study.main()
    table = pd.read_csv(tmp_path / "digits_balanced_20/results.csv")
    assert table.seed.tolist() == [7, 7]
    pool, _ = make_split(LABELS_ALL, len(LABELS_ALL), 7, 200, 500, 1)
    records = json.loads(
        (tmp_path / "digits_balanced_20/checkpoint/random_7/split_0000.json").read_text()
    )
    assert set(records["content"]["steps"][0]["chosen"]) <= set(pool.tolist())


def test_classes_are_split_evenly() -> None:
    y = np.repeat([0, 1, 2], [30, 40, 50])
    X = np.arange(120)[:, None]
    rows = some_of_each(y, 20, np.random.default_rng(0))
    assert np.bincount(y[rows]).tolist() == [20, 20, 20]
    train, test = split(X, y, 5)
    assert np.bincount(test[1]).tolist() == [5, 5, 5]
    assert sorted([*train[0][:, 0], *test[0][:, 0]]) == [*range(120)]
    assert np.array_equal(y[train[0][:, 0]], train[1])


def test_a_head_behind_pixels_sees_features_alone(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images, features = {}, {}
    for part in ("train", "test"):
        y = images[f"y_{part}"] = np.arange(30) % 3
        images[f"X_{part}"] = rng.integers(256, size=(30, 32, 32, 3)).astype("uint8")
        features |= {f"X_{part}": rng.normal(size=(30, 5)).astype("float32"), f"y_{part}": y}
    np.savez(tmp_path / "images.npz", **images)
    np.savez(tmp_path / "some.npz", **features)
    both = np.load(pixels.with_pixels("some", tmp_path / "images.npz", tmp_path))
    X = torch.as_tensor(both["X_test"])
    head = pixels.LinearBehindPixels((X.shape[1],), 3)
    expected = head.output(torch.as_tensor(features["X_test"]))
    assert torch.allclose(head(X), expected, atol=1e-5)
    flat = torch.as_tensor(images["X_test"].reshape(30, -1).astype("float32"))
    scaled = (flat - float(images["X_train"].mean())) / float(images["X_train"].std())
    similar = F.normalize(X) @ F.normalize(X).T
    assert torch.allclose(similar, F.normalize(scaled) @ F.normalize(scaled).T, atol=1e-4)


def test_a_curve_tells_its_signals(tmp_path: Path) -> None:
    halves = {"train": slice(0, 300), "test": slice(300, 400)}
    arrays = {f"X_{part}": IMAGES[rows].reshape(-1, 64) for part, rows in halves.items()}
    arrays |= {f"y_{part}": LABELS[rows] for part, rows in halves.items()}
    np.savez(tmp_path / "small.npz", **arrays)
    setting = {"dataset": "small", "network": "linear", "imbalance": 1, "n_initial": 20}
    setting |= {"n_instances": 5, "n_queries": 2, "pool_size": 200, "test_size": 50}
    found = stopping.curve(setting, tmp_path, seed=0)
    assert found.n_labeled.tolist() == [20, 25, 30]
    assert (found.before > found.after)[:2].all()
    assert found.uncertainty[:2].between(0.01, 0.99).all()
    assert found[["before", "after", "uncertainty"]].iloc[2].isna().all()
