"""Mean Fisher matrices of embedded samples."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import torch
from torch import Tensor

# Products that are added up in float32, at most, before float64 takes over.
SUMMED_ROWS = 1 << 13
# Column blocks of a symmetric product; above the diagonal ones nothing is multiplied.
_N_BLOCKS = 8


class FisherSum:
    """The mean Fisher information of samples embedded in k dimensions, chunk by chunk."""

    def __init__(self, k: int, device: torch.device) -> None:
        self._total = torch.zeros(k, k, dtype=torch.float64, device=device)
        self._partial: Tensor | None = None
        self._n_rows = 0
        self._n_samples = 0

    def add(self, embedding: Tensor) -> None:
        """Add samples with these embeddings, (n, r, k). Products are in float32 at least."""
        k, work = len(self._total), torch.promote_types(embedding.dtype, torch.float32)
        blocks = [*pairwise(sorted({k * i // _N_BLOCKS for i in range(_N_BLOCKS + 1)}))]
        flats = embedding.reshape(-1, k).to(work).split(SUMMED_ROWS)
        products = ((a, b, flat[:, a:], flat[:, a:b]) for flat in flats for a, b in blocks)
        self.add_products(len(embedding), products)

    def add_products(
        self, n_samples: int, products: Iterable[tuple[int, int, Tensor, Tensor]]
    ) -> None:
        """Add samples by products that make up the lower triangle of their sum of V^T V.

        Each is (a, b, A, B), for A^T B in columns a to b, in the rows from a on; of at most
        `SUMMED_ROWS` rows.
        """
        self._n_samples += n_samples
        for a, b, left, right in products:
            if self._partial is None or self._partial.dtype != left.dtype:
                self._flush()
                self._partial = torch.zeros_like(self._total, dtype=left.dtype)
            if a == 0:
                if self._n_rows >= SUMMED_ROWS:
                    self._flush()
                self._n_rows += len(left)
            self._partial[a:, a:b].addmm_(left.T, right)

    def _flush(self) -> None:
        if self._partial is not None:
            self._total += self._partial
            self._partial.zero_()
        self._n_rows = 0

    def mean(self) -> Tensor:
        """Return the mean over the samples so far, (k, k), float64, symmetric."""
        self._flush()
        self._partial = None
        total = self._total.tril()
        total += total.tril(-1).T
        return total.div_(self._n_samples)


def fisher_matrix(embedding: Tensor) -> Tensor:
    r"""Compute the mean Fisher information of embedded samples.

    Parameters
    ----------
    embedding : Tensor of shape (n, r, k)
        Fisher embedding V of n samples.

    Returns
    -------
    Tensor of shape (k, k)
        :math:`\frac{1}{n} \sum_x V(x)^\top V(x)`, float64, symmetric, on the embedding's
        device. Products are in float32 at least, sums of many in float64.

    Examples
    --------
    >>> import torch
    >>> from skfishermask.fisher import fisher_matrix
    >>> V = torch.tensor([[[1.0, 2.0]], [[3.0, 0.0]]])
    >>> fisher_matrix(V).tolist()
    [[5.0, 1.0], [1.0, 2.0]]
    """
    total = FisherSum(embedding.shape[2], embedding.device)
    total.add(embedding)
    return total.mean()
