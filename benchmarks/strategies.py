"""The query strategies of the label-efficiency study, all called as modAL calls a strategy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from modAL.uncertainty import entropy_sampling, margin_sampling
from skactiveml.base import SkactivemlClassifier
from skactiveml.pool import Badge, CoreSet
from sklearn.base import BaseEstimator
from sklearn.utils import check_random_state
from torch import Tensor, nn

from skfishermask import FisherMaskSampler, select_batch
from skfishermask.data.batches import NetBatches
from skfishermask.data.logits import to_logits_of
from skfishermask.data.unwrap import unwrap
from skfishermask.fisher import fisher_embedding, fisher_matrix
from skfishermask.fisher.mask import ParameterMask
from skfishermask.fisher.visit import exact_mode, visit

BATCH_SIZE = 256


@torch.no_grad()
def features_and_logits(net: Any, X: Any) -> tuple[Tensor, Tensor]:
    """Input of the last linear layer (n, d), and the logits (n, C)."""
    module, to_logits = net.module_, to_logits_of(net)
    last = [m for m in module.modules() if isinstance(m, nn.Linear)][-1]
    features: list[Tensor] = []
    logits = []
    hook = last.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
    try:
        with visit(module), exact_mode():
            for batch in NetBatches(net, X, batch_size=BATCH_SIZE):
                logits.append(to_logits(module(batch)).detach())
    finally:
        hook.remove()
    return torch.cat(features).detach(), torch.cat(logits)


class LastLayer(SkactivemlClassifier):
    """The network's output layer as a classifier of its features, as scikit-activeml wants one."""

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

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> LastLayer:
        return self

    def predict_proba(self, X: Any) -> np.ndarray:
        return self.probabilities


def k_center(learner: Any, X_pool: Any, n_instances: int = 1) -> np.ndarray:
    """Core-set selection on the penultimate features, by scikit-activeml."""
    net = unwrap(learner).net
    labeled, _ = features_and_logits(net, learner.X_training)
    pool, _ = features_and_logits(net, X_pool)
    strategy = CoreSet(random_state=check_random_state(None).randint(2**31 - 1))
    return strategy.query(
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
    strategy = Badge(random_state=check_random_state(None).randint(2**31 - 1))
    return np.asarray(
        strategy.query(
            labeled.numpy(force=True).astype(float),
            learner.y_training.astype(float),
            clf=LastLayer(logits.double().softmax(1).numpy(force=True)),
            fit_clf=False,
            candidates=pool.numpy(force=True).astype(float),
            batch_size=n_instances,
        )
    )


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


class WeightedTarget(BaseEstimator):
    """FisherMask with another target.

    F is the mean over the classes of the mean Fisher information of the samples that the network
    puts there (`balanced`), or the pool and the labelled samples have given shares in it
    (`pool_share`). `regularization` is a multiple of tr(F) / k where `relative` is True.
    """

    def __init__(
        self,
        balanced: bool = True,
        regularization: float = 1.0,
        relative: bool = False,
        n_directions: int | None = None,
        mask: str = "global",
        oversample: float = 1.0,
        pool_share: float | None = None,
    ) -> None:
        self.balanced = balanced
        self.regularization = regularization
        self.relative = relative
        self.n_directions = n_directions
        self.mask = mask
        self.oversample = oversample
        self.pool_share = pool_share

    def __call__(
        self, learner: Any, X_pool: Any, n_instances: int = 1
    ) -> tuple[np.ndarray, np.ndarray]:
        # One pick by the sampler, for its mask; then the same mathematics with another F.
        sampler = FisherMaskSampler(
            mask=self.mask, batch_size=BATCH_SIZE, n_directions=self.n_directions, random_state=0
        )
        sampler(learner, X_pool, 1)
        net, mask = unwrap(learner).net, sampler.mask_
        pool, labeled = (self._embed(net, X, mask) for X in (X_pool, learner.X_training))
        V = torch.cat([pool, labeled])
        if self.balanced:
            _, logits = features_and_logits(net, np.concatenate([X_pool, learner.X_training]))
            predicted = logits.argmax(1)
            parts = [V[predicted == c] for c in predicted.unique()]
            fisher = torch.stack([fisher_matrix(part) for part in parts]).mean(0)
        elif self.pool_share is not None:
            share = self.pool_share
            fisher = share * fisher_matrix(pool) + (1 - share) * fisher_matrix(labeled)
        else:
            fisher = fisher_matrix(V)
        scale = float(fisher.trace()) / len(fisher) if self.relative else 1.0
        positions, gains = select_batch(
            pool,
            n_instances,
            fisher,
            fisher_labeled=fisher_matrix(labeled),
            n_labeled=len(labeled),
            regularization=self.regularization * scale,
            oversample=self.oversample,
        )
        return positions.numpy(force=True), gains.numpy(force=True)

    def _embed(self, net: Any, X: Any, mask: ParameterMask) -> Tensor:
        return fisher_embedding(
            net.module_,
            NetBatches(net, X, batch_size=BATCH_SIZE),
            mask,
            n_directions=self.n_directions,
            to_logits=to_logits_of(net),
        )


def fisher(**parameters: Any) -> FisherMaskSampler:
    return FisherMaskSampler(batch_size=BATCH_SIZE, **parameters)


PEERS: dict[str, Callable[..., Any] | str] = {
    "random": "random",
    "entropy": entropy_sampling,
    "margin": margin_sampling,
    "k-center": k_center,
    "BADGE": badge,
    "BAIT": fisher(mask="output_layer", oversample=2.0),
    "BAIT Binary": bait_binary,
}
FISHERMASK: dict[str, Callable[..., Any] | str] = {
    "FisherMask": fisher(),
    "FisherMask, 1 direction": fisher(n_directions=1),
    "FisherMask, 3 directions": fisher(n_directions=3),
    "FisherMask, unweighted": fisher(weighting="none"),
    "FisherMask, half by entropy": fisher(entropy_share=0.5),
    "FisherMask, per-layer mask": fisher(mask="per_layer"),
    "FisherMask, relative mask": fisher(mask="relative"),
    "FisherMask, random mask": fisher(mask="random"),
    "FisherMask, output layer": fisher(mask="output_layer"),
    "FisherMask, all parameters": fisher(mask="all"),
}
# What was tried to make it better.
VARIANTS: dict[str, Callable[..., Any] | str] = {
    "oversample 2": fisher(oversample=2.0),
    "lambda 0.1": fisher(regularization=0.1),
    "lambda 0.01": fisher(regularization=0.01),
    "lambda tr(F)/k": WeightedTarget(balanced=False, relative=True),
    "balanced target": WeightedTarget(),
    "pool alone in F": WeightedTarget(balanced=False, pool_share=1.0),
    "half of F from the pool": WeightedTarget(balanced=False, pool_share=0.5),
    "mask of 450": fisher(mask_fraction=450),
    "mask of 1320": fisher(mask_fraction=1320),
    "quarter by entropy": fisher(entropy_share=0.25),
    "1 direction, lambda 0.01": fisher(n_directions=1, regularization=0.01),
    "3 directions, lambda 0.01": fisher(n_directions=3, regularization=0.01),
    "1 direction, oversample 2": fisher(n_directions=1, oversample=2.0),
    "identity target": fisher(target="identity"),
}
STRATEGIES = PEERS | FISHERMASK | VARIANTS
