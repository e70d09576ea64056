"""Fisher embeddings and F in, a batch out; it has never heard of networks."""

from skfishermask.selection.batch import (
    Batch,
    gains_before_picks,
    select,
    select_and_prune,
    select_batch,
)
from skfishermask.selection.candidates import GainState
from skfishermask.selection.head_embedding import HeadEmbedding
from skfishermask.selection.linalg import fingerprints, first_of_equals
from skfishermask.selection.local_pool import LocalCandidatePool
from skfishermask.selection.problem import SelectionProblem
from skfishermask.selection.rounding import unit_roundoff
from skfishermask.selection.row_space import row_coordinates
from skfishermask.selection.storage import (
    EMBEDDING_DTYPES,
    STORAGES,
    AllocatedEmbedding,
    Location,
    StoredEmbedding,
    chunk_bytes,
    free_bytes,
    gigabytes,
    state_bytes,
    stored,
)
from skfishermask.selection.threads import in_one_thread
from skfishermask.selection.updates import N_FLOAT64_PICKS, Pick

__all__ = [
    "EMBEDDING_DTYPES",
    "N_FLOAT64_PICKS",
    "STORAGES",
    "AllocatedEmbedding",
    "Batch",
    "GainState",
    "HeadEmbedding",
    "LocalCandidatePool",
    "Location",
    "Pick",
    "SelectionProblem",
    "StoredEmbedding",
    "chunk_bytes",
    "fingerprints",
    "first_of_equals",
    "free_bytes",
    "gains_before_picks",
    "gigabytes",
    "in_one_thread",
    "row_coordinates",
    "select",
    "select_and_prune",
    "select_batch",
    "state_bytes",
    "stored",
    "unit_roundoff",
]
