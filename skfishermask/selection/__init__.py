"""Fisher embeddings and F in, a batch out; it has never heard of networks."""

from skfishermask.selection.batch import (
    Batch,
    chosen_from,
    find_batch,
    gains_along,
    select_batch,
)
from skfishermask.selection.candidates import Candidates
from skfishermask.selection.local import LocalCandidates
from skfishermask.selection.objective import Objective, coordinates
from skfishermask.selection.remote import Answer, Block, Question, RemoteCandidates, merged
from skfishermask.selection.steps import CAREFUL, Step
from skfishermask.selection.storage import (
    EMBEDDING_DTYPES,
    Needs,
    Room,
    StoredEmbedding,
    gigabytes,
    stored,
)

__all__ = [
    "CAREFUL",
    "EMBEDDING_DTYPES",
    "Answer",
    "Batch",
    "Block",
    "Candidates",
    "LocalCandidates",
    "Needs",
    "Objective",
    "Question",
    "RemoteCandidates",
    "Room",
    "Step",
    "StoredEmbedding",
    "chosen_from",
    "coordinates",
    "find_batch",
    "gains_along",
    "gigabytes",
    "merged",
    "select_batch",
    "stored",
]
