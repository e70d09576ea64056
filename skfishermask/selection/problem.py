"""The problem that a selection solves: M_0, F and the size of the batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from skfishermask.selection.linalg import symmetric

# Eigenvalues of a float32 Fisher matrix may be below 0 by this, relative to the largest.
_ROUNDING = 1e-4


@dataclass(frozen=True)
class SelectionProblem:
    """M_0, F and the size of the batch."""

    n_instances: int  # K
    fisher: Tensor  # F, (k, k)
    fisher_labeled: Tensor | None = None  # F_L, (k, k)
    n_labeled: int = 0  # n_L
    regularization: float = 1.0  # lambda
    oversample: float = 1.0  # forward picks, as a multiple of K

    @property
    def scale(self) -> float:
        """K / (n_L + K), by which M and V^T V are divided, so that V need not be scaled."""
        return self.n_instances / (self.n_labeled + self.n_instances)

    @property
    def shift(self) -> float:
        """The multiple of the identity in M, divided by `scale`."""
        return self.regularization / self.scale

    @property
    def weighted_labeled(self) -> Tensor | None:
        """The labelled samples' part of M, divided by `scale`; None where there is none."""
        if self.fisher_labeled is None or not self.n_labeled:
            return None
        return self.fisher_labeled * (self.n_labeled / self.n_instances)

    def start(self) -> tuple[Tensor | float, Tensor]:
        """Return M_0^-1, a float if it is a multiple of the identity, and M_0^-1 F M_0^-1.

        Raises ValueError if M_0 is not positive definite.
        """
        labeled = self.weighted_labeled
        if labeled is None:
            return 1 / self.shift, self.fisher / self.shift**2
        labeled.diagonal().add_(self.shift)
        factor, failed = torch.linalg.cholesky_ex(labeled)
        del labeled
        if failed:
            raise self._not_invertible()
        inverse = torch.cholesky_inverse(factor)
        del factor
        return inverse, symmetric(inverse @ self.fisher @ inverse)

    def _not_invertible(self) -> ValueError:
        """Return the error for M_0 that is not positive definite: of F_L, or of lambda."""
        weighted = self.weighted_labeled
        assert weighted is not None
        eigenvalues = torch.linalg.eigvalsh(weighted) * self.scale
        smallest, largest = float(eigenvalues[0]), float(eigenvalues.abs().max())
        if smallest < -_ROUNDING * largest:
            return ValueError(
                "fisher_labeled must be positive semi-definite, but it has eigenvalues down to "
                f"{smallest:.3g} beside the largest, {largest:.3g}."
            )
        # As rounding may have it in other directions, too.
        least = 10 * max(-smallest, len(weighted) * torch.finfo(torch.float64).eps * largest)
        return ValueError(
            f"regularization={self.regularization:g} is too small beside the Fisher information of "
            f"the labelled samples, with eigenvalues up to {largest:.3g}: their sum cannot be "
            f"inverted, because of rounding. Set regularization to {least:.1g} or more."
        )
