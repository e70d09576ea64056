"""The label-efficiency study: its splits, its peers and its statistics."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

pytest.importorskip("skactiveml")

from benchmarks import label_efficiency, label_efficiency_report
from benchmarks.label_efficiency import long_tail, make_split
from benchmarks.networks import NETWORKS, SeveralTrainings, UntilAccuracy, make_net
from benchmarks.strategies import STRATEGIES, WeightedTarget, features_and_logits
from skfishermask import FisherMaskSampler
from tests import oracles
from tests.nets import digits

IMAGES, LABELS = digits()
IMAGES = IMAGES.reshape(-1, 1, 8, 8)


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


@pytest.fixture(scope="module")
def learner() -> Any:
    torch.manual_seed(0)
    net = make_net("cnn", (1, 8, 8), 10, "cpu").fit(IMAGES[:60], LABELS[:60])
    return SimpleNamespace(
        estimator=net,
        query_strategy=None,
        X_training=IMAGES[:60],
        y_training=LABELS[:60],
        predict_proba=net.predict_proba,
    )


def test_trains_until_right(learner: Any) -> None:
    assert learner.estimator.score(IMAGES[:60], LABELS[:60]) > 0.95
    assert len(learner.estimator.history) < 200


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


@pytest.mark.parametrize(
    "name", ["entropy", "margin", "k-center", "BADGE", "BAIT", "BAIT Binary", "FisherMask"]
)
def test_strategies_choose(learner: Any, name: str) -> None:
    chosen = STRATEGIES[name](learner, IMAGES[60:200], n_instances=6)
    chosen = chosen[0] if isinstance(chosen, tuple) else chosen
    assert len(set(np.asarray(chosen).tolist())) == 6


def test_features_and_logits(learner: Any) -> None:
    module = learner.estimator.module_
    features, logits = features_and_logits(learner.estimator, IMAGES[:300])
    with torch.no_grad():
        expected = module.features(torch.as_tensor(IMAGES[:300]))
        assert torch.allclose(features, expected, atol=1e-6)
        assert torch.allclose(logits, module.output(expected), atol=1e-5)


def test_k_center_covers(learner: Any) -> None:
    """Greedy farthest point, from the labelled samples, on the penultimate features."""
    pool = IMAGES[60:120]
    chosen = STRATEGIES["k-center"](learner, pool, n_instances=4)
    of_pool, of_labeled = (
        features_and_logits(learner.estimator, X)[0].double() for X in (pool, IMAGES[:60])
    )
    centres = of_labeled
    for row in chosen:
        distance = torch.cdist(of_pool, centres).amin(1)
        assert distance[row] == pytest.approx(float(distance.max()), rel=1e-4)
        centres = torch.cat([centres, of_pool[row : row + 1]])


def test_weighted_target_without_weights_is_the_sampler(learner: Any) -> None:
    pool = IMAGES[60:160]
    expected, gains = FisherMaskSampler(random_state=0)(learner, pool, 5)
    chosen, same = WeightedTarget(balanced=False)(learner, pool, 5)
    assert chosen.tolist() == expected.tolist()
    assert np.allclose(gains, same, rtol=1e-4)
    proportional = WeightedTarget(balanced=False, pool_share=100 / 160)(learner, pool, 5)
    assert proportional[0].tolist() == expected.tolist()
    other = WeightedTarget(balanced=False, pool_share=0.1)(learner, pool, 5)
    assert not np.allclose(other[1], gains, rtol=1e-2)
    assert WeightedTarget()(learner, pool, 5)[0].tolist() != chosen.tolist()


def test_bait_binary_is_its_formula(learner: Any) -> None:
    pool, n = IMAGES[60:130], 4

    def embed(X: np.ndarray) -> torch.Tensor:
        features, logits = features_and_logits(learner.estimator, X)
        q = logits.double().softmax(1).amax(1)
        return ((q * (1 - q)).sqrt()[:, None] * features.double())[:, None, :]

    V, L = embed(pool), embed(IMAGES[:60])
    both = torch.cat([V, L])
    expected, _ = oracles.select_batch_oracle(
        V,
        n,
        both[:, 0].T @ both[:, 0] / len(both),
        fisher_labeled=L[:, 0].T @ L[:, 0] / len(L),
        n_labeled=60,
        oversample=2.0,
    )
    chosen = STRATEGIES["BAIT Binary"](learner, pool, n)
    assert sorted(chosen.tolist()) == sorted(expected)


def test_several_trainings_differ_and_the_first_is_asked() -> None:
    torch.manual_seed(0)
    several = SeveralTrainings(make_net("mlp", (1, 8, 8), 10, "cpu"), 2)
    several.fit(IMAGES[:60], LABELS[:60])
    p = [net.predict_proba(IMAGES[60:80]) for net in several.estimators_]
    assert not np.allclose(*p)
    assert np.array_equal(several.predict_proba(IMAGES[60:80]), p[0])
    scores = label_efficiency.mean_scores(several, IMAGES[60:200], LABELS[60:200])
    each = [np.mean(n.predict(IMAGES[60:200]) == LABELS[60:200]) for n in several.estimators_]
    assert scores["accuracy"] == pytest.approx(np.mean(each))


# The report


def write_setting(folder: Path, gaps: dict[str, float], n_seeds: int = 10) -> None:
    rng = np.random.default_rng(0)
    rows = []
    for seed in range(n_seeds):
        base = rng.normal(0.7, 0.05)
        for name, gap in gaps.items():
            for step in range(3):
                score = base + gap + 0.05 * step + rng.normal(0, 0.002)
                rows.append((name, seed, 20 + 20 * step, score, score, score, 1.0, 0.5))
    table = pd.DataFrame(rows, columns=label_efficiency.COLUMNS)
    options = argparse.Namespace(
        dataset="digits",
        imbalance=1,
        n_initial=20,
        n_instances=20,
        n_queries=2,
        network="cnn",
        pool_size=1000,
        test_size=500,
        trainings=1,
        device="cpu",
    )
    folder.mkdir(parents=True)
    label_efficiency.write_results(folder, options, {})
    table.to_csv(folder / "results.csv", index=False)


GAPS = {"random": 0.0, "BADGE": 0.03, "BAIT": 0.02, "FisherMask": 0.05}


def test_report_statistics(tmp_path: Path) -> None:
    write_setting(tmp_path / "one", GAPS)
    (setting,) = label_efficiency_report.load(tmp_path)
    assert setting.name == "Digits, balanced, batches of 20"
    assert setting.best_peer == "BADGE"
    difference = setting.difference("FisherMask", "BADGE")
    table = setting.table.set_index(["strategy", "seed", "n_labeled"]).accuracy.unstack()
    expected = (table.loc["FisherMask"] - table.loc["BADGE"]).mean(axis=1)
    assert np.allclose(difference, expected)
    assert label_efficiency_report.error(difference) == pytest.approx(expected.sem())
    low, high = label_efficiency_report.interval(difference)
    assert low < difference.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * expected.sem(), rel=0.25)
    assert label_efficiency_report.verdict(difference) == "win"
    assert label_efficiency_report.verdict(-difference) == "loss"
    assert label_efficiency_report.verdict(difference - difference.mean()) == "tie"
    assert label_efficiency_report.verdict(difference[:7]) == "too few seeds"
    # Random ends 0.1 above its start; FisherMask is 0.05 ahead, one query.
    assert setting.needed("random") == pytest.approx(60, abs=0.5)
    assert setting.needed("FisherMask") == pytest.approx(40, abs=2)


def test_report_is_written_from_the_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_setting(tmp_path / "results/one", GAPS)
    write_setting(tmp_path / "results/unfinished", {"random": 0.0})
    argv = ["report", "--results", str(tmp_path / "results"), "--docs", str(tmp_path / "docs")]
    monkeypatch.setattr("sys.argv", argv)
    label_efficiency_report.main()
    page = (tmp_path / "docs/label_efficiency.rst").read_text()
    assert "Of 1 settings, **FisherMask** beats the best peer" in page
    assert "in 1 (Digits, balanced, batches of 20), cannot be told from it in none" in page
    assert (tmp_path / "docs/images/label_efficiency.png").stat().st_size > 10_000
    assert "nan" not in page


@pytest.mark.parametrize(
    ("gap", "n_seeds", "outcome"),
    [
        (0.02, 28, "It wins, so it is the default now."),
        (0.0, 28, "That is no win, so the default stays."),
        (-0.02, 28, "loses in 1 of 1. That is no win, so the default stays."),
        (0.02, 16, "It was not tried on other seeds yet, so the default stays."),
    ],
)
def test_a_variant_is_chosen_and_confirmed_on_other_seeds(
    tmp_path: Path, gap: float, n_seeds: int, outcome: str
) -> None:
    gaps = GAPS | {"lambda 0.01": 0.08, "lambda 0.1": 0.04, "oversample 2": 0.06}
    write_setting(tmp_path / "one", gaps, n_seeds)
    file = tmp_path / "one/results.csv"
    table = pd.read_csv(file)
    later = (table.strategy == "lambda 0.01") & (table.seed >= 16)
    table.loc[later, "accuracy"] += GAPS["FisherMask"] + gap - gaps["lambda 0.01"]
    table.to_csv(file, index=False)
    text = label_efficiency_report.tried(label_efficiency_report.load(tmp_path))
    assert "The candidate is **FisherMask, lambda 0.01**." in text
    assert outcome in text
    assert f"{-0.01:+.3f} (".replace("-", "\N{MINUS SIGN}") in text
    if n_seeds > 16:
        assert "12\n" in text


def test_study_runs_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(seeds: int, *strategies: str) -> pd.DataFrame:
        argv = ["study", "--network", "mlp", "--n-queries", "1", "--pool-size", "200"]
        argv += ["--seeds", str(seeds), "--out", str(tmp_path), "--strategies", *strategies]
        monkeypatch.setattr("sys.argv", argv)
        label_efficiency.main()
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
