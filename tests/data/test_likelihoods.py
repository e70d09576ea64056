from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from skorch import (
    NeuralNet,
    NeuralNetBinaryClassifier,
    NeuralNetClassifier,
    NeuralNetRegressor,
)
from torch import nn

from skfishermask import PUBLISHED, FisherMaskSampler
from skfishermask.data.likelihoods import check_labels_fit, likelihood_name, likelihood_of
from skfishermask.data.logits import to_logits_of
from skfishermask.fisher import Bernoulli, Gaussian
from tests import nets

X = np.random.default_rng(0).normal(size=(30, 64)).astype("float32")


class Own(nn.Module):
    """A loss of one's own."""


class MaskedBCE(nn.BCEWithLogitsLoss):
    """Labels that are NaN cost nothing."""

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        known = ~target.isnan()
        return super().forward(input[known], target[known])


class OwnLoss(NeuralNet):
    def get_loss(self, y_pred: Any, y_true: Any, *args: Any, **kwargs: Any) -> Any:
        known = ~y_true.isnan()
        return super().get_loss(y_pred[known], y_true[known], *args, **kwargs)


@pytest.mark.parametrize(
    ("kind", "criterion", "expected"),
    [
        (NeuralNetClassifier, nn.CrossEntropyLoss, "categorical"),
        (NeuralNetClassifier, nn.NLLLoss(), "categorical"),
        (NeuralNetClassifier, Own, "categorical"),
        (NeuralNetClassifier, nn.BCEWithLogitsLoss, "bernoulli"),
        (NeuralNet, nn.CrossEntropyLoss, "categorical"),
        (NeuralNet, nn.BCELoss, "bernoulli"),
        (NeuralNet, MaskedBCE, "bernoulli"),
        (NeuralNet, nn.MultiLabelSoftMarginLoss(), "bernoulli"),
        (NeuralNetBinaryClassifier, nn.BCEWithLogitsLoss, "categorical"),
        (NeuralNetRegressor, nn.MSELoss, "gaussian"),
        (NeuralNetRegressor, nn.HuberLoss, "gaussian"),
        (NeuralNetRegressor, nn.L1Loss, "gaussian"),
        (NeuralNet, nn.SmoothL1Loss, "gaussian"),
    ],
)
def test_likelihood_by_criterion(kind: Any, criterion: Any, expected: str) -> None:
    net = kind(nets.mlp(), criterion=criterion)
    assert likelihood_name(net) == expected
    assert likelihood_name(net.initialize()) == expected


def test_likelihood_by_parameter() -> None:
    net = NeuralNet(nets.mlp(), criterion=Own).initialize()
    with pytest.raises(TypeError, match=r"criterion Own, .*check, rank and factor"):
        likelihood_of(net, "auto")
    assert isinstance(likelihood_of(net, "gaussian"), Gaussian)
    given = Gaussian(0.1)
    assert likelihood_of(net, given) is given


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_probabilities_of_labels_become_logits(dtype: torch.dtype) -> None:
    net = NeuralNet(nets.mlp(3, nn.Sigmoid()), criterion=nn.BCELoss).initialize()
    to_logits = to_logits_of(net, None, Bernoulli())
    z = torch.tensor([[-80.0, -3.0, 0.0, 5.0]], dtype=dtype)
    torch.testing.assert_close(to_logits(z.sigmoid()), z)
    ends = to_logits(torch.tensor([[0.0, 1.0]], dtype=dtype))
    assert torch.isfinite(ends).all()
    assert to_logits(torch.tensor([[-0.1], [1.1]], dtype=dtype)).isnan().all()


def test_probabilities_and_logits_choose_alike() -> None:
    torch.manual_seed(0)
    module = nets.mlp(3)
    options = nets.options()
    logits = NeuralNet(module, criterion=nn.BCEWithLogitsLoss, **options).initialize()
    both = nn.Sequential(module, nn.Sigmoid())
    probabilities = NeuralNet(both, criterion=nn.BCELoss, **options).initialize()
    sampler = FisherMaskSampler(mask="all", **PUBLISHED, random_state=0)
    picks, gains = sampler(logits, X, 5)
    other, other_gains = sampler(probabilities, X, 5)
    assert picks.tolist() == other.tolist()
    np.testing.assert_allclose(gains, other_gains, rtol=1e-4)


def test_values_that_are_no_probabilities_are_named_by_row() -> None:
    net = NeuralNet(nets.mlp(3), criterion=nn.BCELoss, **nets.options()).initialize()
    with pytest.raises(ValueError, match=r"row 0 of X_pool. With BCELoss the module is expected"):
        FisherMaskSampler()(net, X, 3)


@pytest.mark.parametrize(
    ("net", "y", "message"),
    [
        (NeuralNetRegressor(nets.mlp()), ["cat", "dog"], r"MSELoss is for numbers.*'cat'"),
        (
            NeuralNetClassifier(nets.mlp(), criterion=nn.CrossEntropyLoss),
            [0.5, 1.25],
            r"CrossEntropyLoss is for classes, but y has continuous numbers such as .*0.5",
        ),
        (
            NeuralNet(nets.mlp(), criterion=nn.BCEWithLogitsLoss),
            [0, 1, 2],
            r"several labels a sample: expected y of shape \(n, n_labels\).*found shape \(3,\)",
        ),
        (NeuralNet(nets.mlp(), criterion=nn.BCEWithLogitsLoss), [[0, 2]], "with 0 and 1"),
        (
            NeuralNet(nets.mlp(), criterion=nn.BCELoss),
            [[0, 1], [1, np.nan]],
            "y contains NaN, first in row 1, column 1: leave.*criterion that leaves NaN out",
        ),
    ],
)
def test_labels_of_another_kind(net: Any, y: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_labels_fit(net, np.asarray(y))


@pytest.mark.parametrize(
    ("net", "y"),
    [
        (NeuralNetRegressor(nets.mlp()), [[1.5], [2]]),
        (NeuralNetRegressor(nets.mlp()), [1, 2]),
        (NeuralNetClassifier(nets.mlp()), ["a", "b"]),
        (NeuralNetClassifier(nets.mlp()), [0.0, 1.0]),
        (NeuralNet(nets.mlp(), criterion=MaskedBCE), [[0, np.nan], [1, 0]]),
        (OwnLoss(nets.mlp(), criterion=nn.BCEWithLogitsLoss), [[0, np.nan], [1, 0]]),
        (NeuralNet(nets.mlp(), criterion=Own), ["anything"]),
    ],
)
def test_labels_of_the_kind(net: Any, y: list) -> None:
    check_labels_fit(net, np.asarray(y))
