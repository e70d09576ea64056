"""Active learning with FisherMask for scikit-learn, skorch and modAL."""

import sys

from skfishermask.evaluation import ActiveLearningCurveDisplay, active_learning_curve
from skfishermask.fisher import ParameterMask, fisher_diagonal, fisher_embedding
from skfishermask.sampler import FisherMaskSampler, fisher_mask_sampling
from skfishermask.selection import select_batch

# Pickles from before the package had folders name these modules.
for _old, _new in (("default", "data.default_net"), ("mask", "fisher.mask")):
    sys.modules[f"{__name__}.{_old}"] = sys.modules[f"{__name__}.{_new}"]

__version__ = "0.1.0"

__all__ = [
    "ActiveLearningCurveDisplay",
    "FisherMaskSampler",
    "ParameterMask",
    "__version__",
    "active_learning_curve",
    "fisher_diagonal",
    "fisher_embedding",
    "fisher_mask_sampling",
    "select_batch",
]
