"""The strategies of the label-efficiency study: each chooses by the formula of its paper."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("skactiveml")

from benchmarks.common.networks import make_net
from benchmarks.study.run import STUDIED
from benchmarks.study.strategies import (
    STRATEGIES,
    CoverageWeighted,
    WithCoverage,
    calibration_error,
    drawn_seed,
    early_share,
    features_and_logits,
    predicted_balance,
    temperature,
)
from skfishermask import PUBLISHED, FisherMaskSampler, fisher_embedding
from tests import oracles
from tests.nets import digits

pytestmark = pytest.mark.slow

IMAGES, LABELS = digits()
IMAGES = IMAGES.reshape(-1, 1, 8, 8)


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
    expected = oracles.herd(units(pool), units(IMAGES[:60]), torch.ones(100).double(), 8, 1.0)
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
    monkeypatch.setattr("benchmarks.study.strategies.temperature", lambda learner: 3.0)
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
        regularization=0.01, batch_size=256, **PUBLISHED, random_state=drawn_seed()
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
        "benchmarks.study.strategies.u_herding_fixed", lambda learner, X_pool, n: np.arange(n)
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
    sampler = FisherMaskSampler(
        **PUBLISHED | {"max_candidates": 1}, batch_size=256, random_state=drawn_seed()
    )
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


@pytest.mark.parametrize(("n_labeled", "share"), [(60, 0.7), (200, 0.0)])
def test_the_share_of_the_second_round(learner: Any, n_labeled: int, share: float) -> None:
    """All of it without labels, falling to none at 20 for each of ten classes."""

    class Few:
        X_training = range(n_labeled)

        def predict_proba(self, X: Any) -> np.ndarray:
            return np.full((len(X), 10), 0.1)

    assert early_share(Few(), IMAGES[:5]) == pytest.approx(share)
    assert predicted_balance(np.eye(4)[[0, 0, 1, 1]]) == pytest.approx(0.5)
    np.random.seed(0)  # noqa: NPY002
    found, _ = STRATEGIES["FisherMask, coverage at first"](learner, IMAGES[60:160], 10)
    np.random.seed(0)  # noqa: NPY002
    options = PUBLISHED | {"coverage_share": early_share(learner, IMAGES[60:160])}
    sampler = FisherMaskSampler(**options, batch_size=256, random_state=drawn_seed())
    expected, _ = sampler(learner, IMAGES[60:160], 10)
    assert 0 < sampler.query_info_["coverage_share"] < 1
    assert found.tolist() == expected.tolist()
