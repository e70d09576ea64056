"""Save the values and gradient hooks of tensors, and restore them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

Restore = Callable[[], None]
# The tables of a parameter's gradient hooks.
GRADIENT_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")
_GET_NODE = Tensor.grad_fn.__get__  # type: ignore[union-attr]


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
            # `tensor.data = other` has replaced its memory.
            if storage_of(tensor) != storage_of(data):
                tensor.data = data
            # Only where needed: writing makes a graph that used the tensor invalid.
            if _differs(tensor, version, value):
                tensor.copy_(value)

    return restore


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


class NoNewHooks(TorchFunctionMode):
    """Ignore gradient hooks that a forward pass registers: on parameters, on results, on nodes.

    They may change gradients, which are then no derivative of what the network predicts.
    """

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call a function of PyTorch's, unless it registers a hook."""
        if function in (Tensor.register_hook, Tensor.register_post_accumulate_grad_hook):
            return _no_hook()
        result = function(*args, **(kwargs or {}))
        is_node = function == _GET_NODE and result is not None
        return _NodeWithoutHooks(result) if is_node else result


class _NodeWithoutHooks:
    """A node of the autograd graph that ignores hooks."""

    def __init__(self, node: Node) -> None:
        self._node = node

    def __getattr__(self, name: str) -> object:
        return (
            _no_hook if name in ("register_hook", "register_prehook") else getattr(self._node, name)
        )


def _no_hook(*args: object) -> RemovableHandle:
    return RemovableHandle(OrderedDict())


def without_hooks(holder: Tensor | nn.Module, name: str) -> Restore:
    """Empty a table of hooks, which autograd reads as it runs; return what restores it."""
    table: dict[int, object] | None = getattr(holder, name, None)
    hooks = dict(table or {})
    if table:
        table.clear()

    def restore() -> None:
        table: dict[int, object] | None = getattr(holder, name, None)
        if table is not None and [*table.items()] != [*hooks.items()]:
            table.clear()
            table.update(hooks)

    return restore
