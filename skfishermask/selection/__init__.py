"""Fisher embeddings and F in, a batch out; it has never heard of networks."""

from skfishermask.selection.batch import (
    Batch,
    chosen_from,
    find_batch,
    gains_along,
    select_batch,
)
from skfishermask.selection.candidates import Candidates
from skfishermask.selection.local_pool import LocalCandidates
from skfishermask.selection.problem import Objective, coordinates
from skfishermask.selection.storage import (
    EMBEDDING_DTYPES,
    Needs,
    Room,
    StoredEmbedding,
    gigabytes,
    stored,
)
from skfishermask.selection.updates import CAREFUL, Step

__all__ = [
    "CAREFUL",
    "EMBEDDING_DTYPES",
    "Batch",
    "Candidates",
    "LocalCandidates",
    "Needs",
    "Objective",
    "Room",
    "Step",
    "StoredEmbedding",
    "chosen_from",
    "coordinates",
    "find_batch",
    "gains_along",
    "gigabytes",
    "select_batch",
    "stored",
]
