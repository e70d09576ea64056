"""Fisher information of any torch module: diagonal, mask and embedding."""

from skfishermask.fisher.information import (
    directions_for_share,
    embedding_blocks,
    fisher_diagonal,
    fisher_embedding,
    predicted_probabilities,
)
from skfishermask.fisher.likelihood import (
    Weighting,
    check_n_directions,
    directions_that_keep,
    most_directions,
)
from skfishermask.fisher.mask import MASK_STRATEGIES, MaskStrategy, ParameterMask, mask_size
from skfishermask.fisher.matrix import FisherSum, fisher_matrix

__all__ = [
    "MASK_STRATEGIES",
    "FisherSum",
    "MaskStrategy",
    "ParameterMask",
    "Weighting",
    "check_n_directions",
    "directions_for_share",
    "directions_that_keep",
    "embedding_blocks",
    "fisher_diagonal",
    "fisher_embedding",
    "fisher_matrix",
    "mask_size",
    "most_directions",
    "predicted_probabilities",
]
