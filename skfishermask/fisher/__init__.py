"""Fisher information of any torch module: diagonal, mask and embedding."""

from skfishermask.fisher.directions import (
    Weighting,
    check_n_directions,
    directions_that_keep,
    most_directions,
)
from skfishermask.fisher.information import (
    FisherSum,
    directions_for_share,
    embedding_blocks,
    fisher_diagonal,
    fisher_embedding,
    fisher_matrix,
    predicted_probabilities,
)
from skfishermask.fisher.mask import MASK_STRATEGIES, MaskStrategy, ParameterMask, mask_size
from skfishermask.fisher.network import (
    Inputs,
    NonFiniteOutputError,
    ToLogits,
    first_output,
    output_layer,
)
from skfishermask.fisher.reading import HELD_BYTES
from skfishermask.fisher.visit import seeded

__all__ = [
    "HELD_BYTES",
    "MASK_STRATEGIES",
    "FisherSum",
    "Inputs",
    "MaskStrategy",
    "NonFiniteOutputError",
    "ParameterMask",
    "ToLogits",
    "Weighting",
    "check_n_directions",
    "directions_for_share",
    "directions_that_keep",
    "embedding_blocks",
    "first_output",
    "fisher_diagonal",
    "fisher_embedding",
    "fisher_matrix",
    "mask_size",
    "most_directions",
    "output_layer",
    "predicted_probabilities",
    "seeded",
]
