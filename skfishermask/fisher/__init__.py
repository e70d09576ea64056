"""Fisher information of any torch module: likelihood, diagonal, mask and embedding."""

from skfishermask.fisher.directions import check_n_directions, directions_that_keep
from skfishermask.fisher.information import (
    diagonal_sums,
    embedding_blocks,
    fisher_diagonal,
    fisher_embedding,
)
from skfishermask.fisher.likelihood import (
    LIKELIHOODS,
    Bernoulli,
    Categorical,
    Gaussian,
    Weighting,
    as_likelihood,
    margin_uncertainty,
)
from skfishermask.fisher.mask import MASK_STRATEGIES, ParameterMask, mask_size
from skfishermask.fisher.matrix import SUMMED_ROWS, FisherSum, fisher_matrix
from skfishermask.fisher.output_likelihood import Likelihood, OutputLikelihood
from skfishermask.fisher.predictions import (
    Predictions,
    ReadOptions,
    direction_norms,
    directions_for_share,
    in_one_length,
    largest_rank,
    map_outputs,
    predict,
    predicted_means,
)

__all__ = [
    "LIKELIHOODS",
    "MASK_STRATEGIES",
    "SUMMED_ROWS",
    "Bernoulli",
    "Categorical",
    "FisherSum",
    "Gaussian",
    "Likelihood",
    "OutputLikelihood",
    "ParameterMask",
    "Predictions",
    "ReadOptions",
    "Weighting",
    "as_likelihood",
    "check_n_directions",
    "diagonal_sums",
    "direction_norms",
    "directions_for_share",
    "directions_that_keep",
    "embedding_blocks",
    "fisher_diagonal",
    "fisher_embedding",
    "fisher_matrix",
    "in_one_length",
    "largest_rank",
    "map_outputs",
    "margin_uncertainty",
    "mask_size",
    "predict",
    "predicted_means",
]
