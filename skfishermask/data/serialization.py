"""A net without what only its training needs, for another process."""

from __future__ import annotations

import copy

import skorch
from torch import nn

from skfishermask.compat import as_written
from skfishermask.data.types import UserValue

# Attributes of a net that only training uses, and that may be large or unable to travel.
_TRAINING = ("callbacks", "callbacks_", "history_", "_optimizers", "train_split")


class _NotCompiled(nn.Module):
    """Stands for a compiled module, which cannot travel: the same names, run as it is written."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._orig_mod = module

    def __getattr__(self, name: str) -> UserValue:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "_orig_mod":  # not there yet
                raise
            return getattr(self._orig_mod, name)

    def forward(self, *args: UserValue, **kwargs: UserValue) -> UserValue:
        """Run the module."""
        return self._orig_mod(*args, **kwargs)


def _travelling(module: nn.Module, copied: dict[int, object]) -> nn.Module:
    plain = as_written(module)
    # One memo for all: modules that share parameters still do so afterwards.
    copy_on_cpu: nn.Module = copy.deepcopy(plain, copied).cpu()
    return copy_on_cpu if plain is module else _NotCompiled(copy_on_cpu)


def net_state(net: skorch.NeuralNet) -> tuple[type, dict[str, object]]:
    """Return what reading an initialized net needs, to travel to another process.

    These are its type and its attributes, with copies of its modules on the CPU.
    """
    state = dict(vars(net), device="cpu")
    for name in (*_TRAINING, *(key for key in state if key.startswith("optimizer"))):
        state.pop(name, None)
    copied: dict[int, object] = {}
    for name, value in state.items():
        if isinstance(value, nn.Module):
            state[name] = _travelling(value, copied)
    return type(net), state


def net_from_state(kind: type, state: dict[str, object], device: str) -> skorch.NeuralNet:
    """Return a net from what `net_state` returned, on a device: it can be read, not trained."""
    net: skorch.NeuralNet = object.__new__(kind)
    vars(net).update(state, device=device)
    for value in state.values():
        if isinstance(value, nn.Module):
            value.to(device)
    return net
