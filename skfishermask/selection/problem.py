"""What a batch is chosen by."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from skfishermask.selection.linalg import symmetric


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
        labeled.diagonal().add_(self.shift)
        inverse = torch.cholesky_inverse(_cholesky(labeled))
        del labeled
        return inverse, symmetric(inverse @ self.fisher @ inverse)


def _cholesky(matrix: Tensor) -> Tensor:
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if failed:
        raise ValueError(
            "fisher_labeled must be positive semi-definite, but adding the regularization "
            "does not make it positive definite."
        )
    return factor
