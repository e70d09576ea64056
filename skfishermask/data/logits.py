"""How what a net infers becomes logits."""

from __future__ import annotations

import math

import skorch
import torch
from torch import Tensor, nn

from skfishermask.compat import predict_nonlinearity_of
from skfishermask.data.net import criterion_of, is_binary
from skfishermask.data.types import SampleRole, UserValue
from skfishermask.fisher import Bernoulli, Categorical, OutputLikelihood
from skfishermask.jacobian import ToOutputs, first_output


def _has_logits(output: UserValue) -> bool:
    """Return whether this is an output with logits, as of a Hugging Face model."""
    return isinstance(getattr(output, "logits", None), Tensor)


def _logits(output: UserValue) -> Tensor:
    logits = output.logits if _has_logits(output) else first_output(output)
    if not isinstance(logits, Tensor):
        raise ValueError(
            "Expected the net to infer a tensor, a tuple that begins with one or an output with "
            f"logits, found {type(logits).__name__}. to_logits makes logits of other outputs."
        )
    return logits


def _binary_logits(output: UserValue) -> Tensor:
    z = _logits(output)
    z = z.reshape(len(z))
    return torch.stack([torch.zeros_like(z), z], dim=1)


class _LogProbabilities:
    """Logits of a net that outputs probabilities, or makes them by ``predict_nonlinearity``.

    Rows that are none become NaN, to be reported with their row and what was `expected`: nothing
    here waits for the device, or depends on numbers, which `torch.vmap` does not allow.
    """

    def __init__(self, net: skorch.NeuralNet) -> None:
        self._nonlinearity = predict_nonlinearity_of(net)
        self._binary = is_binary(net)
        self._by_rule = net.predict_nonlinearity == "auto"
        self.expected = (
            f"With {type(criterion_of(net)).__name__}, {type(net).__name__} expects the module to "
            "output probabilities that sum to one (or a predict_nonlinearity that makes them). "
            "For a module that outputs logits, the criterion is CrossEntropyLoss; for other "
            "outputs there is to_logits."
        )

    def __call__(self, output: UserValue) -> Tensor:
        if self._by_rule and _has_logits(output):
            # By their name, with any criterion: such models often have a loss of their own.
            return _binary_logits(output) if self._binary else output.logits
        output = _logits(output)
        p: Tensor = self._nonlinearity(output.reshape(len(output)) if self._binary else output)
        seen = p.detach()
        wrong = (seen < 0).any(1) | ((seen.sum(1) - 1).abs() > 0.01)
        # p (d log p) has the limit zero where p underflows.
        return p.clamp_min(torch.finfo(p.dtype).tiny).log().masked_fill(wrong[:, None], math.nan)


class _LogOdds:
    """Logits of a net that outputs a probability for each label."""

    expected = "With BCELoss the module is expected to output probabilities between 0 and 1."

    def __call__(self, output: UserValue) -> Tensor:
        p = _logits(output)
        # p (1 - p) has the limit zero at both ends; others are NaN, to be reported with their row.
        info = torch.finfo(p.dtype)
        inside = p.clamp(info.tiny, 1 - info.eps / 2)
        wrong = (p.detach() < 0) | (p.detach() > 1)
        return (inside.log() - (-inside).log1p()).masked_fill(wrong, math.nan)


def to_logits_of(
    net: skorch.NeuralNet,
    to_logits: ToOutputs | None = None,
    likelihood: OutputLikelihood | None = None,
) -> ToOutputs:
    """Find how the output of ``net.infer`` becomes what a likelihood takes: logits, or means.

    The user's own `to_logits` goes before all rules; without a likelihood labels are classes. Where
    the criterion takes these outputs, they are used as they are. For classes, the net's own
    ``predict_nonlinearity`` gives probabilities otherwise, and their logarithm is what is needed,
    since a softmax undoes it.
    """
    if to_logits is not None:
        return to_logits
    criterion = criterion_of(net)
    if isinstance(likelihood, Bernoulli) and isinstance(criterion, nn.BCELoss):
        return _LogOdds()
    if likelihood is not None and not isinstance(likelihood, Categorical):
        return _logits
    if net.predict_nonlinearity in ("auto", None):
        if isinstance(criterion, nn.CrossEntropyLoss):
            return _logits
        if isinstance(criterion, nn.BCEWithLogitsLoss):
            return _binary_logits
    return _LogProbabilities(net)


def not_finite(row: int, role: SampleRole, to_logits: ToOutputs) -> ValueError:
    """Return the error for a row of the user's data with an unusable output."""
    what, why = "NaN or infinite", ""
    if isinstance(to_logits, _LogProbabilities | _LogOdds):
        what, why = "NaN, infinite or not probabilities", f" {to_logits.expected}"
    return ValueError(f"The network's output is {what} for row {row} of {role.argument}.{why}")
