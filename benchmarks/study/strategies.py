"""The query strategies of the label-efficiency study, all called as modAL calls a strategy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from modAL.uncertainty import entropy_sampling, margin_sampling
from skactiveml.base import SkactivemlClassifier
from skactiveml.pool import Badge, CoreSet, DropQuery, MaxHerding, TypiClust
from sklearn.base import BaseEstimator, clone
from sklearn.cluster import KMeans, MiniBatchKMeans
from sklearn.utils import check_random_state
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.study.herding import herd
from benchmarks.study.results import REDUCED
from skfishermask import PUBLISHED, FisherMaskSampler, select_batch
from skfishermask.data.batches import NetBatches
from skfishermask.data.logits import to_logits_of
from skfishermask.data.unwrap import unwrap
from skfishermask.fisher import fisher_embedding, fisher_matrix, margin_uncertainty
from skfishermask.fisher.mask import ParameterMask
from skfishermask.jacobian.isolation import exact_mode, isolated

BATCH_SIZE = 256


@torch.no_grad()
def features_and_logits(net: Any, X: Any) -> tuple[Tensor, Tensor]:
    """Return the input of the last linear layer (n, d), and the logits (n, C)."""
    module, to_logits = net.module_, to_logits_of(net)
    last = [m for m in module.modules() if isinstance(m, nn.Linear)][-1]
    features: list[Tensor] = []
    logits = []
    hook = last.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
    try:
        with isolated(module), exact_mode():
            for batch in NetBatches(net, X, batch_size=BATCH_SIZE):
                logits.append(to_logits(module(batch)).detach())
    finally:
        hook.remove()
    return torch.cat(features).detach(), torch.cat(logits)


class FromNet(SkactivemlClassifier):
    """Probabilities that a function gives for samples, as scikit-activeml wants a classifier."""

    def __init__(
        self,
        probabilities: Any = None,
        classes: Any = None,
        missing_label: float = np.nan,
        cost_matrix: Any = None,
        random_state: Any = None,
    ) -> None:
        super().__init__(classes, missing_label, cost_matrix, random_state)
        self.probabilities = probabilities

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> FromNet:
        return self

    def predict_proba(self, X: Any) -> np.ndarray:
        return self.probabilities(X)

    def predict(self, X: Any, **kwargs: Any) -> np.ndarray:
        return self.probabilities(X).argmax(axis=1)


def drawn_seed() -> int:
    """Draw a seed from the global generator, which is seeded for the query."""
    return int(check_random_state(None).randint(2**31 - 1))


def inputs(X: Any) -> Tensor:
    """Return the samples as the net takes them, flattened to (n, d)."""
    return torch.as_tensor(X).flatten(1)


def unit_inputs(X: Any) -> np.ndarray:
    """Return the samples flattened and scaled to unit length."""
    return F.normalize(inputs(X).double()).numpy()


def k_center(learner: Any, X_pool: Any, n_instances: int = 1) -> np.ndarray:
    """Core-set selection on the penultimate features, by scikit-activeml."""
    net = unwrap(learner).net
    labeled, _ = features_and_logits(net, learner.X_training)
    pool, _ = features_and_logits(net, X_pool)
    return CoreSet(random_state=drawn_seed()).query(
        labeled.numpy(force=True).astype(float),
        learner.y_training.astype(float),
        candidates=pool.numpy(force=True).astype(float),
        batch_size=n_instances,
    )


def badge(learner: Any, X_pool: Any, n_instances: int = 1) -> np.ndarray:
    """BADGE (Ash et al. 2020) by scikit-activeml."""
    net = unwrap(learner).net
    labeled, _ = features_and_logits(net, learner.X_training)
    pool, logits = features_and_logits(net, X_pool)
    probabilities = logits.double().softmax(1).numpy(force=True)
    return np.asarray(
        Badge(random_state=drawn_seed()).query(
            labeled.numpy(force=True).astype(float),
            learner.y_training.astype(float),
            clf=FromNet(lambda _: probabilities),
            fit_clf=False,
            candidates=pool.numpy(force=True).astype(float),
            batch_size=n_instances,
        )
    )


def max_herding(learner: Any, X_pool: Any, n_instances: int = 1) -> np.ndarray:
    """MaxHerding (Bae et al. 2024) by scikit-activeml, with the authors' kernel of radius 1."""
    return MaxHerding(metric_dict={"gamma": 1.0}, random_state=drawn_seed()).query(
        unit_inputs(learner.X_training),
        learner.y_training.astype(float),
        candidates=unit_inputs(X_pool),
        batch_size=n_instances,
    )


def typi_clust(learner: Any, X_pool: Any, n_instances: int = 1) -> np.ndarray:
    """TypiClust (Hacohen et al. 2022) by scikit-activeml, with the authors' clustering and k."""
    n_labeled = len(learner.X_training)
    few = n_labeled + n_instances <= 50
    strategy = TypiClust(
        cluster_algo=KMeans if few else MiniBatchKMeans,
        cluster_algo_dict={} if few else {"batch_size": 5000},
        k=20,
        random_state=drawn_seed(),
    )
    X = np.concatenate([unit_inputs(learner.X_training), unit_inputs(X_pool)])
    y = np.concatenate([learner.y_training, np.full(len(X_pool), np.nan)])
    return np.asarray(strategy.query(X, y, batch_size=n_instances)) - n_labeled


def tcm(learner: Any, X_pool: Any, n_instances: int = 1) -> np.ndarray:
    """TCM (Doucet et al. 2024): TypiClust, then margin; here from 5 labels a class on."""
    classes = unwrap(learner).net.classes_
    if len(learner.y_training) < 5 * len(classes):
        return typi_clust(learner, X_pool, n_instances)
    return margin_sampling(learner, X_pool, n_instances=n_instances)[0]


def drop_query(learner: Any, X_pool: Any, n_instances: int = 1) -> np.ndarray:
    """DropQuery (Gupte et al. 2024) by scikit-activeml: 3 draws that drop 75% of the inputs."""
    shape = X_pool.shape[1:]

    def probabilities(X: np.ndarray) -> np.ndarray:
        return learner.predict_proba(X.reshape(-1, *shape).astype(X_pool.dtype))

    n_labeled = len(learner.X_training)
    X = torch.cat([inputs(learner.X_training), inputs(X_pool)]).numpy()
    y = np.concatenate([learner.y_training, np.full(len(X_pool), np.nan)])
    seed = drawn_seed()
    strategy = DropQuery(
        dropout_rate=0.75,
        n_dropout_samples=3,
        cluster_algo_dict={"random_state": seed},
        random_state=seed,
    )
    found = strategy.query(X, y, clf=FromNet(probabilities), fit_clf=False, batch_size=n_instances)
    return np.asarray(found) - n_labeled


def calibration_error(probabilities: Tensor, y: Tensor, n_bins: int = 15) -> float:
    """Compute the expected calibration error: |accuracy - confidence| by bins of confidence."""
    confidence, predicted = probabilities.max(1)
    bins = (confidence * n_bins).long().clamp(max=n_bins - 1)
    difference = torch.zeros(n_bins, dtype=confidence.dtype)
    difference.index_add_(0, bins, (predicted == y).to(confidence.dtype) - confidence)
    return float(difference.abs().sum()) / len(y)


def temperature(learner: Any) -> float:
    """Find the temperature that calibrates a net on a fifth of the labels, held out."""
    X, y = learner.X_training, np.asarray(learner.y_training)
    order = check_random_state(None).permutation(len(y))
    held, kept = np.split(order, [max(1, len(y) // 5)])
    classes = np.unique(y[kept])
    held = held[np.isin(y[held], classes)]
    if len(classes) < 2 or not len(held):
        return 1.0
    net = clone(unwrap(learner).net).fit(X[kept], np.searchsorted(classes, y[kept]))
    _, logits = features_and_logits(net, X[held])
    logits = logits[:, : len(classes)].double()  # the net has an output for classes it has not seen
    targets = torch.as_tensor(np.searchsorted(classes, y[held]))
    return min(
        np.logspace(-1, 1, 49),
        key=lambda t: calibration_error((logits / t).softmax(1), targets),
    )


def u_herding(learner: Any, X_pool: Any, n_instances: int = 1) -> np.ndarray:
    """UHerding (Bae et al. 2025) as its authors adapt it.

    The radius is the smallest distance between two labelled samples, and the temperature of the
    probabilities is calibrated on held-out labels.
    """
    net = unwrap(learner).net
    _, logits = features_and_logits(net, X_pool)
    probabilities = (logits.double() / temperature(learner)).softmax(1)
    pool, labeled = (F.normalize(inputs(X)) for X in (X_pool, learner.X_training))
    distances = torch.pdist(labeled)
    radius = float(distances[distances > 1e-6].min())
    weights = margin_uncertainty(probabilities).to(pool)
    return np.array(herd(pool, labeled, weights, n_instances, radius=radius))


def u_herding_fixed(learner: Any, X_pool: Any, n_instances: int = 1) -> np.ndarray:
    """UHerding with MaxHerding's radius 1, and the net's own probabilities."""
    pool, labeled = (F.normalize(inputs(X)) for X in (X_pool, learner.X_training))
    weights = margin_uncertainty(torch.as_tensor(learner.predict_proba(X_pool))).to(pool)
    return np.array(herd(pool, labeled, weights, n_instances))


def bait_binary(learner: Any, X_pool: Any, n_instances: int = 1) -> np.ndarray:
    """BAIT Binary (Huseljic et al. 2024): V = sqrt(q (1 - q)) h, q the largest probability."""
    net = unwrap(learner).net

    def embed(X: Any) -> Tensor:
        features, logits = features_and_logits(net, X)
        q = logits.softmax(1).amax(1, keepdim=True)
        return (features * (q * (1 - q)).sqrt()).unsqueeze(1)

    pool, labeled = embed(X_pool), embed(learner.X_training)
    positions, _ = select_batch(
        pool,
        n_instances,
        fisher_matrix(torch.cat([pool, labeled])),
        fisher_labeled=fisher_matrix(labeled),
        n_labeled=len(labeled),
        oversample=2.0,
    )
    return positions.numpy(force=True)


def predicted_balance(probabilities: np.ndarray) -> float:
    """Return the effective number of predicted classes, 1 / sum_c (mean p_c)^2, as a share."""
    mean = probabilities.mean(axis=0)
    return float(1 / ((mean**2).sum() * len(mean)))


def early_share(learner: Any, X_pool: Any) -> float:
    """Return a share of coverage that falls to 0 at 20 labels a class or for unbalanced classes."""
    probabilities = learner.predict_proba(X_pool)
    early = 1 - len(learner.X_training) / (20 * probabilities.shape[1])
    return max(0.0, early) * max(0.0, 2 * predicted_balance(probabilities) - 1)


def coverage_at_first(learner: Any, X_pool: Any, n_instances: int = 1) -> Any:
    """FisherMask with the default share of coverage of the second round."""
    sampler = fisher(coverage_share=early_share(learner, X_pool), random_state=drawn_seed())
    return sampler(learner, X_pool, n_instances)


class WithCoverage(BaseEstimator):
    """A share of the batch by UHerding (radius 1), the rest by FisherMask given these.

    Parameters
    ----------
    share : float or None, default=None
        None: all of it where the classes that the net predicts for the pool are balanced, none
        where their effective number, 1 / sum_c (mean p_c)^2, is half of the number of classes.
    regularization : float, default=0.01
        FisherMask's.
    """

    def __init__(self, share: float | None = None, regularization: float = 0.01) -> None:
        self.share = share
        self.regularization = regularization

    def __call__(self, learner: Any, X_pool: Any, n_instances: int = 1) -> np.ndarray:
        share = self.share
        if share is None:
            share = max(0.0, 2 * predicted_balance(learner.predict_proba(X_pool)) - 1)
        n_covering = round(share * n_instances)
        if n_covering == 0:
            return self._fishermask(learner, X_pool, n_instances, learner.X_training)
        covering = u_herding_fixed(learner, X_pool, n_covering)
        if n_covering == n_instances:
            return covering
        rest = np.setdiff1d(np.arange(len(X_pool)), covering)
        labeled = np.concatenate([learner.X_training, X_pool[covering]])
        n_left = n_instances - n_covering
        others = self._fishermask(learner, X_pool[rest], n_left, labeled)
        return np.concatenate([covering, rest[others]])

    def _fishermask(self, learner: Any, X_pool: Any, n: int, X_labeled: Any) -> np.ndarray:
        sampler = fisher(regularization=self.regularization, random_state=drawn_seed())
        return sampler(learner, X_pool, n, X_labeled=X_labeled)[0]


class CoverageWeighted(BaseEstimator):
    """FisherMask on embeddings weighted by what the labels do not cover yet.

    V(x) <- sqrt(w(x) / mean w) V(x) for the candidates and in F, where w(x) = 1 - max_l k(x, l)
    over the labelled l, k(a, b) = exp(-|a - b|^2 / radius^2) on inputs of unit length.

    Parameters
    ----------
    radius : float, default=1.0
        Of the kernel.
    regularization : float, default=0.01
        FisherMask's.
    """

    def __init__(self, radius: float = 1.0, regularization: float = 0.01) -> None:
        self.radius = radius
        self.regularization = regularization

    def __call__(
        self, learner: Any, X_pool: Any, n_instances: int = 1
    ) -> tuple[np.ndarray, np.ndarray]:
        # One pick from one candidate, for the mask.
        sampler = fisher(max_candidates=1, random_state=drawn_seed())
        sampler(learner, X_pool, 1)
        net = unwrap(learner).net
        pool, labeled = (self._embed(net, X, sampler.mask_) for X in (X_pool, learner.X_training))
        weights = self._uncovered(X_pool, learner.X_training)
        pool *= (weights / weights.mean()).sqrt()[:, None, None]
        n, n_labeled = len(pool), len(labeled)
        positions, gains = select_batch(
            pool,
            n_instances,
            fisher_matrix(pool) * (n / (n + n_labeled)),  # a labelled sample covers itself
            fisher_labeled=fisher_matrix(labeled),
            n_labeled=n_labeled,
            regularization=self.regularization,
        )
        return positions.numpy(force=True), gains.numpy(force=True)

    def _uncovered(self, X_pool: Any, X_labeled: Any) -> Tensor:
        pool, labeled = (F.normalize(inputs(X)) for X in (X_pool, X_labeled))
        nearest = torch.cdist(pool, labeled).amin(1)
        return 1 - torch.exp(-nearest.square() / self.radius**2)

    def _embed(self, net: Any, X: Any, mask: ParameterMask) -> Tensor:
        return fisher_embedding(
            net.module_,
            NetBatches(net, X, batch_size=BATCH_SIZE),
            mask,
            to_logits=to_logits_of(net),
        )


def fisher(**parameters: Any) -> FisherMaskSampler:
    return FisherMaskSampler(**PUBLISHED | {"batch_size": BATCH_SIZE} | parameters)


PEERS: dict[str, Callable[..., Any] | str] = {
    "random": "random",
    "entropy": entropy_sampling,
    "margin": margin_sampling,
    "k-center": k_center,
    "BADGE": badge,
    "BAIT": fisher(mask="output_layer", oversample=2.0),
    "BAIT Binary": bait_binary,
    "TypiClust": typi_clust,
    "TCM": tcm,
    "DropQuery": drop_query,
    "MaxHerding": max_herding,
    "UHerding": u_herding,
    "UHerding, radius 1": u_herding_fixed,
}
FISHERMASK: dict[str, Callable[..., Any] | str] = {
    "FisherMask": fisher(),
    "FisherMask, lambda 0.01": fisher(regularization=0.01),
    "FisherMask, 1 direction": fisher(n_directions=1),
    "FisherMask, 3 directions": fisher(n_directions=3),
    REDUCED: fisher(n_directions="auto", n_mask_samples=128),
    "FisherMask, identity target": fisher(target="identity"),
    "FisherMask, per-layer mask": fisher(mask="per_layer"),
    "FisherMask, relative mask": fisher(mask="relative"),
    "FisherMask, random mask": fisher(mask="random"),
    "FisherMask, output layer": fisher(mask="output_layer"),
    "FisherMask, all parameters": fisher(mask="all"),
    "FisherMask, half coverage": WithCoverage(0.5),
    "FisherMask, coverage where balanced": WithCoverage(),
    "FisherMask, coverage-weighted": CoverageWeighted(),
    "FisherMask, coverage at first": coverage_at_first,
}
STRATEGIES = PEERS | FISHERMASK
