"""The guest rules: nothing of the network or the random states is different afterwards."""

from __future__ import annotations

import random

import networks
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from skfishermask import ParameterMask, fisher_diagonal, fisher_embedding
from skfishermask.fisher.network import output_layer
from skfishermask.fisher.visit import visiting


class Careless(nn.Module):
    """A network that keeps state, draws numbers, and fails when told to."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(5)
        self.frozen_norm = nn.BatchNorm1d(5)
        self.hidden = nn.Linear(5, 4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.output = nn.Linear(4, 3)
        self.register_buffer("n_calls", torch.zeros(()))
        self.register_buffer("latest", torch.zeros(2, 2))
        self.fail = False

    def forward(self, x: Tensor) -> Tensor:
        self.n_calls += 1
        self.latest = torch.randn(2, 2)
        np.random.rand(), random.random()  # noqa: NPY002
        h = self.frozen(torch.tanh(self.hidden(self.frozen_norm(self.norm(x)))))
        if self.fail:
            raise KeyboardInterrupt
        return self.output(torch.dropout(h, 0.5, self.training))


def state(module: nn.Module) -> dict[str, object]:
    """Everything that must not change, by value and by identity."""
    return {
        "training": [m.training for m in module.modules()],
        "trainable": [p.requires_grad for p in module.parameters()],
        "parameters": [(id(p), p.detach().clone()) for p in module.parameters()],
        "grads": [
            None if p.grad is None else (id(p.grad), p.grad.clone()) for p in module.parameters()
        ],
        "buffers": [(name, id(b), b.clone()) for name, b in module.named_buffers()],
        "hooks": [
            [len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)]
            for m in module.modules()
        ],
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state()[1:],  # noqa: NPY002
        "python": random.getstate(),
        "grad mode": torch.is_grad_enabled(),
        "cudnn": torch.backends.cudnn.enabled,
        "fastpath": torch.backends.mha.get_fastpath_enabled(),
    }


def same(a: object, b: object) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def careless() -> Careless:
    module = Careless().train()
    module.frozen_norm.eval()
    module(torch.randn(6, 5)).sum().backward()
    module.output.register_forward_hook(lambda *_: None)
    return module


def mask_of(module: nn.Module) -> ParameterMask:
    zeros = {name: torch.zeros_like(p.detach()) for name, p in module.named_parameters()}
    return ParameterMask.from_diagonal(zeros, "all", 1.0, output_layer=[])


READS = {
    "diagonal": lambda m, x: fisher_diagonal(m, [x[:4], x[4:]]),
    "embedding": lambda m, x: fisher_embedding(m, [x[:4], x[4:]], mask_of(m)),
    "output layer": lambda m, x: output_layer(m, x),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_no_trace_after_reading(read: object) -> None:
    module, x = careless(), torch.randn(6, 5)
    before = state(module)
    read(module, x)
    after = state(module)
    assert [key for key in before if not same(before[key], after[key])] == []


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_no_trace_after_an_interruption(read: object) -> None:
    module, x = careless(), torch.randn(6, 5)
    module.fail = True
    before = state(module)
    with pytest.raises(KeyboardInterrupt):
        read(module, x)
    after = state(module)
    assert [key for key in before if not same(before[key], after[key])] == []


@pytest.mark.parametrize("name", networks.NETWORKS)
def test_no_trace_on_any_network(name: str) -> None:
    make, sample = networks.NETWORKS[name]
    module, x = make().train(), sample(3)
    mask, before = mask_of(nn.Linear(1, 1)), state(module)
    fisher_diagonal(module, [x])
    with pytest.raises(ValueError, match="was made for parameters"):
        fisher_embedding(module, [x], mask)
    after = state(module)
    assert [key for key in before if not same(before[key], after[key])] == []


def test_a_generator_that_is_dropped_leaves_no_trace() -> None:
    from skfishermask.fisher import embedding_blocks

    module, x = careless(), torch.randn(6, 5)
    before = state(module)
    blocks = embedding_blocks(module, [x[:3], x[3:]], mask_of(module))
    next(blocks)
    assert not same(before, state(module))  # The visit is under way.
    blocks.close()
    assert same(before, state(module))


def test_inside_a_visit() -> None:
    module = careless()
    with torch.no_grad(), visiting(module):
        assert not any(m.training for m in module.modules())
        assert not any(p.requires_grad for p in module.parameters())
        assert torch.is_grad_enabled()


def test_works_under_no_grad_and_inference_mode() -> None:
    module, x = networks.mlp(), torch.randn(4, 5)
    expected = fisher_embedding(module, [x], mask_of(module))
    with torch.no_grad():
        assert torch.equal(fisher_embedding(module, [x], mask_of(module)), expected)
    with torch.inference_mode():
        inference = x.clone()
        assert torch.equal(fisher_embedding(module, [inference], mask_of(module)), expected)
    assert torch.equal(fisher_embedding(module, [inference], mask_of(module)), expected)
