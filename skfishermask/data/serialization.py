"""A net without what only its training needs, for another process."""

from __future__ import annotations

import copy

import skorch
from torch import nn

from skfishermask.compat import as_written
from skfishermask.data.types import UserValue

# Parts of a net that only training uses, and that may be large or unable to travel.
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
    found: nn.Module = copy.deepcopy(plain, copied).cpu()
    return found if plain is module else _NotCompiled(found)


def net_state(net: skorch.NeuralNet) -> tuple[type, dict[str, object]]:
    """Return what reading a net needs, to travel to another process.

    Parameters
    ----------
    net : skorch classifier
        Initialized; left as it is.

    Returns
    -------
    kind : type
        Of the net.
    parts : dict
        Its attributes, with copies of its modules on the CPU.
    """
    parts = dict(vars(net), device="cpu")
    for name in (*_TRAINING, *(key for key in parts if key.startswith("optimizer"))):
        parts.pop(name, None)
    copied: dict[int, object] = {}
    for name, value in parts.items():
        if isinstance(value, nn.Module):
            parts[name] = _travelling(value, copied)
    return type(net), parts


def net_from_state(kind: type, parts: dict[str, object], device: str) -> skorch.NeuralNet:
    """Make a net again of what `net_state` gave, to read it.

    Parameters
    ----------
    kind : type
        Of the net.
    parts : dict
        Its attributes.
    device : str
        Where it shall compute.

    Returns
    -------
    skorch classifier
        It can be read, not trained.
    """
    net: skorch.NeuralNet = object.__new__(kind)
    vars(net).update(parts, device=device)
    for value in parts.values():
        if isinstance(value, nn.Module):
            value.to(device)
    return net
