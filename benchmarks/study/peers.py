"""Two peers of the third round from their papers: REFINE and DCoM.

A query takes about a second: products of pairs of samples are computed once, and the batches that
REFINE filters by share them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.study.strategies import drawn_seed, features_and_logits, inputs
from skfishermask.coverage import kernel
from skfishermask.data.unwrap import unwrap
from skfishermask.fisher import margin_uncertainty

# REFINE: rounds of the filter, batches that each strategy picks in a round, share of the pool that
# a batch is picked from, and its upper limit.
N_ROUNDS, N_BATCHES, SHARE, LARGEST = 5, 4, 0.4, 5000
# Candidates evaluated together in lazy herding.
N_TRIED = 16
# DCoM, as in its authors' script: steepness and centre of the competence score, largest radius, and
# the accuracy of a radius.
STEEPNESS, CENTER = 50, 0.8
LARGEST_RADIUS, RESOLUTION = 1.1, 0.02

Matrix = np.ndarray


@dataclass(frozen=True)
class PoolProducts:
    """What the members of REFINE need of pairs of samples of the pool.

    Attributes
    ----------
    similarity : ndarray of shape (n, n)
        Kernel of radius 1 on inputs of unit length.
    covered : ndarray of shape (n,)
        Largest similarity to a labelled sample.
    uncertainty : ndarray of shape (n,)
        1 - margin.
    gradients : ndarray of shape (n, n)
        Inner products of BADGE's gradient embeddings.
    inverse, objective : ndarray of shape (n, n)
        V M^-1 V^T and V M^-1 F M^-1 V^T of BAIT Binary before the batch.
    """

    similarity: Matrix
    covered: Matrix
    uncertainty: Matrix
    gradients: Matrix
    inverse: Matrix
    objective: Matrix

    @classmethod
    def of(cls, learner: Any, X_pool: Any, n_instances: int) -> PoolProducts:
        net = unwrap(learner).net
        features, logits = features_and_logits(net, X_pool)
        features_labeled, logits_labeled = features_and_logits(net, learner.X_training)
        probabilities = logits.softmax(1)
        errors = probabilities - F.one_hot(probabilities.argmax(1), probabilities.shape[1])
        pool, labeled = (F.normalize(inputs(X)) for X in (X_pool, learner.X_training))
        inverse, objective = bait_products(
            binary_embedding(features, logits),
            binary_embedding(features_labeled, logits_labeled),
            n_instances,
        )
        return cls(
            kernel(pool, pool, 1.0).numpy(force=True),
            kernel(pool, labeled, 1.0).amax(1).numpy(force=True),
            margin_uncertainty(probabilities).to(pool).numpy(force=True),
            ((errors @ errors.T) * (features @ features.T)).numpy(force=True),
            inverse.numpy(force=True),
            objective.numpy(force=True),
        )


def binary_embedding(features: Tensor, logits: Tensor) -> Tensor:
    """Return V = sqrt(q (1 - q)) h of BAIT Binary, q the largest probability, in float64."""
    q = logits.double().softmax(1).amax(1, keepdim=True)
    return features.double() * (q * (1 - q)).sqrt()


def bait_products(pool: Tensor, labeled: Tensor, n_instances: int) -> tuple[Tensor, Tensor]:
    """Return V M^-1 V^T and V M^-1 F M^-1 V^T of the pool, with BAIT's weights and lambda = 1."""
    n, n_total = len(pool), len(labeled) + n_instances
    both = torch.cat([pool, labeled])
    # By pairs of samples: M = I + L^T L / (n_L + K) has as many columns as there are features.
    products = both @ both.T
    own = products[n:, n:].clone()
    own.diagonal().add_(n_total)
    inverse = products[:n] - products[:n, n:] @ torch.linalg.solve(own, products[n:])
    weight = n_instances / n_total
    return weight * inverse[:, :n], weight / len(both) * (inverse @ inverse.T)


def pick_random(
    products: PoolProducts, rows: Matrix, n_instances: int, rng: np.random.Generator
) -> Matrix:
    return rng.choice(rows, n_instances, replace=False)


def pick_by_margin(
    products: PoolProducts, rows: Matrix, n_instances: int, rng: np.random.Generator
) -> Matrix:
    return rows[np.argsort(-products.uncertainty[rows], kind="stable")[:n_instances]]


def pick_by_badge(
    products: PoolProducts, rows: Matrix, n_instances: int, rng: np.random.Generator
) -> Matrix:
    """Pick like the centres of k-means++ on gradient embeddings, the longest one first."""
    squares = products.gradients[rows, rows].astype(float)
    picks = [int(squares.argmax())]
    nearest = np.full(len(rows), np.inf)
    for _ in range(n_instances - 1):
        last = picks[-1]
        distances = squares + squares[last] - 2 * products.gradients[rows[last], rows]
        # The small number is for samples that are all alike; a pick has none.
        nearest = np.minimum(nearest, distances.clip(1e-12))
        nearest[picks] = 0
        picks.append(int(rng.choice(len(rows), p=nearest / nearest.sum())))
    return rows[picks]


def pick_by_herding(
    products: PoolProducts, rows: Matrix, n_instances: int, weights: Matrix
) -> Matrix:
    """Pick what `herding.herd` does: a gain only falls, so an old one is an upper bound."""
    similar, covered = products.similarity[np.ix_(rows, rows)], products.covered[rows]
    gains = np.maximum(similar - covered, 0) @ weights
    n_tried = min(N_TRIED, len(rows))
    picks: list[int] = []
    for _ in range(n_instances):
        while True:
            tried = np.argpartition(-gains, n_tried - 1)[:n_tried]
            tried = tried[gains[tried] >= 0]
            gains[tried] = np.maximum(similar[tried] - covered, 0) @ weights
            best = int(gains.argmax())
            if best in tried:
                break
        picks.append(best)
        gains[best] = -np.inf
        covered = np.maximum(covered, similar[best])
    return rows[picks]


def pick_by_max_herding(
    products: PoolProducts, rows: Matrix, n_instances: int, rng: np.random.Generator
) -> Matrix:
    weights = np.ones(len(rows), products.similarity.dtype)
    return pick_by_herding(products, rows, n_instances, weights)


def pick_by_u_herding(
    products: PoolProducts, rows: Matrix, n_instances: int, rng: np.random.Generator
) -> Matrix:
    return pick_by_herding(products, rows, n_instances, products.uncertainty[rows])


def pick_by_bait(
    products: PoolProducts, rows: Matrix, n_instances: int, rng: np.random.Generator
) -> Matrix:
    """Pick like `bait_binary`: twice as many greedily, then drop one by one.

    M^-1 is updated by vectors: after picks q with e = V M^-1 v_q, g = V M^-1 F M^-1 v_q and
    t = 1 + v_q M^-1 v_q, all of them at the time of the pick,

        V M^-1 V^T       <- V M^-1 V^T - e e^T / t,
        V M^-1 F M^-1 V^T <- V M^-1 F M^-1 V^T - (e g^T + g e^T) / t + g_q e e^T / t^2.
    """
    n_forward = min(len(rows), 2 * n_instances)
    size, gain = products.inverse[rows, rows], products.objective[rows, rows]
    E, G = np.empty((2, n_forward, len(rows)))
    T, H = np.empty((2, n_forward))
    picks: list[int] = []
    for s in range(n_forward):
        gains = gain / (1 + size)
        gains[picks] = -np.inf
        p = int(gains.argmax())
        picks.append(p)
        before, by = E[:s], E[:s, p] / T[:s]
        E[s] = products.inverse[rows[p], rows] - by @ before
        twice = G[:s, p] / T[:s] - by * H[:s] / T[:s]
        G[s] = products.objective[rows[p], rows] - by @ G[:s] - twice @ before
        T[s], H[s] = 1 + E[s, p], G[s, p]
        size = size - E[s] ** 2 / T[s]
        gain = gain - 2 * E[s] * G[s] / T[s] + H[s] * (E[s] / T[s]) ** 2
    among, e, g = np.ix_(rows[picks], rows[picks]), E[:, picks], G[:, picks]
    inverse = products.inverse[among] - (e.T / T) @ e
    cross = (e.T / T) @ g
    objective = products.objective[among] - cross - cross.T + (e.T * (H / T**2)) @ e
    return rows[np.array(picks)[drop(inverse, objective, n_instances)]]


def drop(inverse: Matrix, objective: Matrix, n_kept: int) -> Matrix:
    """Return what is left when picks with the least costly removals are dropped one by one."""
    left = np.arange(len(inverse))
    while len(left) > n_kept:
        t = 1 - np.diag(inverse)
        p = int((np.diag(objective) / t).argmin())
        e, g = inverse[p], objective[p]
        cross = np.outer(e, g) / t[p]
        objective = objective + cross + cross.T + g[p] * np.outer(e, e) / t[p] ** 2
        inverse = inverse + np.outer(e, e) / t[p]
        kept = np.delete(np.arange(len(left)), p)
        inverse, objective = (part[np.ix_(kept, kept)] for part in (inverse, objective))
        left = left[kept]
    return left


MEMBERS: list[Callable[[PoolProducts, Matrix, int, np.random.Generator], Matrix]] = [
    pick_random,
    pick_by_margin,
    pick_by_badge,
    pick_by_bait,
    pick_by_max_herding,
    pick_by_u_herding,
]


def refine(learner: Any, X_pool: Any, n_instances: int = 1) -> np.ndarray:
    """REFINE (Huseljic et al. 2026): filter the pool by several strategies, then UHerding.

    Five times each strategy picks batches, each from another random subset of 40% of what is left
    of the pool (and of at least one batch); what none of them picked is dropped. UHerding chooses
    from the rest.

    Other than the paper: 24 batches a round, four by each strategy, instead of 100; six of its nine
    strategies (no TypiClust, AlfaMix and DropQuery, which cluster for each batch); subsets of 40%
    in the first round, too, where the paper has 5,000 samples, more than the study has;
    UHerding with radius 1 and the net's own probabilities; and BAIT's F is that of the whole pool.
    """
    products = PoolProducts.of(learner, X_pool, n_instances)
    rng = np.random.default_rng(drawn_seed())
    rows = np.arange(len(X_pool))
    for _ in range(N_ROUNDS):
        size = min(len(rows), max(n_instances, min(LARGEST, int(SHARE * len(rows)))))
        batches = [
            member(products, np.sort(rng.choice(rows, size, replace=False)), n_instances, rng)
            for member in MEMBERS
            for _ in range(N_BATCHES)
        ]
        rows = np.unique(np.concatenate(batches))
    return pick_by_u_herding(products, rows, n_instances, rng)


def pure_radii(distances: Tensor, agrees: Tensor, purity: float) -> Tensor:
    """Return the radius of each labelled sample's ball, by bisection.

    Parameters
    ----------
    distances : Tensor of shape (n_labeled, n)
        To all samples.
    agrees : Tensor of shape (n_labeled, n), bool
        Whether the predicted class of a sample is the label.
    purity : float
        Least share of a ball that agrees.
    """
    low = distances.new_zeros(len(distances))
    width = LARGEST_RADIUS
    while width > RESOLUTION:
        width /= 2
        inside = distances < (low + width)[:, None]
        is_pure = (inside & agrees).sum(1) >= purity * inside.sum(1)
        low = torch.where(is_pure, low + width, low)
    return low + width / 2


def competence(coverage: float) -> float:
    """Return the weight of the margin: about 0 while much is not covered, 1 where all is."""
    at_most = 1 + np.exp(STEEPNESS * (CENTER - 1))
    return float(at_most / (1 + np.exp(STEEPNESS * (CENTER - coverage))))


def dcom(learner: Any, X_pool: Any, n_instances: int = 1) -> np.ndarray:
    """DCoM (Mishal and Weinshall 2024): density of what is not covered, and margin.

    A labelled sample covers a ball on the inputs of unit length, as large as the predicted classes
    in it agree with its label. The more the balls cover, the more the margin counts:
    score = s (1 - margin) + (1 - s) density, both scaled to [0, 1]; the density of a sample is the
    number of samples nearer than the mean radius that neither a ball nor a pick covers.

    Other than the authors' code, which keeps the radii of earlier queries, all radii are those of
    the net as it is. The purity asked for grows with the coverage, 0.4 + 0.2 c, where c is that of
    radii for a purity of 0.4.
    """
    pool, labeled = (F.normalize(inputs(X)) for X in (X_pool, learner.X_training))
    both, n_labeled = torch.cat([labeled, pool]), len(labeled)
    probabilities = torch.as_tensor(
        np.concatenate([learner.predict_proba(X) for X in (learner.X_training, X_pool)])
    )
    distances = torch.cdist(labeled, both)
    agrees = torch.as_tensor(learner.y_training)[:, None] == probabilities.argmax(1)
    covered = torch.zeros(len(both), dtype=torch.bool)
    for coverage in (0.0, None):
        share = float(covered.double().mean()) if coverage is None else coverage
        radii = pure_radii(distances, agrees, 0.4 + 0.2 * share)
        covered = (distances < radii[:, None]).any(0)
        covered[:n_labeled] = True
    weight = competence(float(covered.double().mean()))
    uncertainty = margin_uncertainty(probabilities)
    uncertainty = ((uncertainty - uncertainty.min())[n_labeled:]).numpy().copy()
    near = (torch.cdist(pool, pool) < radii.mean()).numpy()
    near[np.arange(len(pool)), np.arange(len(pool))] = True
    uncovered = ~covered[n_labeled:].numpy()
    density = near[:, uncovered].sum(1).astype(float)
    picks: list[int] = []
    for _ in range(n_instances):
        score = weight * scaled(uncertainty) + (1 - weight) * scaled(density)
        score[picks] = -np.inf
        pick = int(score.argmax())
        picks.append(pick)
        uncertainty[pick] = 0
        new = near[pick] & uncovered
        density -= near[:, new].sum(1)
        uncovered &= ~new
    return np.array(picks)


def scaled(values: np.ndarray) -> np.ndarray:
    """Divide by the largest; labelled samples, which have 0, are the least."""
    return values / max(values.max(), 1e-12)
