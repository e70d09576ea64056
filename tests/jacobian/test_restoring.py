"""Values and hooks of a network's tensors are restored after a read."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from skfishermask.jacobian.restoring import restore_value, storage_of, without_hooks
from tests.jacobian.test_isolation import READS, fail


@pytest.mark.parametrize(
    "write",
    [
        lambda t: t.mul_(2),
        lambda t: t.data.mul_(2),
        lambda t: setattr(t, "data", t.data * 2),
        lambda t: setattr(t, "data", t.data.clone()),
        lambda t: t.fill_(torch.nan),
        lambda t: t.resize_(2).zero_(),
        lambda t: t.unsqueeze_(1),
    ],
    ids=["in place", "data", "other memory", "equal memory", "NaN", "fewer", "another shape"],
)
def test_a_value_is_restored_in_its_memory(write: object) -> None:
    tensor = nn.Parameter(torch.tensor([1.0, torch.nan, 3.0]), requires_grad=False)
    before, address = tensor.clone(), tensor.data_ptr()
    restore = restore_value(tensor)
    write(tensor)  # type: ignore[operator]
    restore()
    torch.testing.assert_close(tensor.data, before, equal_nan=True, rtol=0, atol=0)
    assert tensor.data_ptr() == address == storage_of(tensor)


@pytest.mark.parametrize(
    "make",
    [
        torch.inference_mode()(lambda: torch.ones(2)),
        nn.UninitializedParameter,
        lambda: torch.ones(2, device="meta"),
    ],
    ids=["inference", "lazy", "meta"],
)
def test_what_has_no_value_of_its_own_to_restore_is_left_alone(make: Callable[[], Tensor]) -> None:
    restore_value(make())()


def test_nothing_is_written_where_nothing_has_changed() -> None:
    tensor = torch.tensor([1.0, torch.nan])
    version = tensor._version
    restore_value(tensor)()
    assert tensor._version == version


def test_hooks_are_restored_in_their_order() -> None:
    tensor = torch.ones(2, requires_grad=True)
    handles = [tensor.register_hook(lambda g, i=i: g + i) for i in range(3)]
    before = [*tensor._backward_hooks.items()]
    restore = without_hooks(tensor, "_backward_hooks")
    assert tensor._backward_hooks == {}
    tensor.register_hook(fail)
    restore()
    assert [*tensor._backward_hooks.items()] == before
    tensor.sum().backward()
    assert tensor.grad.tolist() == [4, 4]
    handles[0].remove()
    assert len(tensor._backward_hooks) == 2


def void(handle: object) -> None:
    """Return nothing, as what a forward hook returns replaces the output."""


def on_gradient(h: Tensor, hook: Callable[[Tensor], Tensor]) -> None:
    if h.requires_grad:
        h.register_hook(hook=hook).remove  # noqa: B018, the handle has what handles have


def on_node(h: Tensor, register: str, factor: float) -> None:
    """Scale the gradients at the operation that h comes from, before it or after it."""
    if h.grad_fn is not None:
        assert h.grad_fn.name()
        getattr(h.grad_fn, register)(lambda g, *of_output: tuple(factor * one for one in g))


def on_earlier_nodes(h: Tensor) -> None:
    """Scale the gradients at all operations before the one that h comes from."""
    nodes = [] if h.grad_fn is None else [h.grad_fn]
    while nodes:
        earlier = [node for node, _ in nodes.pop().next_functions if node is not None]
        for node in earlier:
            node.register_prehook(lambda gs: tuple(g if g is None else 3 * g for g in gs)).remove  # noqa: B018
        nodes += earlier


def on_sum(p: nn.Parameter) -> None:
    """Fail where autograd adds to ``grad``, as an optimizer in the backward pass registers it."""
    p.summed_by = p.expand_as(p).grad_fn.next_functions[0][0]
    p.summed_by.register_prehook(fail)
    p.summed_by.register_hook(fail)


def hooked(module: nn.Module, how: str, request: pytest.FixtureRequest) -> nn.Module:
    """The same network, with something at its gradients that is none of its own derivative."""
    if how == "post-accumulate":
        for p in module.parameters():
            p.register_post_accumulate_grad_hook(lambda p: p.grad.zero_())
    elif how == "clipping":
        for p in module.parameters():
            p.register_hook(lambda g: g.clamp(-1e-3, 1e-3))
    elif how == "mask":
        module[0].weight.register_hook(lambda g: g * (torch.arange(g.numel()) % 2).view_as(g))
    elif how == "several":
        torch.autograd.graph.register_multi_grad_hook([*module.parameters()], fail)
    elif how == "activation":
        module[0].register_forward_hook(lambda m, of_input, h: on_gradient(h, lambda g: 3 * g))
    elif how == "operation":
        module[0].register_forward_hook(lambda m, x, h: void(on_node(h, "register_prehook", 3)))
    elif how == "operation, after":
        module[1].register_forward_hook(lambda m, x, h: void(on_node(h, "register_hook", 3)))
    elif how == "earlier operation":
        module[2].register_forward_hook(lambda m, x, h: void(on_earlier_nodes(h)))
    elif how == "sum of a parameter":
        for p in module.parameters():
            on_sum(p)
    elif how == "all modules":
        register = nn.modules.module.register_module_full_backward_hook
        request.addfinalizer(register(lambda m, of_input, of_output: (3 * of_input[0],)).remove)
    elif how == "activations":
        module[1].register_forward_hook(
            lambda m, x, h: void(torch.autograd.graph.register_multi_grad_hook([x[0], h], fail))
        )
    elif how == "parameter, each time":
        module[0].register_forward_hook(
            lambda m, x, h: void(m.weight.register_post_accumulate_grad_hook(fail))
        )
    elif how == "module":
        module[0].register_full_backward_hook(lambda m, of_input, of_output: (3 * of_input[0],))
        module[2].register_full_backward_hook(lambda m, of_input, of_output: (3 * of_input[0],))
    elif how == "module, before":
        module[2].register_full_backward_pre_hook(lambda m, of_output: (3 * of_output[0],))
    return module


@pytest.mark.parametrize(
    "how",
    [
        "post-accumulate",
        "clipping",
        "mask",
        "several",
        "activation",
        "operation",
        "operation, after",
        "earlier operation",
        "sum of a parameter",
        "all modules",
        "activations",
        "parameter, each time",
        "module",
        "module, before",
    ],
)
def test_gradient_hooks_neither_change_the_result_nor_go(
    how: str, request: pytest.FixtureRequest
) -> None:
    torch.manual_seed(0)
    plain, x = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)), torch.randn(6, 5)
    module = hooked(copy.deepcopy(plain), how, request)
    for read in (READS["diagonal"], READS["embedding"]):
        found, expected = read(module, x), read(plain, x)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    if how in ("clipping", "mask"):
        torch.nn.functional.cross_entropy(module(x), torch.arange(6) % 3).backward()
        torch.nn.functional.cross_entropy(plain(x), torch.arange(6) % 3).backward()
        assert not torch.equal(module[0].weight.grad, plain[0].weight.grad)


def test_hooks_of_an_accumulated_gradient_fire_after_a_read() -> None:
    module, x, log = nn.Linear(5, 3), torch.randn(6, 5), []
    node = module.weight.expand_as(module.weight).grad_fn.next_functions[0][0]
    handle = node.register_hook(lambda *of: log.append("after"))
    node.register_prehook(lambda of: log.append("before"))
    READS["diagonal"](module, x)
    assert log == []
    module(x).sum().backward()
    handle.remove()
    module(x).sum().backward()
    assert log == ["before", "after", "before"]


def test_hooks_of_other_threads_fire() -> None:
    """A network that another thread trains while this one is read has hooks of its own."""
    log: list[str] = []

    def train() -> None:
        h = 2 * torch.ones(2, requires_grad=True)
        h.register_hook(lambda g: log.append("tensor"))
        h.sum().grad_fn.next_functions[0][0].register_prehook(lambda g: log.append("node"))
        h.sum().backward()

    def in_a_thread(*_: object) -> None:
        thread = threading.Thread(target=train)
        thread.start()
        thread.join()

    module = nn.Linear(5, 3)
    module.register_forward_hook(in_a_thread)
    READS["output layer"](module, torch.randn(6, 5))
    assert log == ["tensor", "node"]
