"""What a batch is chosen by, and the same in no more dimensions than there are rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from skfishermask.selection.candidates import check_finite
from skfishermask.selection.linalg import (
    fingerprints,
    is_duplicate,
    row_coordinates,
    shifted,
    symmetric,
)
from skfishermask.selection.storage import StoredEmbedding, stored


@dataclass(frozen=True)
class SelectionProblem:
    """What a batch is chosen by.

    Attributes
    ----------
    n_instances : int
        K.
    fisher : Tensor of shape (k, k)
        F.
    fisher_labeled : Tensor of shape (k, k), or None
        F_L.
    n_labeled : int
        n_L.
    regularization : float
        lambda.
    oversample : float
        Forward picks, as a multiple of K.
    """

    n_instances: int
    fisher: Tensor
    fisher_labeled: Tensor | None = None
    n_labeled: int = 0
    regularization: float = 1.0
    oversample: float = 1.0

    @property
    def scale(self) -> float:
        """What M and V^T V are divided by, which leaves V as it is: K / (n_L + K)."""
        return self.n_instances / (self.n_labeled + self.n_instances)

    @property
    def shift(self) -> float:
        """The multiple of the identity in M, so divided."""
        return self.regularization / self.scale

    @property
    def weighted_labeled(self) -> Tensor | None:
        """The labelled samples' part of M, so divided; None where there is none."""
        if self.fisher_labeled is None or not self.n_labeled:
            return None
        return self.fisher_labeled * (self.n_labeled / self.n_instances)

    def start(self) -> tuple[Tensor | float, Tensor]:
        """Give M_0^-1, where a float stands for a multiple of the identity, and M_0^-1 F M_0^-1."""
        labeled = self.weighted_labeled
        if labeled is None:
            return 1 / self.shift, self.fisher / self.shift**2
        inverse = torch.cholesky_inverse(_cholesky(shifted(labeled, self.shift)))
        return inverse, symmetric(inverse @ self.fisher @ inverse)


def has_few_rows(shape: Sequence[int]) -> bool:
    """Say whether embeddings of this shape have fewer rows than columns."""
    n, r, k = shape
    return n * r < k


def in_row_space(
    embedding: StoredEmbedding, problem: SelectionProblem
) -> tuple[StoredEmbedding, SelectionProblem, float]:
    """Give a problem of fewer rows than dimensions in as many dimensions as rows; others as is.

    With M_0 = L L^T and W = V L^-T, all that is chosen by depends on W W^T and
    W (L^-1 F L^-T) W^T. In an orthonormal basis of the span of W's rows these are those of the
    coordinates, exactly.

    Parameters
    ----------
    embedding : StoredEmbedding of shape (n, r, k)
        Fisher embeddings.
    problem : SelectionProblem
        With k x k matrices.

    Returns
    -------
    embedding : StoredEmbedding of shape (n, r, n r)
        The coordinates, in float64 and in memory, where n r is below k.
    problem : SelectionProblem
        With n r x n r matrices, M_0 the identity, of the same scale.
    outside : float
        The part of tr(M_0^-1 F) that no choice changes.
    """
    if not has_few_rows(embedding.shape):
        return embedding, problem, 0.0
    n, r, k = embedding.shape
    v = embedding.take(range(n)).double()
    check_finite(torch.linalg.vector_norm(v.flatten(1), dim=1), torch.arange(n, device=v.device))
    labeled, root = problem.weighted_labeled, math.sqrt(problem.shift)
    if labeled is None:
        rows, fisher = v / root, problem.fisher / problem.shift
    else:
        factor = _cholesky(shifted(labeled, problem.shift))
        rows = torch.linalg.solve_triangular(factor, v.flatten(0, 1).T, upper=False).T
        half = torch.linalg.solve_triangular(factor, problem.fisher, upper=False)
        fisher = symmetric(torch.linalg.solve_triangular(factor, half.T, upper=False))
    basis, triangle = torch.linalg.qr(rows.reshape(n * r, k).T)
    coordinates = equal_stay_equal(triangle.T.reshape(n, r, n * r), v)
    within = symmetric(basis.T @ fisher @ basis)
    reduced = SelectionProblem(
        problem.n_instances,
        within,
        None,
        problem.n_labeled,
        problem.scale,
        problem.oversample,
    )
    return stored(coordinates), reduced, float(fisher.trace() - within.trace())


def coordinates(embedding: StoredEmbedding, labeled: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Give candidates and labelled samples in coordinates of the space that their rows span.

    Parameters
    ----------
    embedding : StoredEmbedding of shape (n, r, k)
        Those of the candidates.
    labeled : Tensor of shape (n_labeled, r, k), or None
        Those of the labelled samples.
    """
    v = embedding.take(range(len(embedding))).double()
    rows = v if labeled is None else torch.cat([v, labeled.double()])
    found = row_coordinates(rows.flatten(0, 1)).unflatten(0, rows.shape[:2])
    mine = equal_stay_equal(found[: len(v)], v)
    return mine, None if labeled is None else found[len(v) :]


def equal_stay_equal(coordinates: Tensor, v: Tensor) -> Tensor:
    """Give candidates with equal embeddings v the same coordinates, to the last bit."""
    prints = fingerprints(v)
    if not is_duplicate(prints).any():
        return coordinates.contiguous()
    _, kinds = torch.unique(prints, return_inverse=True)
    first = torch.full_like(kinds, len(v)).scatter_reduce(
        0, kinds, torch.arange(len(v), device=v.device), "amin"
    )
    same: Tensor = coordinates[first[kinds]]
    return same


def _cholesky(matrix: Tensor) -> Tensor:
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if failed:
        raise ValueError(
            "fisher_labeled must be positive semi-definite, but adding the regularization "
            "does not make it positive definite."
        )
    return factor
