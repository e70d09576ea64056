from __future__ import annotations

import threading
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch
from skorch import NeuralNetClassifier
from skorch.callbacks import Callback

from skfishermask.data import net_from_state, net_state
from tests import nets

X, _ = nets.digits()


def sent(net: Any) -> Any:
    return net_from_state(*cloudpickle.loads(cloudpickle.dumps(net_state(net))), "cpu")


@pytest.mark.parametrize("make", [nets.logits_net, nets.probabilities_net, nets.binary_net])
@pytest.mark.parametrize("options", [{}, {"compile": True, "compile__backend": "eager"}], ids=str)
def test_a_net_that_was_sent_predicts_the_same(make: Any, options: dict[str, Any]) -> None:
    net = make(**options).initialize()
    there = sent(net)
    assert type(there) is type(net)
    np.testing.assert_array_equal(there.predict_proba(X[:20]), net.predict_proba(X[:20]))
    names = [name for name, _ in net.module_.named_parameters()]
    assert [name for name, _ in there.module_.named_parameters()] == names


class Locked(Callback):
    """Cannot be pickled."""

    def __init__(self) -> None:
        self.lock = threading.Lock()


def test_what_only_training_needs_is_not_sent() -> None:
    net = nets.fitted(nets.logits_net(callbacks=[Locked()]))
    with pytest.raises(TypeError, match="lock"):
        cloudpickle.dumps(net)
    there = sent(net)
    for name in ("callbacks_", "history_", "optimizer_"):
        assert hasattr(net, name)
        assert not hasattr(there, name)


def test_the_state_is_a_copy() -> None:
    net = nets.logits_net().initialize()
    _, parts = net_state(net)
    before = net.predict_proba(X[:5])
    with torch.no_grad():
        parts["module_"][0].weight.zero_()
    np.testing.assert_array_equal(net.predict_proba(X[:5]), before)


class TwoHeads(NeuralNetClassifier):
    """Has the last layer of its module as a module of its own, too."""

    def initialize_module(self) -> Any:
        super().initialize_module()
        self.head_ = self.module_[-1]
        return self


def test_modules_that_share_parameters_still_do() -> None:
    there = sent(TwoHeads(nets.mlp, **nets.options()).initialize())
    assert there.head_ is there.module_[-1]
