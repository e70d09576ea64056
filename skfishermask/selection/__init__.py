"""Fisher embeddings and F in, a batch out; it has never heard of networks."""

from skfishermask.selection.batch import (
    Batch,
    gains_before_picks,
    select,
    select_and_prune,
    select_batch,
)
from skfishermask.selection.candidates import GainState
from skfishermask.selection.local_pool import LocalCandidatePool
from skfishermask.selection.problem import SelectionProblem, coordinates
from skfishermask.selection.storage import (
    EMBEDDING_DTYPES,
    Needs,
    Room,
    StoredEmbedding,
    gigabytes,
    stored,
)
from skfishermask.selection.updates import N_FLOAT64_PICKS, Pick

__all__ = [
    "EMBEDDING_DTYPES",
    "N_FLOAT64_PICKS",
    "Batch",
    "GainState",
    "LocalCandidatePool",
    "Needs",
    "Pick",
    "Room",
    "SelectionProblem",
    "StoredEmbedding",
    "coordinates",
    "gains_before_picks",
    "gigabytes",
    "select",
    "select_and_prune",
    "select_batch",
    "stored",
]
