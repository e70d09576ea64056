"""Save the values and gradient hooks of tensors, and restore them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import _HookMixin
from torch.autograd.graph import get_gradient_edge
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

Restore = Callable[[], None]
Hooks = dict[int, object]
# The tables of a parameter's gradient hooks.
GRADIENT_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")


def do_nothing() -> None:
    """Restore nothing."""


def restore_value(tensor: Tensor) -> Restore:
    """Copy a tensor; return a function that restores its value where it has changed."""
    # Nothing outside inference mode can write to an inference tensor.
    if is_lazy(tensor) or tensor.is_inference() or storage_of(tensor) is None:
        return do_nothing
    # A copy, because what is written through `tensor.data` does not count as a version.
    data, version, value = tensor.detach(), tensor._version, tensor.detach().clone()

    def restore() -> None:
        with torch.no_grad():
            # `tensor.data = other` has replaced its memory, or `resize_` has changed its shape.
            if _place_of(tensor) != _place_of(data):
                tensor.data = data
            # Only where needed: writing makes a graph that used the tensor invalid.
            if _differs(tensor, version, value):
                tensor.copy_(value)

    return restore


def _place_of(tensor: Tensor) -> object:
    strides = tensor.stride() if tensor.layout == torch.strided else None
    return storage_of(tensor), tensor.shape, strides


def storage_of(tensor: Tensor) -> int | None:
    """Return the address of a tensor's memory; None where it has none of its own.

    So it is with wrapper subclasses, which stand for other tensors (quantised or sharded ones), and
    on the meta device.
    """
    if tensor.layout != torch.strided:
        return id(tensor)
    try:
        return tensor.untyped_storage().data_ptr() if not tensor.is_meta else None
    except RuntimeError:
        return None


def _differs(tensor: Tensor, version: int, value: Tensor) -> bool:
    if tensor.layout != torch.strided:
        return tensor._version != version
    if torch.equal(tensor, value):
        return False
    is_nan = tensor.isnan() & value.isnan()
    return not bool(((tensor == value) | is_nan).all())


def _no_hook(tensor: Tensor, hook: object) -> RemovableHandle:
    return RemovableHandle(OrderedDict())


def _no_hook_of_node(hooks: Hooks | None, hook: object) -> tuple[Hooks, RemovableHandle]:
    hooks = OrderedDict() if hooks is None else hooks
    return hooks, RemovableHandle(hooks)


# What registers gradient hooks, and what ignores them instead. The last one is asked for a hook on
# any node, however it was reached.
_REGISTERING = (
    (Tensor, "register_hook", _no_hook),
    (Tensor, "register_post_accumulate_grad_hook", _no_hook),
    (_HookMixin, "_register_hook", _no_hook_of_node),
)


def ignore_new_hooks(is_reading: Callable[[], bool]) -> None:
    """Ignore the gradient hooks that are registered while `is_reading` is true.

    They may change gradients, which are then no derivative of what the network predicts.
    """

    def unless_reading(register: Callable[..., Any], ignore: Callable[..., Any]) -> Any:
        @wraps(register)
        def wrapped(*args: Any, **more: Any) -> Any:
            return (ignore if is_reading() else register)(*args, **more)

        return wrapped

    for holder, name, ignore in _REGISTERING:
        wrapped = unless_reading(getattr(holder, name), ignore)
        setattr(holder, name, staticmethod(wrapped) if holder is _HookMixin else wrapped)


def registering_functions() -> Restore:
    """Save the functions that register gradient hooks; return what restores them."""
    saved = [(holder, name, vars(holder)[name]) for holder, name, _ in _REGISTERING]

    def restore() -> None:
        for one in saved:
            setattr(*one)

    return restore


def without_hooks(holder: Tensor | nn.Module, name: str) -> Restore:
    """Empty a table of hooks, which autograd reads as it runs; return what restores it."""
    return _emptied(partial(getattr, holder, name, None))


@torch.inference_mode(False)
def without_hooks_of_node(parameter: Tensor) -> list[Restore]:
    """Empty the tables of hooks on the node that adds to a parameter's ``grad``.

    The parameter must require gradients.
    """
    node = get_gradient_edge(parameter).node
    # A handle knows the table that it is in: there is no other way to it.
    handles = [register(do_nothing) for register in (node.register_hook, node.register_prehook)]
    for handle in handles:
        handle.remove()
    return [_emptied(handle.hooks_dict_ref) for handle in handles]


def _emptied(get_table: Callable[[], Hooks | None]) -> Restore:
    table = get_table()
    hooks = dict(table or {})
    if table:
        table.clear()

    def restore() -> None:
        table = get_table()
        if table is not None and [*table.items()] != [*hooks.items()]:
            table.clear()
            table.update(hooks)

    return restore
