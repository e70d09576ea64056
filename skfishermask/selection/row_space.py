"""Coordinates of embeddings in the space of their rows, where these are few."""

from __future__ import annotations

import torch
from torch import Tensor

from skfishermask.selection.candidates import check_finite
from skfishermask.selection.linalg import column_blocks, fingerprints, first_of_equals
from skfishermask.selection.storage import StoredEmbedding

# Of the columns that are read at a time, in float64;
_BLOCK_BYTES = 2**22
# but no fewer columns than this, for the sake of files.
_MIN_COLUMNS = 1024
# Odd, so that the fingerprint depends on the order of the blocks.
_FINGERPRINT_FACTOR = 0x5851F42D4C957F2D
# What the diagonal of a Gram matrix of dependent rows is raised by at first: two roundings.
_LEAST_JITTER = 2.0**-50


def row_coordinates(embedding: StoredEmbedding) -> Tensor:
    r"""Return coordinates of an embedding's rows in an orthonormal basis of what they span.

    A selection depends on the inner products of rows alone, and these are those of the coordinates:
    the Cholesky factor C of the Gram matrix, :math:`C C^\top = V V^\top`. The embedding is read
    once, some columns at a time.

    Returns (n, r, n r), float64, with inner products that are exact to rounding, relative to the
    lengths of both rows. Samples with equal embeddings have equal coordinates. Raises ValueError if
    the embedding holds NaN or infinity.
    """
    n, r, _ = embedding.shape
    gram, marks = _gram(embedding)
    sizes = gram.diagonal().sqrt()
    norms = torch.linalg.vector_norm(sizes.view(n, r), dim=1)
    check_finite(norms, torch.arange(n, device=norms.device))
    # Rows of unit length, so that short ones keep their digits beside long ones.
    scale = torch.where(sizes > 0, 1 / sizes, 1)
    gram.mul_(scale).mul_(scale[:, None])
    factor = _cholesky(gram)
    del gram
    coordinates = factor.contiguous().mul_(sizes[:, None]).view(n, r, n * r)
    first = first_of_equals(marks)
    if first is not None:
        coordinates = coordinates[first]
    return coordinates


def _gram(embedding: StoredEmbedding) -> tuple[Tensor, Tensor]:
    """Compute the lower triangle of the Gram matrix, (n r, n r), and the samples' fingerprints."""
    n, r, k = embedding.shape
    gram = torch.zeros(n * r, n * r, dtype=torch.float64, device=embedding.device)
    marks = torch.zeros(n, dtype=torch.int64, device=embedding.device)
    blocks, width = column_blocks(n * r), max(_MIN_COLUMNS, _BLOCK_BYTES // (8 * n * r))
    for start in range(0, k, width):
        columns = embedding.columns(start, min(k, start + width)).double()
        marks = marks * _FINGERPRINT_FACTOR + fingerprints(columns)
        rows = columns.flatten(0, 1)
        for a, b in blocks:
            gram[a:, a:b].addmm_(rows[a:], rows[a:b].T)
    return gram, marks


def _cholesky(gram: Tensor) -> Tensor:
    """Return the Cholesky factor of a Gram matrix of unit rows, singular or not, to rounding."""
    jitter = _LEAST_JITTER
    while True:
        gram.diagonal().fill_(1 + jitter)
        factor: Tensor
        factor, failed = torch.linalg.cholesky_ex(gram)
        if not failed:
            return factor
        del factor
        jitter *= 16
