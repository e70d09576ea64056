"""scikit-learn's logistic regressions, as the linear nets they are."""

from __future__ import annotations

import numpy as np
import skorch
import torch
from scipy.sparse import issparse
from sklearn.linear_model import LogisticRegression, SGDClassifier
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn
from torch.nn.utils import skip_init

from skfishermask.data.types import Data, Estimator


class _Scores(nn.Linear):
    """The decision function. In float64, as scikit-learn computes it for most inputs."""

    def forward(self, X: Tensor) -> Tensor:
        """Return scores (n, n_outputs) of samples of any dtype."""
        return super().forward(X.to(self.weight.dtype))


def is_linear(estimator: Estimator) -> bool:
    """Return whether this is a logistic regression of scikit-learn, fitted or not."""
    if isinstance(estimator, SGDClassifier):
        return bool(estimator.loss == "log_loss")
    return isinstance(estimator, LogisticRegression)


def _is_one_vs_rest(estimator: Estimator) -> bool:
    """Return whether there is a binary model for each of several classes."""
    if isinstance(estimator, SGDClassifier) or estimator.solver == "liblinear":
        return True
    return getattr(estimator, "multi_class", None) == "ovr"  # before scikit-learn 1.8


def _kind_of(
    estimator: Estimator, n_outputs: int
) -> tuple[type[skorch.NeuralNet], type[nn.Module]]:
    if n_outputs == 1:
        return skorch.NeuralNetBinaryClassifier, nn.BCEWithLogitsLoss
    if _is_one_vs_rest(estimator):
        return skorch.NeuralNet, nn.BCEWithLogitsLoss
    return skorch.NeuralNetClassifier, nn.CrossEntropyLoss


def linear_net(estimator: Estimator) -> skorch.NeuralNet:
    """Make a net of a fitted logistic regression, with its coefficients as parameters.

    Of two classes it has one logit, of several a logit each. Where each class was fitted against
    all others, their labels are those of binary models: the likelihood is Bernoulli for each class,
    and what ``predict_proba`` makes of them is no part of it.
    """
    check_is_fitted(estimator)
    coef = estimator.coef_.toarray() if issparse(estimator.coef_) else estimator.coef_
    n_outputs, n_features = coef.shape
    # Two logits, the score and its negative, are one of twice the score.
    is_pair = n_outputs == 1 and getattr(estimator, "multi_class", None) == "multinomial"
    options = {"bias": bool(estimator.fit_intercept), "dtype": torch.float64}
    module = skip_init(_Scores, n_features, n_outputs, **options)  # draws no random numbers
    parameters = {"weight": coef, "bias": estimator.intercept_}
    module.load_state_dict(
        {name: torch.as_tensor(parameters[name]) * (1 + is_pair) for name in module.state_dict()}
    )
    kind, criterion = _kind_of(estimator, n_outputs)
    return kind(module, criterion=criterion, batch_size=1024, callbacks="disable").initialize()


def linear_inputs(estimator: Estimator, X: Data) -> Data:
    """Return samples as an array, checked as the estimator's ``predict`` does."""
    # As float, also where they are integers: these are quantities.
    floats = [np.float64, np.float32]
    checks = {"accept_sparse": "csr", "dtype": floats, "ensure_all_finite": False}
    return validate_data(estimator, X, reset=False, **checks)
