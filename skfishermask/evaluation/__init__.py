"""Learning curves of query strategies: how accurate with how many labels."""

from skfishermask.evaluation.curve import active_learning_curve
from skfishermask.evaluation.display import ActiveLearningCurveDisplay

__all__ = ["ActiveLearningCurveDisplay", "active_learning_curve"]
