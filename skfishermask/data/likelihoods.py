"""Which likelihood a net's criterion stands for, and whether labels are of its kind."""

from __future__ import annotations

import numpy as np
import skorch
from sklearn.base import is_classifier, is_regressor
from torch import Tensor, nn

from skfishermask.compat import as_written
from skfishermask.data.diagnostics import check_known, check_no_lists_of_labels
from skfishermask.data.linear import is_linear
from skfishermask.data.net import is_binary, is_net
from skfishermask.data.types import Estimator, Labels
from skfishermask.fisher import Likelihood, OutputLikelihood, as_likelihood

# Likelihood -> the criteria of PyTorch that are its negative logarithm, or treated so.
_CRITERIA: dict[str, tuple[type[nn.Module], ...]] = {
    "categorical": (nn.CrossEntropyLoss, nn.NLLLoss),
    "bernoulli": (nn.BCEWithLogitsLoss, nn.BCELoss, nn.MultiLabelSoftMarginLoss),
    "gaussian": (nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss),
}


def criterion_type(net: skorch.NeuralNet) -> type:
    """Return the class of a net's criterion, initialized or not."""
    criterion = getattr(net, "criterion_", net.criterion)
    return criterion if isinstance(criterion, type) else type(as_written(criterion))


def likelihood_name(net: skorch.NeuralNet) -> str:
    """Return the name of the likelihood that a net's criterion stands for.

    Raises TypeError if it stands for none, or for one that the kind of net contradicts.
    """
    criterion = criterion_type(net)
    name = next((name for name, known in _CRITERIA.items() if issubclass(criterion, known)), None)
    kind, loss = type(net).__name__, criterion.__name__
    if is_binary(net):
        # Its one logit is that of the second of two classes.
        name = "categorical" if name in ("bernoulli", None) else name
    elif name is None and is_classifier(net) and not issubclass(criterion, _UNSUPPORTED):
        name = "categorical"  # a loss of one's own, as its predict_proba says
    if name is None:
        listed = "; ".join(
            f"{name}: {', '.join(loss.__name__ for loss in known)}"
            for name, known in _CRITERIA.items()
        )
        raise TypeError(
            f"{kind} has the criterion {loss}, of which no likelihood is known. Known are, and "
            f"classes derived from them, {listed}. For others, likelihood is one of these names, "
            "or an object with the methods check, rank and factor."
        )
    if is_classifier(net) and name not in _OF_CLASSES:
        raise TypeError(
            f"{kind} is a classifier, but its criterion {loss} is for numbers: expected "
            "CrossEntropyLoss for classes, or a NeuralNetRegressor."
        )
    if is_regressor(net) and name in _OF_CLASSES:
        raise TypeError(
            f"{kind} is a regressor, but its criterion {loss} is for classes: expected MSELoss, or "
            "a NeuralNetClassifier."
        )
    return name


# Likelihoods of classes; others are of numbers.
_OF_CLASSES = ("categorical", "bernoulli")
# Least mean squared residual, as a share of the labels' variance.
_SMALLEST_SHARE = 1e-4
# Criteria of several labels a sample with no likelihood.
_UNSUPPORTED = (nn.MultiLabelMarginLoss,)


def ignore_index_of(net: skorch.NeuralNet) -> int:
    """Return the class number that stands for a position without a label, as PyTorch has it."""
    index: int = getattr(net.criterion, "ignore_index", -100)
    return getattr(net, "criterion__ignore_index", index)


def likelihood_of(net: skorch.NeuralNet, likelihood: str | Likelihood) -> OutputLikelihood:
    """Return the likelihood that the user's parameter stands for; "auto": that of the net."""
    if isinstance(likelihood, str) and likelihood == "auto":
        likelihood = likelihood_name(net)
    return as_likelihood(likelihood)


def residual_variance(y: Labels, predicted: np.ndarray) -> float | None:
    """Compute the mean squared residual of labels that are numbers.

    A network that has learned its few labels by heart leaves none; then the Fisher information
    would have no bound, so it is at least a small share of the labels' own variance. Labels, (n,)
    or (n, n_targets), may be NaN; predictions are as many numbers in any shape. None where no label
    is known, or all are equal and exactly predicted.
    """
    labels = np.asarray(y, dtype="float64")
    residuals = labels - np.asarray(predicted, dtype="float64").reshape(labels.shape)
    if not np.isfinite(residuals).any():
        return None
    variance = max(np.nanmean(residuals**2), _SMALLEST_SHARE * np.nanvar(labels))
    return float(variance) or None


def takes_missing_labels(estimator: Estimator) -> bool:
    """Return whether this is a net for several labels a sample, of which some may be missing."""
    is_of_several = is_net(estimator) and _name_or_none(estimator) == "bernoulli"
    return is_of_several and not _has_plain_loss(estimator)


def _has_plain_loss(net: skorch.NeuralNet) -> bool:
    """Return whether the loss is PyTorch's, NaN where a label is: others may leave that one out."""
    is_plain = any(criterion_type(net) in known for known in _CRITERIA.values())
    return is_plain and type(net).get_loss.__module__.startswith("skorch.")


def _name_or_none(net: skorch.NeuralNet) -> str | None:
    try:
        return likelihood_name(net)
    except TypeError:
        return None


def check_criterion_fits(estimator: Estimator, kind: str) -> None:
    """Raise ValueError where an estimator's criterion is for another kind of labels.

    One with a criterion that has no known likelihood passes.
    """
    if is_linear(estimator):
        own: str | None = "categorical"
        loss = type(estimator).__name__
    elif is_net(estimator):
        own, loss = _name_or_none(estimator), criterion_type(estimator).__name__
    else:
        return
    if own not in (None, kind):
        of = {"categorical": "classes", "bernoulli": "several labels a sample"}
        raise ValueError(
            f"likelihood={kind!r} is for {of.get(kind, 'numbers')}, but {loss} is for "
            f"{of.get(str(own), 'numbers')}: leave likelihood out, or give a net with the "
            f"criterion {_CRITERIA[kind][0].__name__}; without an estimator the sampler makes one."
        )


def check_labels_fit(net: Estimator, y: Labels) -> None:
    """Raise ValueError at labels of another kind than those of a net's criterion.

    One with a criterion that has no known likelihood passes, and so does what is no net.
    """
    check_no_lists_of_labels(y)
    name = _name_or_none(net) if is_net(net) else None
    if name is None:
        return
    values = y.numpy(force=True) if isinstance(y, Tensor) else np.asarray(y)
    loss, kind = criterion_type(net).__name__, values.dtype.kind
    example = values.ravel()[:1].tolist()
    is_integral = kind != "f" or not (np.isfinite(values) & (values != np.rint(values))).any()
    if name == "gaussian" and kind not in "biuf":
        raise ValueError(
            f"{loss} is for numbers, but y has labels of dtype {values.dtype}, such as "
            f"{example[0]!r}. For classes, expected a NeuralNetClassifier with "
            "CrossEntropyLoss."
        )
    if name == "categorical" and not is_integral:
        raise ValueError(
            f"{loss} is for classes, but y has continuous numbers such as {example[0]!r}. To "
            "predict numbers, expected a NeuralNetRegressor with MSELoss."
        )
    if name == "bernoulli":
        known = values[~np.isnan(values)] if kind == "f" else values
        if kind not in "biuf" or values.ndim < 2 or not np.isin(known, (0, 1)).all():
            raise ValueError(
                f"{loss} is for several labels a sample: expected y of shape (n, n_labels) with 0 "
                f"and 1, found shape {values.shape} and values such as {example[0]!r}. For one "
                "class a sample, expected CrossEntropyLoss."
            )
    if name != "categorical" and kind == "f" and _has_plain_loss(net):
        check_known(values, " Or give a net with a criterion that leaves NaN out of the loss.")
