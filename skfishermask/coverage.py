"""Coverage of the inputs, weighted by uncertainty.

A Gaussian process on the inputs, with kernel k and noise s, has a posterior variance at each
sample given the labelled ones and the batch. The batch that makes its weighted sum over the pool
small is chosen by the same greedy loop as one by Fisher information. With the kernel's features
phi(x), k(x, x') = phi(x) phi(x')^T,

    sum_j u_j var(x_j) = s tr(M^-1 F),
    M = s I + sum_i phi_i^T phi_i,    F = sum_j u_j phi_j^T phi_j,

where i runs over the labelled samples and the batch, and j over the pool.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from skfishermask.fisher import fisher_matrix
from skfishermask.selection import (
    SelectionProblem,
    StoredEmbedding,
    fingerprints,
    first_of_equals,
    in_one_thread,
    stored,
    unit_roundoff,
)

# Landmarks of the kernel: 500 keep 97% of what exact features reduce, at a tenth of the cost.
_N_LANDMARKS = 500
# ... and at least this number for each pick, or the last picks have nothing left to explain.
_LANDMARKS_PER_PICK = 2
# Labelled samples that the kernel is conditioned on, exactly; more of them change few picks.
_N_CONDITIONED = 2000
# Noise of the Gaussian process, for a kernel of 1 on the diagonal.
_NOISE = 0.02
# Smaller eigenvalues of a kernel matrix, relative to the largest, are rounding errors.
_EIGENVALUE_ROUNDING = 1e-6
# Least probability of a sample to be a landmark, relative to the mean.
_LEAST_WEIGHT = 1e-3
# Rows of inputs that are cast to float64 in one go.
_CHUNK_ROWS = 2048


@dataclass(frozen=True)
class KernelFeatures:
    """Features of the kernel k(a, b) = exp(-|a - b|^2 / radius^2), given labelled samples.

    They are those of the posterior covariance k(a, b) - k(a, L) (k(L, L) + s I)^-1 k(L, b) of a
    Gaussian process with noise s, at landmarks (Nyström method [1]_): exact where the landmarks
    are all samples.

    Attributes
    ----------
    centers : Tensor of shape (m + n_labeled, d), float64
        Landmarks and labelled samples, of unit length.
    weights : Tensor of shape (m + n_labeled, n_features), float64
        By which the kernel at the centers becomes the features; n_features is at most m.
    radius : float
        Length scale of the kernel.

    References
    ----------
    .. [1] C. Williams, M. Seeger, "Using the Nyström Method to Speed Up Kernel Machines", NIPS
       2000.
    """

    centers: Tensor
    weights: Tensor
    radius: float = 1.0

    @classmethod
    def at(
        cls, landmarks: Tensor, labeled: Tensor, *, noise: float = _NOISE, radius: float = 1.0
    ) -> KernelFeatures:
        """Return the features at some landmarks.

        Parameters
        ----------
        landmarks, labeled : Tensor of shape (m, d), (n_labeled, d)
            Samples of unit length.
        noise : float, default=0.02
            Noise of the Gaussian process.
        radius : float, default=1.0
            Length scale of the kernel.
        """
        if landmarks.device.type == "cpu":
            return in_one_thread(partial(cls._at, landmarks, labeled, noise, radius))
        return cls._at(landmarks, labeled, noise, radius)

    @classmethod
    def _at(cls, landmarks: Tensor, labeled: Tensor, noise: float, radius: float) -> KernelFeatures:
        centers = normalize(torch.cat([landmarks, labeled]).double())
        m = len(landmarks)
        matrix = kernel(centers, centers, radius)
        covariance, cross, own = matrix[:m, :m], matrix[m:, :m], matrix[m:, m:]
        own.diagonal().add_(noise)
        solved = torch.linalg.solve(own, cross)
        covariance = covariance - cross.T @ solved
        values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
        kept = values > _EIGENVALUE_ROUNDING * values[-1]
        whitening = vectors[:, kept] / values[kept].sqrt()
        return cls(centers, torch.cat([whitening, -solved @ whitening]), radius)

    def __call__(self, inputs: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        """Return the features of samples of unit length, (n, d), as an embedding (n, 1, m).

        In float32 they take half the time. Equal samples have equal features then too, and so tie,
        although float32 rounds equal rows of a product differently.
        """
        centers, weights = self.centers.to(dtype), self.weights.to(dtype)
        features = inputs.new_empty((len(inputs), weights.shape[1]), dtype=dtype)
        marks = []
        for chunk, out in zip(inputs.split(_CHUNK_ROWS), features.split(_CHUNK_ROWS), strict=True):
            units = normalize(chunk.double())
            torch.mm(kernel(units.to(dtype), centers, self.radius), weights, out=out)
            if dtype != torch.float64:
                # Of samples that differ by a factor, units differ in float64's last digits.
                marks.append(fingerprints(units.to(dtype)))
        first = first_of_equals(torch.cat(marks)) if marks else None
        return (features if first is None else features[first])[:, None]


def kernel(a: Tensor, b: Tensor, radius: float) -> Tensor:
    """Return exp(-|a - b|^2 / radius^2) for all pairs of rows."""
    # Not all rows have unit length: one of zeros has none.
    squares = b.square().sum(1).addmm(a, b.T, alpha=-2).add_(a.square().sum(1)[:, None])
    return squares.mul_(-1 / radius**2).clamp_(max=0).exp_()


@torch.no_grad()
def coverage_problem(
    pool: Tensor,
    labeled: Tensor,
    weights: Tensor,
    n_instances: int,
    rng: np.random.RandomState,
    *,
    target: Tensor | None = None,
) -> tuple[StoredEmbedding, SelectionProblem]:
    """Return the embedding and the problem of a batch that covers the pool, or a target.

    The batch reduces the weighted posterior variance most. With the uncertainty of the
    predictions as weights this is close to UHerding [1]_, which counts the nearest pick alone; with
    equal ones it needs no predictions.

    Parameters
    ----------
    pool, labeled : Tensor of shape (n, d), (n_labeled, d)
        Samples of unit length.
    weights : Tensor of shape (n,), or (n_target,)
        Weights u of the samples to cover, not negative. If all are zero they count as equal.
    n_instances : int
        Number of samples to select, at most n.
    rng : RandomState
        Draws landmarks, in proportion to the weights, where there are more than 500 samples.
    target : Tensor of shape (n_target, d), optional
        Samples to cover, of unit length. None: the pool.

    Returns
    -------
    embedding : StoredEmbedding of shape (n, 1, n_features)
        Features of the kernel, given the labelled samples.
    problem : SelectionProblem
        With the noise for the regularization, and the mean of u phi^T phi for F.

    References
    ----------
    .. [1] W. Bae, G. L. Oliveira, D. J. Sutherland, "Uncertainty Herding: One Active Learning
       Method for All Label Budgets", ICLR 2025, arXiv 2412.20644.
    """
    if not bool(weights.any()):
        weights = torch.ones_like(weights)
    landmarks, shares = pool, weights
    if target is not None:
        # Of both, or the features would tell too little of the pool's samples.
        landmarks = torch.cat([pool, target])
        mean = weights.mean().expand(len(pool)) * (len(target) / len(pool))
        shares = torch.cat([mean, weights])
    n_landmarks = max(_N_LANDMARKS, _LANDMARKS_PER_PICK * n_instances)
    # Where features are exact, samples that differ may tie too; and the weights of the features
    # enlarge what a mode of reduced precision leaves out.
    is_large, is_exact = len(landmarks) > n_landmarks, unit_roundoff(torch.float32) < 1e-6
    dtype = torch.float32 if is_large and is_exact else torch.float64
    if is_large:
        share = shares.double().cpu().numpy() + _LEAST_WEIGHT * float(weights.mean())
        drawn = _drawn(rng, len(landmarks), n_landmarks, pool.device, share / share.sum())
        landmarks = landmarks[drawn]
    if len(labeled) > _N_CONDITIONED:
        labeled = labeled[_drawn(rng, len(labeled), _N_CONDITIONED, labeled.device)]
    features = KernelFeatures.at(landmarks, labeled)
    embedding = features(pool, dtype)
    covered = embedding if target is None else features(target, dtype)
    fisher = fisher_matrix(covered * weights.to(covered).sqrt()[:, None, None])
    problem = SelectionProblem(n_instances, fisher, regularization=_NOISE)
    return stored(embedding), problem


def _drawn(
    rng: np.random.RandomState,
    n: int,
    size: int,
    device: torch.device,
    probabilities: np.ndarray | None = None,
) -> Tensor:
    """Draw some of n rows, ascending."""
    rows = rng.choice(n, size, replace=False, p=probabilities)
    return torch.as_tensor(np.sort(rows), device=device)
