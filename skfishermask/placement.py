"""How much memory a query takes, and where its embedding goes."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from skfishermask.jacobian import LinearHead
from skfishermask.selection import (
    STORAGES,
    AllocatedEmbedding,
    Location,
    chunk_bytes,
    free_bytes,
    gigabytes,
    state_bytes,
)

# Matrices in as many dimensions as are worked in, float64, that a selection holds at a time:
# Fisher matrices, their factors and products.
_N_MATRICES = 9
# Chunks of the embedding that are held at a time, read ahead or computed with, in float64.
_N_CHUNKS = 4
# A, B and bounds of every candidate are held before a step that is tried and after it. More steps
# are tried at a time where there is room.
_N_STATES = 2


@dataclass(frozen=True)
class MemoryEstimate:
    """Memory that a query takes beside the network and the data."""

    n: int  # candidates
    r: int  # directions
    k: int  # masked parameters
    dtype: torch.dtype  # of the embedding
    n_others: int = 0  # labelled and target samples
    reading_bytes: int = 0  # that reading the network holds while the embedding is written, at most
    # Whether the choice is made in the space of the rows where these are fewer than `k`. Then the
    # other samples are kept beside the candidates.
    uses_row_space: bool = True
    # The linear layer that the masked parameters are of; its input is kept instead of embeddings.
    head: LinearHead | None = None

    @property
    def has_few_rows(self) -> bool:
        """Whether the choice is made in the space of the rows."""
        return self.uses_row_space and (self.n + self.n_others) * self.r < self.k

    @property
    def n_embedded(self) -> int:
        """Samples that are kept."""
        return self.n + (self.n_others if self.has_few_rows else 0)

    @property
    def dimensions(self) -> int:
        """In which the choice is made."""
        return self.n_embedded * self.r if self.has_few_rows else self.k

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of what is kept: of a head one row a sample, its features and R(x)."""
        if self.head is None:
            return self.n_embedded, self.r, self.k
        return self.n_embedded, 1, self.head.features.shape[1] + self.r * self.head.n_outputs

    @property
    def embedding_bytes(self) -> int:
        """Size of the embedding."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def matrices_bytes(self) -> int:
        """Size of the matrices and of a few chunks; the coordinates of few rows are one more."""
        matrices = (_N_MATRICES + self.has_few_rows) * 8 * self.dimensions**2
        return matrices + _N_CHUNKS * chunk_bytes(self.n, self.r, self.dimensions)

    @property
    def gains_bytes(self) -> int:
        """Size of what is known of the candidates' gains."""
        return _N_STATES * state_bytes(self.n, self.r)

    def __str__(self) -> str:
        return (
            f"Fisher embedding {gigabytes(self.embedding_bytes)}, matrices "
            f"{gigabytes(self.matrices_bytes)}, gains {gigabytes(self.gains_bytes)}"
        )


@dataclass(frozen=True)
class Placement:
    """Where an embedding goes: decided once, before it is computed."""

    estimate: MemoryEstimate  # what it was decided by
    storage_name: str  # the kind of memory, as in ``query_info_``


@dataclass(frozen=True)
class LocalPlacement(Placement):
    """A place on this machine."""

    storage: type[AllocatedEmbedding]
    where: Location

    def allocate(self, cleanup: ExitStack) -> AllocatedEmbedding:
        """Return an embedding to be written, which lasts until the cleanup."""
        estimate = self.estimate
        return self.storage.allocate(estimate.shape, estimate.dtype, self.where, cleanup)


def place(estimate: MemoryEstimate, where: Location) -> LocalPlacement:
    """Decide where on this machine an embedding goes.

    Raises MemoryError if there is no room for it, or the rest of the selection is too large for the
    device.
    """
    free_on_device = free_bytes(where.device)
    beside = estimate.matrices_bytes + estimate.gains_bytes
    room = 0.0
    for storage in STORAGES:
        room = storage.room_bytes(where)
        if storage is STORAGES[0]:
            # The network is read, and afterwards the matrices are made.
            room = min(room, free_on_device - max(beside, estimate.reading_bytes))
        if beside <= free_on_device and estimate.embedding_bytes <= room:
            return LocalPlacement(estimate, storage.storage_name, storage, where)
    raise MemoryError(
        f"The Fisher embedding of {estimate.n_embedded} samples x {estimate.r} directions x "
        f"{estimate.k} parameters needs {gigabytes(estimate.embedding_bytes)}, the "
        f"{estimate.dimensions} x {estimate.dimensions} Fisher matrices "
        f"{gigabytes(estimate.matrices_bytes)} and the candidates' gains "
        f"{gigabytes(estimate.gains_bytes)}, but {gigabytes(free_on_device)} are free on "
        f"{where.device} and {gigabytes(room)} in {where.scratch_folder}. mask_fraction makes the "
        "first two smaller; max_candidates and n_directions the first and the last; "
        "embedding_dtype the first. An embedding larger than memory_share of the free memory goes "
        "to a file in scratch_folder."
    )
