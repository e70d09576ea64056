"""Active learning with FisherMask for scikit-learn, skorch and modAL."""

from skfishermask.evaluation import ActiveLearningCurveDisplay, active_learning_curve
from skfishermask.fisher import ParameterMask, fisher_diagonal, fisher_embedding
from skfishermask.parameters import PUBLISHED
from skfishermask.query_table import label_studio_tasks, query_table
from skfishermask.sampler import FisherMaskSampler, fisher_mask_sampling
from skfishermask.selection import select_batch

__version__ = "0.1.0"

__all__ = [
    "PUBLISHED",
    "ActiveLearningCurveDisplay",
    "FisherMaskSampler",
    "ParameterMask",
    "__version__",
    "active_learning_curve",
    "fisher_diagonal",
    "fisher_embedding",
    "fisher_mask_sampling",
    "label_studio_tasks",
    "query_table",
    "select_batch",
]
