"""What coverage looks at: the inputs, or values inside of a network."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
from skorch import NeuralNetClassifier
from torch import Tensor, nn
from torch.nn.functional import normalize

from skfishermask import FisherMaskSampler
from skfishermask.data import CoverageInputs, LayerValue, coverage_layers
from tests import nets, oracles

X, Y = nets.digits()


class Backbone(nn.Module):
    """Frozen layers, then a head of one layer that is given their features by a function."""

    def __init__(self, n_outputs: int = 10, frozen: bool = True) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 3), nn.Tanh())
        self.backbone.requires_grad_(not frozen)
        self.head = nn.Linear(6, n_outputs)

    def features(self, X: Tensor) -> Tensor:
        x = self.backbone(X.flatten(1).float())
        return torch.cat([x, x.square()], 1)

    def forward(self, X: Tensor) -> Tensor:
        return self.head(self.features(X))


def backbone_net(**options: Any) -> Any:
    return NeuralNetClassifier(Backbone, criterion=nn.CrossEntropyLoss, **nets.options(**options))


@pytest.fixture(scope="module")
def net() -> Any:
    torch.manual_seed(0)
    return backbone_net().fit(X[:60], Y[:60])


def covering(features: Any, weights: Tensor, n: int, labeled: Any = None) -> list[int]:
    pool = normalize(features.detach().double().flatten(1))
    known = pool[:0] if labeled is None else normalize(labeled.detach().double().flatten(1))
    return oracles.select_by_coverage(pool, known, weights, n)


def margins(net: Any, X: Any) -> Tensor:
    top = torch.as_tensor(net.predict_proba(X)).double().sort(1).values[:, -2:]
    return 1 - top[:, 1] + top[:, 0]


def as_pixels(X: np.ndarray) -> np.ndarray:
    return (255 * X).astype("uint8")


@pytest.mark.parametrize("asked", ["auto", "inputs", "backbone", "backbone.1"])
def test_a_layer_is_covered(net: Any, asked: str) -> None:
    pool, labeled, module = X[60:110], X[:20], net.module_
    of = {
        "auto": module.features,
        "inputs": nn.Identity(),
        "backbone": module.backbone,
        "backbone.1": module.backbone[:2],
    }[asked]
    sampler = FisherMaskSampler(coverage_inputs=asked, random_state=0)
    found, _ = sampler(net, pool, 6, X_labeled=labeled)
    there, known = of(torch.as_tensor(pool)), of(torch.as_tensor(labeled))
    assert found.tolist() == covering(there, margins(net, pool), 6, known)
    assert (
        sampler.query_info_["coverage_inputs"]
        == {
            "auto": "input of head",
            "inputs": "inputs",
            "backbone": "output of backbone",
            "backbone.1": "output of backbone.1",
        }[asked]
    )
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


def test_inputs_that_are_no_real_numbers_have_features(net: Any) -> None:
    sampler = FisherMaskSampler(random_state=0)
    integers = (16 * X).round().astype("int64")
    found, _ = sampler(net, integers[60:110], 6)
    features = net.module_.features(torch.as_tensor(integers[60:110]))
    assert found.tolist() == covering(features, margins(net, integers[60:110]), 6)


def test_a_first_batch_covers_what_frozen_layers_return() -> None:
    net = backbone_net()
    sampler = FisherMaskSampler(net, random_state=0)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    found, _ = sampler.query(X[:80], 6)
    assert torch.equal(state, torch.get_rng_state())
    assert not net.initialized_
    with torch.random.fork_rng():
        torch.manual_seed(0)
        features = backbone_net().initialize().module_.features(torch.as_tensor(X[:80]))
    assert found.tolist() == covering(features, torch.ones(80).double(), 6)
    sampler.set_params(coverage_inputs="inputs")
    assert sampler.query(X[:80], 6)[0].tolist() == covering(
        torch.as_tensor(X[:80]), torch.ones(80).double(), 6
    )


def test_trained_networks_are_covered_at_their_inputs() -> None:
    module, first = Backbone(frozen=False), torch.as_tensor(X[:1])
    assert coverage_layers(module, first, "auto", nn.Identity()) == [None]
    module.head.requires_grad_(False)  # frozen layers after trained ones
    assert coverage_layers(module, first, "auto", nn.Identity()) == [None]


def test_a_name_that_is_no_module(net: Any) -> None:
    with pytest.raises(ValueError, match=r"coverage_inputs='bakbone' .*'backbone', 'backbone\.0'"):
        FisherMaskSampler(coverage_inputs="bakbone")(net, X[60:110], 3)
    with pytest.raises(ValueError, match="names a module of a network, found none"):
        FisherMaskSampler(coverage_inputs="backbone").query(X[60:110], 3)


class WithLength(nn.Module):
    """Returns the mean of each sequence, and looks it up by its length in a table."""

    def __init__(self) -> None:
        super().__init__()
        self.length = nn.Flatten(0)
        self.linear = nn.Linear(1, 3)

    def forward(self, X: Tensor) -> Tensor:
        self.length(torch.full((len(X) + 1,), 2.0))
        return self.linear(X.float().mean(1, keepdim=True))


def test_a_layer_without_a_row_a_sample_is_refused() -> None:
    net = NeuralNetClassifier(WithLength, criterion=nn.CrossEntropyLoss, **nets.options())
    net.fit(X[:9], Y[:9] % 3)
    with pytest.raises(ValueError, match="a tensor from the module 'length' with real numbers"):
        FisherMaskSampler(coverage_inputs="length")(net, X[60:80], 3)


def test_another_thread_leaves_no_value() -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    batch = torch.randn(4, 2)
    expected = normalize(module[0](batch).detach())
    with CoverageInputs(module, LayerValue("0", "output")) as inputs:
        module(batch)
        thread = threading.Thread(target=module, args=(torch.zeros(9, 2),))
        thread.start()
        thread.join()
        torch.testing.assert_close(inputs(batch), expected)
        assert inputs(batch) is None  # once for each batch
