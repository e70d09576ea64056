"""Gradients that are made inside a backward pass are read, as those of the plain network."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from skorch import NeuralNetClassifier
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from skfishermask import (
    PUBLISHED,
    FisherMaskSampler,
    ParameterMask,
    fisher_diagonal,
    fisher_embedding,
)
from skfishermask.jacobian import reader
from skfishermask.jacobian.graph import Graph
from skfishermask.jacobian.hidden_gradients import hides_gradients
from tests import nets
from tests.jacobian.test_isolation import fail

X = torch.randn(7, 6, generator=torch.Generator().manual_seed(0))


class Recomputed(torch.autograd.Function):
    """Keeps no graph, and runs a block again in its backward pass, as reversible layers do."""

    @staticmethod
    def forward(ctx: Any, block: nn.Module, x: Tensor) -> Tensor:
        ctx.block = block
        ctx.save_for_backward(x)
        with torch.no_grad():
            return block(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        (x,) = ctx.saved_tensors
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.block(x)
        y.backward(gradient)
        return None, x.grad


def reversible(a: nn.Module, b: nn.Module, x: Tensor) -> Tensor:
    first, second = x.chunk(2, 1)
    second = second + Recomputed.apply(a, first)
    return torch.cat([first + Recomputed.apply(b, second), second], 1)


class Net(nn.Module):
    """A few layers; `how` says which of them are computed again, and not what they compute."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.first = nn.Linear(6, 6)
        self.a, self.b = (nn.Sequential(nn.Linear(3, 3), nn.Tanh()) for _ in range(2))
        self.block = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
        self.shared = nn.Linear(6, 6)
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        match self.how.removesuffix(", plain"), self.how.endswith("plain"):
            case "at the inputs", plain:
                h = self.block(x) if plain else checkpoint(self.block, x, use_reentrant=True)
            case "after a layer", plain:
                h = torch.tanh(self.first(x))
                h = self.block(h) if plain else checkpoint(self.block, h, use_reentrant=True)
            case "all", plain:
                return self._all(x) if plain else checkpoint(self._all, x, use_reentrant=True)
            case "shared", plain:
                h = torch.tanh(self.shared(x))
                h = self.shared(h) if plain else checkpoint(self.shared, h, use_reentrant=True)
            case "sequential", plain:
                layers = nn.Sequential(self.first, self.block, self.shared)
                h = layers(x) if plain else checkpoint_sequential(layers, 2, x, use_reentrant=True)
            case "with hooks", plain:
                h = self.block(x) if plain else checkpoint(self._hooked, x, use_reentrant=True)
            case "nested, with hooks", plain:
                h = self.block(x) if plain else checkpoint(self._nested, x, use_reentrant=True)
            case "reversible", plain:
                h = self.first(x)
                if plain:
                    first, second = h.chunk(2, 1)
                    second = second + self.a(first)
                    h = torch.cat([first + self.b(second), second], 1)
                else:
                    h = reversible(self.a, self.b, h)
        return self.last(h)

    def _all(self, x: Tensor) -> Tensor:
        return self.last(self.block(self.first(x)))

    def _nested(self, x: Tensor) -> Tensor:
        return checkpoint(self._hooked, x, use_reentrant=True)

    def _hooked(self, x: Tensor) -> Tensor:
        h = self.block(x)
        if h.requires_grad:
            h.register_hook(lambda g: 3 * g)
            h.grad_fn.register_prehook(lambda g: (3 * g[0],))
            h.grad_fn.next_functions[0][0].register_prehook(lambda g: (3 * g[0],))
        return h


HOW = [
    "at the inputs",
    "after a layer",
    "all",
    "shared",
    "sequential",
    "with hooks",
    "nested, with hooks",
    "reversible",
]


def net(how: str) -> Net:
    torch.manual_seed(0)
    return Net(how)


def mask_of(module: nn.Module) -> ParameterMask:
    zeros = {name: torch.zeros_like(p.detach()) for name, p in module.named_parameters()}
    return ParameterMask.from_diagonal(zeros, "all", 1.0, output_layer=[])


@pytest.mark.parametrize("sizes", [[7], [1] * 7, [4, 3]], ids=str)
@pytest.mark.parametrize("how", HOW)
def test_equal_to_the_network_that_computes_nothing_again(how: str, sizes: list[int]) -> None:
    module, plain = net(how), net(f"{how}, plain")
    with pytest.warns(UserWarning, match=r"first\.weight \(gradients are made inside a backward"):
        found = fisher_diagonal(module, X.split(sizes))
    torch.testing.assert_close(found, fisher_diagonal(plain, X.split(sizes)))
    with pytest.warns(UserWarning, match="inside a backward"):
        V = fisher_embedding(module, X.split(sizes), mask_of(module))
    torch.testing.assert_close(V, fisher_embedding(plain, [X], mask_of(plain)))
    assert all(p.grad is None for p in module.parameters())


def test_hooks_of_accumulated_gradients_do_not_count() -> None:
    """As an optimizer in the backward pass has them."""
    module, plain = net("at the inputs"), net("at the inputs, plain")
    nodes = [p.expand_as(p).grad_fn.next_functions[0][0] for p in module.parameters()]
    for node in nodes:
        node.register_prehook(fail)
        node.register_hook(fail)
    module.requires_grad_(False)
    with pytest.warns(UserWarning, match="inside a backward"):
        found = fisher_diagonal(module, [X])
    torch.testing.assert_close(found, fisher_diagonal(plain, [X]))


def without_reentry(block: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return checkpoint(block, x, use_reentrant=False)


class Square(torch.autograd.Function):
    """A function of Python's with a graph that shows all there is."""

    n_backward = 0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        Square.n_backward += 1
        return 2 * ctx.saved_tensors[0] * gradient


class Shown(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.block, self.last = nn.Sequential(nn.Linear(6, 6), nn.Tanh()), nn.Linear(6, 3)
        self.unused, self.how = nn.Linear(2, 2) if how == "unused" else None, how
        self.n_forward = 0

    def forward(self, x: Tensor) -> Tensor:
        self.n_forward += 1
        h = without_reentry(self.block, x) if self.how == "checkpoint" else self.block(x)
        return self.last(Square.apply(h) if self.how == "function" else h)


@pytest.mark.parametrize("how", ["checkpoint", "function", "unused"])
def test_what_the_graph_shows_is_read_fast(how: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = fisher_diagonal(Shown(how), [X])
    assert "unused.weight" not in found or not found["unused.weight"].any()
    assert float(found["block.0.weight"].min()) > 0


@pytest.mark.parametrize(
    ("how", "expected"), [("plain", (0, 0)), ("unused", (1, 0)), ("function", (1, 2))]
)
def test_what_the_graph_hides_is_looked_for_once(
    how: str, expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In batches of two sizes, beside a run without that look: forward and backward passes."""
    module, counts = Shown(how), []
    for looks in (False, True):
        with monkeypatch.context() as patched:
            if not looks:
                patched.setattr(reader, "hides_gradients", lambda *args: False)
            module.n_forward = Square.n_backward = 0
            fisher_diagonal(module, X.split([2, 2, 3]))
        counts.append((module.n_forward, Square.n_backward))
    assert tuple(np.subtract(counts[1], counts[0])) == expected


def test_a_few_samples_show_what_the_graph_hides(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []

    def look(graph: Graph, parameters: Any, run: Callable[[], Tensor]) -> bool:
        lengths.append(len(run()))
        return False

    monkeypatch.setattr(reader, "hides_gradients", look)
    fisher_diagonal(Shown("function"), [torch.cat([X, X])])
    assert lengths == [4]


def test_memory_that_runs_out_is_no_hidden_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reentrant checkpointing raises a RuntimeError, and so does memory that runs out."""

    def run_out(*args: Any, **more: Any) -> Any:
        raise torch.OutOfMemoryError("of the test")

    module = Shown("function")
    parameters = dict(module.named_parameters())
    batch = X.clone().requires_grad_()
    graph = Graph(module(batch), parameters)
    monkeypatch.setattr(torch.autograd, "grad", run_out)
    with pytest.raises(torch.OutOfMemoryError, match="of the test"):
        hides_gradients(graph, parameters, lambda: module(batch))


def test_through_the_sampler() -> None:
    images, labels = nets.digits()

    class Deep(nn.Module):
        def __init__(self, reenters: bool = True) -> None:
            super().__init__()
            self.block, self.last = nn.Sequential(nn.Linear(64, 8), nn.ReLU()), nn.Linear(8, 10)
            self.reenters = reenters

        def forward(self, x: Tensor) -> Tensor:
            x = x if not self.reenters else x.clone()
            h = checkpoint(self.block, x, use_reentrant=True) if self.reenters else self.block(x)
            return self.last(h)

    picks = []
    for reenters in (False, True):
        torch.manual_seed(0)
        made = NeuralNetClassifier(Deep(), criterion=nn.CrossEntropyLoss, **nets.options())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            made.fit(images[:60], labels[:60])
            made.module_.reenters = reenters
            sampler = FisherMaskSampler(mask="all", **PUBLISHED, random_state=0)
            picks.append(sampler(made, images[60:90], 5, X_labeled=images[:20])[0])
    np.testing.assert_array_equal(*picks)


class Wrapper(Tensor):
    """Stands for another tensor, as quantised and sharded weights do."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapper:
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        plain = [x.inner if isinstance(x, Wrapper) else x for x in args]
        found = function(*plain, **(kwargs or {}))
        return Wrapper(found) if str(function).startswith("aten.detach") else found


@pytest.mark.parametrize("kind", ["parameter", "buffer"])
def test_tensors_that_stand_for_others_are_refused_by_name(kind: str) -> None:
    module = nn.Sequential(nn.Linear(6, 3))
    if kind == "parameter":
        module[0].register_parameter("scale", nn.Parameter(Wrapper(torch.ones(3))))
    else:
        module[0].register_buffer("scale", Wrapper(torch.ones(3)))
    with pytest.raises(TypeError, match=r"memory of their own, found 0\.scale, a Wrapper"):
        fisher_diagonal(module, [X])
