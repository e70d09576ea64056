from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from skorch import NeuralNetBinaryClassifier, NeuralNetClassifier
from skorch.exceptions import NotInitializedError
from torch import Tensor, nn

from skfishermask import FisherMaskSampler
from skfishermask.data import NetSamples, SampleRole, to_logits_of
from skfishermask.data.net import check_net
from skfishermask.fisher import predicted_means
from tests import nets

X, Y = nets.digits()


class SigmoidNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nets.mlp(1, nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)[:, 0]


class TupleNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nets.mlp()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.mlp(x), x


CONVENTIONS = {
    "logits": nets.logits_net,
    "probabilities": nets.probabilities_net,
    "one logit": nets.binary_net,
    "one probability": lambda: NeuralNetBinaryClassifier(
        SigmoidNet, criterion=nn.BCELoss, **nets.options()
    ),
    "tuple": lambda: NeuralNetClassifier(TupleNet, criterion=nn.CrossEntropyLoss, **nets.options()),
    "own nonlinearity": lambda: nets.logits_net(predict_nonlinearity=lambda z: (z / 2).softmax(-1)),
    "compiled": lambda: nets.logits_net(compile=True, compile__backend="eager"),
}


@pytest.mark.parametrize("make", CONVENTIONS.values(), ids=CONVENTIONS)
def test_logits_give_the_probabilities_that_the_net_predicts(make: Any) -> None:
    net = make().initialize()
    expected = net.predict_proba(X[:40])
    batches = NetSamples(net, X[:40], SampleRole.POOL).batches()
    found = predicted_means(net.module_, batches, to_logits=to_logits_of(net))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-7)


def test_probabilities_that_underflow_give_finite_logits_and_gradients() -> None:
    net = nets.probabilities_net().initialize()
    p = torch.tensor([[1.0, 0.0, 1e-42]], requires_grad=True)
    logits = to_logits_of(net)(p)
    (gradient,) = torch.autograd.grad(logits.sum(), p)
    assert torch.isfinite(logits).all()
    assert torch.isfinite(gradient).all()


class Late(nn.Module):
    """Outputs what are no probabilities for samples with a 7 as first number."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x) * (1 + (x[:, :1] == 7))


EXPECTED = r"not probabilities for row {} of {}\. With {}, .* probabilities .* CrossEntropyLoss"


def test_logits_where_probabilities_are_expected() -> None:
    net = NeuralNetClassifier(nets.mlp(), **nets.options()).initialize()
    with pytest.raises(ValueError, match=EXPECTED.format(0, "X_pool", "NLLLoss")):
        FisherMaskSampler()(net, X[:50], 3)
    module = Late(nets.mlp(10, nn.Softmax(1)))
    net = NeuralNetClassifier(module, **nets.options()).initialize()
    pool = X[:50].copy()
    pool[23, 0] = 7
    with pytest.raises(ValueError, match=EXPECTED.format(23, "X_pool", "NLLLoss")):
        FisherMaskSampler()(net, pool, 3)
    with pytest.raises(ValueError, match=EXPECTED.format(23, "X_labeled", "NLLLoss")):
        FisherMaskSampler(n_mask_samples=None)(net, X[:50], 3, X_labeled=pool)


def test_probabilities_of_one_class_beyond_one() -> None:
    module = nn.Sequential(Late(nets.mlp(1, nn.Sigmoid())), nn.Flatten(0))
    net = NeuralNetBinaryClassifier(module, criterion=nn.BCELoss, **nets.options()).initialize()
    pool = X[:50].copy()
    pool[31] = 100.0
    pool[31, 0] = 7
    nn.init.constant_(module[0].mlp[0].weight, 1)
    nn.init.constant_(module[0].mlp[2].weight, 1)
    with pytest.raises(ValueError, match=EXPECTED.format(31, "X_pool", "BCELoss")):
        FisherMaskSampler()(net, pool, 3)


def test_probabilities_can_be_mapped_over_samples() -> None:
    net = nets.probabilities_net().initialize()
    to_logits, x = to_logits_of(net), torch.as_tensor(X[:5])
    mapped = torch.vmap(lambda sample: to_logits(net.module_(sample[None]))[0])(x)
    torch.testing.assert_close(mapped, to_logits(net.module_(x)))


def test_not_initialized() -> None:
    with pytest.raises(NotInitializedError):
        check_net(nets.logits_net())
