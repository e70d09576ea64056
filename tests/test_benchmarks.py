"""The label-efficiency study: its splits, its peers and its statistics."""

from __future__ import annotations

import argparse
import copy
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F

pytest.importorskip("skactiveml")

from benchmarks import label_efficiency
from benchmarks import label_efficiency_pixels as pixels
from benchmarks import label_efficiency_report as report
from benchmarks import label_efficiency_stopping as stopping
from benchmarks.label_efficiency import CANDIDATES, STUDIED, long_tail, make_split
from benchmarks.label_efficiency_data import some_of_each, split
from benchmarks.networks import NETWORKS, SeveralTrainings, UntilAccuracy, make_net
from benchmarks.strategies import (
    PEERS,
    STRATEGIES,
    CoverageWeighted,
    WithCoverage,
    calibration_error,
    drawn_seed,
    features_and_logits,
    temperature,
)
from skfishermask import FisherMaskSampler, fisher_embedding
from skfishermask.coverage import covering
from tests import oracles
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


CHOOSING = [name for name in STUDIED if name != "random"]


@pytest.mark.parametrize("name", CHOOSING)
def test_strategies_choose(learner: Any, name: str) -> None:
    def choose() -> list[int]:
        np.random.seed(0)  # noqa: NPY002
        torch.manual_seed(0)
        chosen = STRATEGIES[name](learner, IMAGES[60:200], n_instances=6)
        return np.asarray(chosen[0] if isinstance(chosen, tuple) else chosen).tolist()

    chosen = choose()
    assert len(set(chosen)) == 6
    assert 0 <= min(chosen) <= max(chosen) < 140
    assert choose() == chosen


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


def units(X: np.ndarray) -> torch.Tensor:
    return F.normalize(torch.as_tensor(X).flatten(1).double())


def test_max_herding_is_herding_without_weights(learner: Any) -> None:
    pool = IMAGES[60:160]
    expected = covering(units(pool), units(IMAGES[:60]), torch.ones(100).double(), 8)
    assert STRATEGIES["MaxHerding"](learner, pool, 8).tolist() == expected


def test_u_herding_is_weighted_by_the_margin(learner: Any) -> None:
    pool = IMAGES[60:84]
    top = np.sort(learner.predict_proba(pool), axis=1)[:, -2:]
    weights = torch.as_tensor(1 - top[:, 1] + top[:, 0]).double()
    expected = oracles.herd(units(pool), units(IMAGES[:60]), weights, 3, 1.0)
    assert STRATEGIES["UHerding, radius 1"](learner, pool, 3).tolist() == expected


def test_u_herding_adapts_radius_and_temperature(
    learner: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.strategies.temperature", lambda learner: 3.0)
    pool = IMAGES[60:84]
    _, logits = features_and_logits(learner.estimator, pool)
    top = (logits.double() / 3).softmax(1).topk(2).values
    radius = float(torch.pdist(units(IMAGES[:60])).min())
    expected = oracles.herd(units(pool), units(IMAGES[:60]), 1 - top[:, 0] + top[:, 1], 3, radius)
    assert STRATEGIES["UHerding"](learner, pool, 3).tolist() == expected


def test_calibration_error_by_hand() -> None:
    p = torch.tensor([[0.9, 0.1], [0.95, 0.05], [0.4, 0.6]])
    y = torch.tensor([0, 1, 1])
    # Bins of 0.2: {0.9, 0.95} half right, {0.6} right; weighted by the samples in them.
    expected = 2 / 3 * abs(0.5 - 0.925) + 1 / 3 * abs(1 - 0.6)
    assert calibration_error(p, y, n_bins=5) == pytest.approx(expected)


def test_temperature_is_high_where_the_net_is_wrong(learner: Any) -> None:
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
    wrong = SimpleNamespace(**vars(learner))
    wrong.y_training = np.random.default_rng(0).permutation(LABELS[:60])
    assert temperature(wrong) == 10
    assert temperature(learner) < 5
    wrong.X_training, wrong.y_training = IMAGES[:2], LABELS[:2]
    assert temperature(wrong) == 1


def test_tcm_changes_to_the_margin(learner: Any) -> None:
    def choose(name: str, of: Any) -> list[int]:
        np.random.seed(0)  # noqa: NPY002
        chosen = STRATEGIES[name](of, IMAGES[60:160], n_instances=5)
        return np.asarray(chosen[0] if isinstance(chosen, tuple) else chosen).tolist()

    for n_labeled, name, other in ((49, "TypiClust", "margin"), (50, "margin", "TypiClust")):
        some = SimpleNamespace(**vars(learner))
        some.X_training, some.y_training = IMAGES[:n_labeled], LABELS[:n_labeled]
        assert choose("TCM", some) == choose(name, some) != choose(other, some)


def test_a_share_is_chosen_by_coverage(learner: Any) -> None:
    pool, n = IMAGES[60:160], 6

    def choose(strategy: Any, **kwargs: Any) -> list[int]:
        np.random.seed(0)  # noqa: NPY002
        chosen = strategy(learner, pool, n, **kwargs)
        return np.asarray(chosen[0] if isinstance(chosen, tuple) else chosen).tolist()

    alone = choose(WithCoverage(0.0))
    np.random.seed(0)  # noqa: NPY002
    sampler = FisherMaskSampler(
        regularization=0.01, batch_size=256, coverage_share=0, random_state=drawn_seed()
    )
    assert alone == choose(sampler)
    covering = choose(STRATEGIES["UHerding, radius 1"])
    assert choose(WithCoverage(1.0)) == covering
    half = choose(WithCoverage(0.5))
    assert half[:3] == covering[:3]
    rest = np.setdiff1d(np.arange(len(pool)), covering[:3])
    labeled = np.concatenate([IMAGES[:60], pool[covering[:3]]])
    others, _ = sampler(learner, pool[rest], 3, X_labeled=labeled)
    assert half[3:] == rest[others].tolist()


@pytest.mark.parametrize(
    ("classes", "covers"), [(range(10), True), ([0], False), (range(5), False)]
)
def test_the_share_follows_the_balance_of_the_predictions(
    learner: Any, monkeypatch: pytest.MonkeyPatch, classes: Any, covers: bool
) -> None:
    monkeypatch.setattr(
        "benchmarks.strategies.u_herding_fixed", lambda learner, X_pool, n: np.arange(n)
    )
    monkeypatch.setattr(
        WithCoverage, "_fishermask", lambda self, learner, X, n, L: 50 + np.arange(n)
    )
    p = np.zeros((100, 10))
    p[np.arange(100), np.resize(classes, 100)] = 1
    one = SimpleNamespace(**vars(learner))
    one.predict_proba = lambda X: p
    chosen = WithCoverage()(one, IMAGES[60:160], 4)
    assert np.array_equal(chosen, np.arange(4) + (0 if covers else 50))


@pytest.mark.parametrize("radius", [1.0, 0.4])
def test_embeddings_are_weighted_by_what_is_not_covered(learner: Any, radius: float) -> None:
    pool, n = IMAGES[60:120], 5
    strategy = CoverageWeighted(radius)
    np.random.seed(0)  # noqa: NPY002
    chosen, gains = strategy(learner, pool, n)
    np.random.seed(0)  # noqa: NPY002
    sampler = FisherMaskSampler(max_candidates=1, batch_size=256, random_state=drawn_seed())
    sampler(learner, pool, 1)
    module = copy.deepcopy(learner.estimator.module_).double()
    V, L = (
        fisher_embedding(module, [torch.as_tensor(X).double()], sampler.mask_, dtype=torch.float64)
        for X in (pool, IMAGES[:60])
    )
    nearest = torch.cdist(units(pool), units(IMAGES[:60])).amin(1)
    w = 1 - torch.exp(-((nearest / radius) ** 2))
    V = (w / w.mean()).sqrt()[:, None, None] * V
    expected, expected_gains = oracles.select_batch_oracle(
        V,
        n,
        torch.einsum("nri,nrj->ij", V, V) / 120,
        fisher_labeled=torch.einsum("nri,nrj->ij", L, L) / 60,
        n_labeled=60,
        regularization=0.01,
    )
    assert chosen.tolist() == list(expected)
    assert np.allclose(gains, expected_gains, rtol=1e-3)


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


def write_setting(
    folder: Path,
    gaps: dict[str, float],
    n_seeds: int = 10,
    imbalance: float = 1,
    dataset: str = "letter",
    noise: float = 0.002,
    network: str = "mlp16",
) -> None:
    rng = np.random.default_rng(0)
    rows = []
    for seed in range(n_seeds):
        base = rng.normal(0.7, 0.05)
        for name, gap in gaps.items():
            for step in range(3):
                score = base + gap + 0.05 * step + rng.normal(0, noise)
                rows.append((name, seed, 20 + 20 * step, score, score, score, 1.0, 0.5))
    table = pd.DataFrame(rows, columns=label_efficiency.COLUMNS)
    options = argparse.Namespace(
        dataset=dataset,
        imbalance=imbalance,
        n_initial=20,
        n_instances=20,
        n_queries=2,
        network=network,
        pool_size=1000,
        test_size=500,
        trainings=1,
        device="cpu",
    )
    label_efficiency.write_setting(folder, options)
    table.to_csv(folder / "results.csv", index=False)


GAPS = {name: 0.001 * i for i, name in enumerate(PEERS)} | {
    "random": 0.0,
    "BADGE": 0.03,
    "FisherMask": 0.02,
}


def test_statistics_of_a_setting(tmp_path: Path) -> None:
    write_setting(tmp_path / "one", GAPS)
    (setting,) = report.load(tmp_path)
    assert setting.name == "Letters, balanced, 20 a batch"
    assert setting.best_peer == "BADGE"
    difference = setting.difference("BADGE")
    table = setting.table.set_index(["strategy", "seed", "n_labeled"]).accuracy.unstack()
    expected = (table.loc["BADGE"] - table.loc["FisherMask"]).mean(axis=1)
    assert np.allclose(difference, expected)
    assert report.error(difference) == pytest.approx(expected.sem())
    low, high = report.interval(difference)
    assert low < difference.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * expected.sem(), rel=0.25)
    assert setting.regret["BADGE"] == 0
    assert setting.regret["FisherMask"] == pytest.approx(expected.mean())


def test_strategies_are_compared_on_the_seeds_that_both_have(tmp_path: Path) -> None:
    write_setting(tmp_path / "one", GAPS)
    file = tmp_path / "one/results.csv"
    table = pd.read_csv(file)
    table[(table.strategy != "margin") | (table.seed > 2)].to_csv(file, index=False)
    (setting,) = report.load(tmp_path)
    assert setting.n_seeds == 7
    by_seed = setting.means
    expected = (by_seed["margin"] - by_seed["FisherMask"])[3:].mean() + by_seed["FisherMask"].mean()
    assert setting.scores["margin"] == pytest.approx(expected)
    assert setting.scores["BADGE"] == pytest.approx(by_seed["BADGE"].mean())
    assert len(setting.difference("margin")) == 7
    assert len(setting.difference("BADGE")) == 10


def test_interval_over_settings_and_seeds() -> None:
    rng = np.random.default_rng(1)
    apart = [rng.normal(mean, 0.001, 20) for mean in (-0.03, 0.03, 0.06, -0.02)]
    mean, low, high = report.bootstrap(apart)
    centres = np.array([part.mean() for part in apart])
    assert mean == pytest.approx(centres.mean())
    # Settings that differ make it wide, however many seeds each has.
    assert high - low == pytest.approx(2 * 1.96 * centres.std() / 2, rel=0.1)
    alike = [rng.normal(0.01, 0.02, 20) for _ in range(4)]
    _, low, high = report.bootstrap(alike)
    assert high - low > 1.8 * 1.96 * 0.02 / np.sqrt(80)
    assert [report.verdict(*x) for x in ((0.1, 0.2), (-0.1, 0.2), (-0.2, -0.1))] == [
        "better",
        "level",
        "worse",
    ]


def test_a_first_look_claims_nothing(tmp_path: Path) -> None:
    write_setting(tmp_path / "results/one", GAPS, report.MIN_SEEDS - 1)
    write_setting(tmp_path / "results/two", GAPS, imbalance=100)
    page = report.page_of(report.load(tmp_path / "results"), tmp_path)
    assert "with 7 seeds in each: a first look that decides nothing." in page
    assert "Seeds in each setting: 7 to 10. With fewer than 8" in page
    assert "it beats" not in page
    assert "▲ +" not in page.split("Details\n")[0]


def test_page_is_written_from_the_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turned = GAPS | {"BADGE": 0.0, "margin": 0.025}
    write_setting(tmp_path / "results/one", GAPS)
    write_setting(tmp_path / "results/two", turned, imbalance=100)
    write_setting(tmp_path / "results/old", {"random": 0.0, "FisherMask": 0.1}, dataset="digits")
    write_setting(tmp_path / "results/unfinished", {"random": 0.0})
    few = {"random": 0.0, "BADGE": 0.02, "FisherMask": 0.01}
    write_setting(tmp_path / "results/paper", few, 3, dataset="cifar10-images")
    told(falling=True).to_csv(tmp_path / "results/stopping.csv", index=False)
    helps = dict(zip(pixels.COMPARED, (0.0, -0.01, 0.02, 0.03), strict=True))
    write_setting(tmp_path / pixels.RESULTS.name / "one", helps, network="cnn")
    argv = ["report", "--results", str(tmp_path / "results"), "--docs", str(tmp_path / "docs")]
    monkeypatch.setattr("sys.argv", argv)
    report.main()
    page = (tmp_path / "docs/label_efficiency.rst").read_text()
    assert "Of 13 other strategies in 2 settings (Letters) on balanced pools it beats 12" in page
    balanced, tailed = page.split("; on long-tailed pools it ")
    assert balanced.endswith("cannot be told from none and loses to 1 (BADGE)")
    assert tailed.startswith("beats 12, cannot be told from none and loses to 1 (margin).\n")
    assert "▲ +" in page.split("Details\n")[0]
    assert "- **Balanced pool**: BADGE, with a mean regret of 0.000" in page
    assert "- **Long-tailed pool**: margin, with a mean regret of 0.000" in page
    worst = "- **You cannot tell**: FisherMask is never further than 0.010 from the best"
    assert worst in page
    assert "- balanced, 20 a batch, 3 seeds: BADGE 0.7" in page
    assert "Of 13 other strategies in 3" not in page
    assert "The best single threshold is on: relative fall of the objective by the batch." in page
    assert "minus none: +0.010" in " ".join(page.split())
    assert "That\nlies above 0" in page
    for image in ("label_efficiency", "label_efficiency_curves", "label_efficiency_paper"):
        assert (tmp_path / f"docs/images/{image}.png").stat().st_size > 10_000
    assert "nan" not in page


def told(falling: bool) -> pd.DataFrame:
    """Curves that saturate at different numbers of labels, and signals before each batch."""
    rows = []
    for imbalance, scale in ((1, 40.0), (50, 400.0)):
        for n in range(20, 540, 20):
            slope = np.exp(-n / scale)
            before = 1.0 + n % 3
            after = before * (1 - 0.5 * slope if falling else 0.5 + 0.1 * (n % 7))
            rows.append(("letter", imbalance, 1, n, 0.9 - 0.5 * slope, before, after, n % 7))
    names = ["dataset", "imbalance", "seed", "n_labeled", "accuracy", "before", "after"]
    return pd.DataFrame(rows, columns=[*names, "uncertainty"])


def test_the_share_of_pixels_is_the_default_one(learner: Any) -> None:
    np.random.seed(0)  # noqa: NPY002
    found, _ = pixels.share_of_pixels(learner, IMAGES[60:160], 10)
    np.random.seed(0)  # noqa: NPY002
    sampler = FisherMaskSampler(batch_size=256, random_state=drawn_seed())
    expected, _ = sampler(learner, IMAGES[60:160], 10)
    assert sampler.query_info_["coverage_share"] > 0
    assert found.tolist() == expected.tolist()


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


def test_what_tells_when_to_stop_is_judged_by_the_gain_to_come() -> None:
    found = stopping.judged(told(falling=True))
    fall, before, uncertainty, count = found.index
    assert found.loc[fall].tolist() == [1.0, 1.0, 1.0]
    assert found.loc[count, ["mean", "lowest"]].tolist() == [1.0, 1.0]
    assert 0.5 < found.loc[count, "one threshold"] < 1
    for name in (before, uncertainty):
        assert 0.3 < found.loc[name, "one threshold"] < 0.7
    assert stopping.judged(told(falling=False)).loc[fall, "one threshold"] < 0.7


@pytest.mark.parametrize(
    ("gaps", "n_seeds", "outcome"),
    [
        ([0.015, 0.015], 10, "passes the test"),
        ([0.015, 0.0], 10, "None passes the test: the default stays."),
        ([0.04, 0.03, 0.03, 0.03, -0.005], 10, "None passes the test: the default stays."),
        ([0.015, 0.015], 8, "the default stays."),
    ],
)
def test_a_candidate_passes_only_if_it_wins_and_loses_nowhere(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    gaps: list[float],
    n_seeds: int,
    outcome: str,
) -> None:
    monkeypatch.setattr(report, "STUDY", [{}] * len(gaps))
    first, *others = CANDIDATES[0]
    for i, gap in enumerate(gaps):
        some = GAPS | dict.fromkeys(others, 0.0) | {first: GAPS["FisherMask"] + gap}
        write_setting(tmp_path / str(i), some, n_seeds, imbalance=1 + 9 * i)
    settings, of = report.load(tmp_path), report.ROUNDS[0]
    text = report.defaults(settings, of)
    assert outcome in text
    assert "not been done in all settings" in report.defaults(settings[1:], of)
    assert "not been done in all settings" in report.defaults(settings, report.ROUNDS[1])
    found = report.passes({s.name: report.confirming(s, of) for s in settings}, first)
    assert (found["lost"] == []) == (min(gaps) >= 0)
    if n_seeds == 8:  # the first one decides nothing
        assert "Some setting has 7 of the 8 seeds" in text


def test_a_round_is_decided_by_its_own_seeds(tmp_path: Path) -> None:
    write_setting(tmp_path / "one", GAPS)
    write_setting(tmp_path / "old", {"random": 0.0, "FisherMask": 0.1}, dataset="digits")
    settings = report.load(tmp_path)
    of = report.Round([], range(2, 5), range(6, 8))
    assert [[*report.confirming(s, of).index] for s in settings] == [[2, 3, 4], [6, 7]]
    assert set(report.confirming(settings[0], of)) == set(GAPS)
    table = settings[0].table
    table.loc[(table.strategy == "BADGE") & (table.seed < 5), "accuracy"] = np.nan
    again = report.Setting(settings[0].info, table)
    assert set(report.confirming(again, of)) == set(GAPS) - {"BADGE"}


# The study


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
    label_efficiency.main()
    folder = tmp_path / "digits_balanced_20"
    shutil.rmtree(folder / "checkpoint")
    before = label_efficiency.read_results(folder)
    # The second seed is lost, and comes out the same by itself.
    before[before.seed == 0].to_csv(folder / "results.csv", index=False)
    label_efficiency.main()
    after = label_efficiency.read_results(folder)
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
    setting = label_efficiency.STUDY[0] | {
        "dataset": "few",
        "network": "linear",
        "n_queries": 1,
        "pool_size": 200,
    }
    settings = [setting, setting | {"imbalance": 4}]
    monkeypatch.setattr(label_efficiency, "STUDY", settings)

    def failing(learner: Any, X_pool: Any, n_instances: int = 1) -> np.ndarray:
        raise RuntimeError("no such thing")

    monkeypatch.setitem(STRATEGIES, "entropy", failing)
    runs = []
    run = label_efficiency.run
    monkeypatch.setattr(
        label_efficiency, "run", lambda o, seed: (runs.append((o.imbalance, seed)), run(o, seed))
    )
    argv = ["study", "--study", "--data-dir", str(tmp_path), "--seeds", "2", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", [*argv, "--strategies", "random", "entropy", "margin"])
    label_efficiency.main()
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
    label_efficiency.main()
    table = pd.read_csv(tmp_path / "digits_balanced_20/results.csv")
    assert table.seed.tolist() == [7, 7]
    pool, _ = make_split(LABELS_ALL, len(LABELS_ALL), 7, 200, 500, 1)
    records = json.loads(
        (tmp_path / "digits_balanced_20/checkpoint/random_7/split_0000.json").read_text()
    )
    assert set(records["steps"][0]["chosen"]) <= set(pool.tolist())


# The data


def test_classes_are_split_evenly() -> None:
    y = np.repeat([0, 1, 2], [30, 40, 50])
    X = np.arange(120)[:, None]
    rows = some_of_each(y, 20, np.random.default_rng(0))
    assert np.bincount(y[rows]).tolist() == [20, 20, 20]
    train, test = split(X, y, 5)
    assert np.bincount(test[1]).tolist() == [5, 5, 5]
    assert sorted([*train[0][:, 0], *test[0][:, 0]]) == [*range(120)]
    assert np.array_equal(y[train[0][:, 0]], train[1])
