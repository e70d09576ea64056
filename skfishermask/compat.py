"""What the package uses of other packages although it is not public, in one place.

`tests/test_compat.py` says which of these a new release has taken away.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from operator import attrgetter

import skorch

# The only way to scikit-learn's InvalidParameterError, with its messages.
from sklearn.utils._param_validation import (
    HasMethods,
    Interval,
    StrOptions,
    validate_parameter_constraints,
)
from torch import Tensor, nn

__all__ = [
    "HasMethods",
    "Interval",
    "StrOptions",
    "as_written",
    "client_that_computes",
    "criteria_of",
    "memory_limit_of",
    "predict_nonlinearity_of",
    "validate_parameter_constraints",
    "without_mode_changes",
]


def as_written(module: nn.Module) -> nn.Module:
    """Return the module inside one that ``torch.compile`` has wrapped, or the module itself."""
    written: nn.Module = getattr(module, "_orig_mod", module)
    return written


def criteria_of(net: skorch.NeuralNet) -> list[str]:
    """Name the attributes of an initialized net that are its criteria."""
    return [f"{name}_" for name in net._criteria]


def predict_nonlinearity_of(net: skorch.NeuralNet) -> Callable[[Tensor], Tensor]:
    """Return what makes probabilities of a net's output: "auto" is a rule of skorch's own."""
    nonlinearity: Callable[[Tensor], Tensor] = net._get_predict_nonlinearity()
    return nonlinearity


def without_mode_changes(net: skorch.NeuralNet) -> skorch.NeuralNet:
    """Return the same net, with the same modules, that sets no training flags as it predicts."""
    copy = object.__new__(type(net))
    vars(copy).update(vars(net), _set_training=lambda training=True: None)
    return copy


def client_that_computes(array: object) -> object:
    """Return the ``distributed.Client`` that Dask would compute this array with, or None."""
    from dask.base import get_scheduler

    # Where there is a client, distributed was imported.
    distributed = sys.modules.get("distributed")
    client = getattr(get_scheduler(collections=[array]), "__self__", None)
    return client if distributed and isinstance(client, distributed.Client) else None


def memory_limit_of(dask_worker: object) -> int | None:
    """Return the bytes that a Dask worker may take; None: without limit."""
    limit: int | None = attrgetter("memory_manager.memory_limit")(dask_worker)
    return limit
