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
from benchmarks.study import peers
from benchmarks.study.heads import COMPARED
from benchmarks.study.peers import PoolProducts, competence, dcom, refine
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


NOT_HERE = ("random", "oracle")  # the oracle needs the labels, see test_study_heads.py
CHOOSING = [n for n in dict.fromkeys(STUDIED + COMPARED) if n not in NOT_HERE]


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


POOL = IMAGES[60:160]
ROWS = np.sort(np.random.default_rng(1).choice(100, 40, replace=False))


@pytest.fixture(scope="module")
def products(learner: Any) -> PoolProducts:
    return PoolProducts.of(learner, POOL, 6)


def draw(member: Any, products: PoolProducts) -> list[int]:
    return member(products, ROWS, 6, np.random.default_rng(0)).tolist()


def test_members_of_refine_herd(learner: Any, products: PoolProducts) -> None:
    """Rows of the subset cover the subset."""
    margins = np.sort(learner.predict_proba(POOL), axis=1)[:, -2:] @ [1, -1] + 1
    some, labeled = units(POOL[ROWS]), units(IMAGES[:60])
    for member, weights in ((peers.pick_by_max_herding, np.ones(100)),
                            (peers.pick_by_u_herding, margins)):  # fmt: skip
        expected = oracles.herd(some, labeled, torch.as_tensor(weights[ROWS]), 6, 1.0)
        assert draw(member, products) == ROWS[expected].tolist()
    assert draw(peers.pick_by_margin, products) == ROWS[np.argsort(-margins[ROWS])[:6]].tolist()


def test_a_member_of_refine_is_bait_binary(learner: Any, products: PoolProducts) -> None:
    def embed(X: np.ndarray) -> torch.Tensor:
        features, logits = features_and_logits(learner.estimator, X)
        return peers.binary_embedding(features, logits)[:, None, :]

    V, L = embed(POOL), embed(IMAGES[:60])
    both = torch.cat([V, L])[:, 0]
    expected, _ = oracles.select_batch_oracle(
        V[ROWS],
        6,
        both.T @ both / len(both),
        fisher_labeled=L[:, 0].T @ L[:, 0] / len(L),
        n_labeled=60,
        oversample=2.0,
    )
    assert sorted(draw(peers.pick_by_bait, products)) == sorted(ROWS[list(expected)])


def test_a_member_of_refine_is_badge(learner: Any, products: PoolProducts) -> None:
    features, logits = features_and_logits(learner.estimator, POOL)
    errors = logits.softmax(1)
    errors[np.arange(100), errors.argmax(1)] -= 1
    gradients = torch.einsum("nc,nd->ncd", errors, features).flatten(1)[ROWS].double()
    expected = [int(gradients.norm(dim=1).argmax())]
    rng = np.random.default_rng(0)
    while len(expected) < 6:
        nearest = torch.cdist(gradients, gradients[expected]).amin(1).square()
        expected.append(int(rng.choice(len(ROWS), p=(nearest / nearest.sum()).numpy())))
    assert draw(peers.pick_by_badge, products) == ROWS[expected].tolist()


def test_refine_drops_what_no_member_picks(learner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[np.ndarray] = []

    def lowest(products: Any, rows: np.ndarray, n: int, rng: Any) -> np.ndarray:
        given.append(rows)
        return rows[:n]

    monkeypatch.setattr(peers, "MEMBERS", [lowest])
    np.random.seed(0)  # noqa: NPY002
    chosen = refine(learner, POOL, 3)
    assert len(given) == peers.N_ROUNDS * peers.N_BATCHES
    left = np.arange(100)
    for i in range(0, len(given), peers.N_BATCHES):
        batches = given[i : i + peers.N_BATCHES]
        assert {len(rows) for rows in batches} == {max(3, int(0.4 * len(left)))}
        assert all(np.isin(rows, left).all() for rows in batches)
        left = np.unique(np.concatenate([rows[:3] for rows in batches]))
    assert len(set(chosen)) == 3
    assert np.isin(chosen, left).all()


def slow_dcom(learner: Any, n: int, steepness: float, center: float) -> tuple[list[int], float]:
    """DCoM sample by sample; also the weight of the margin."""
    both = np.concatenate([IMAGES[:60], POOL])
    x, p = units(both).numpy(), learner.predict_proba(both)
    top, predicted = np.sort(p, axis=1), p.argmax(axis=1)
    distance = np.array([[np.linalg.norm(a - b) for b in x] for a in x])

    def radius(i: int, purity: float) -> float:
        low, high = 0.0, 1.1
        while high - low > 0.02:
            ball = predicted[distance[i] < (low + high) / 2]
            low, high = (
                ((low + high) / 2, high)
                if (ball == LABELS[i]).mean() >= purity
                else (low, (low + high) / 2)
            )
        return (low + high) / 2

    coverage = 0.0
    for _ in range(2):
        radii = [radius(i, 0.4 + 0.2 * coverage) for i in range(60)]
        covered = {j for j in range(160) for i in range(60) if distance[i, j] < radii[i]}
        coverage = len(covered | {*range(60)}) / 160
    at_most = 1 + np.exp(-steepness * (1 - center))
    weight = at_most / (1 + np.exp(-steepness * (coverage - center)))
    margin = 1 - (top[:, -1] - top[:, -2])
    margin = (margin - margin.min()) / (margin.max() - margin.min())
    picks: list[int] = []
    while len(picks) < n:
        margin[picks] = 0
        density = np.array(
            [
                sum(distance[i, j] < np.mean(radii) for j in range(160) if j not in covered)
                for i in range(160)
            ]
        )
        score = weight * margin / margin[60:].max() + (1 - weight) * density / density[60:].max()
        score[[*range(60), *picks]] = -1
        picks.append(int(score.argmax()))
        covered |= {j for j in range(160) if distance[picks[-1], j] < np.mean(radii)}
    return [pick - 60 for pick in picks], weight


@pytest.mark.parametrize(
    ("steepness", "center", "less", "more"),
    [(50, 0.8, 0.9, 1), (50, 1, 0.2, 0.9), (1000, 1, 0, 0.01)],
)
def test_dcom_is_its_formula(
    learner: Any,
    monkeypatch: pytest.MonkeyPatch,
    steepness: float,
    center: float,
    less: float,
    more: float,
) -> None:
    """With much weight of the margin, with about as much of the density, and with that alone."""
    monkeypatch.setattr(peers, "STEEPNESS", steepness)
    monkeypatch.setattr(peers, "CENTER", center)
    expected, weight = slow_dcom(learner, 3, steepness, center)
    assert dcom(learner, POOL, 3).tolist() == expected
    assert less < weight < more


def test_competence_is_one_where_all_is_covered() -> None:
    assert competence(1.0) == 1
    assert competence(0.8) == pytest.approx(0.5, abs=1e-4)
    assert competence(0.6) < 1e-4
