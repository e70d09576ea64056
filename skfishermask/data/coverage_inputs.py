"""What coverage looks at of each sample: the net's inputs, or values inside of the network."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Literal, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from skfishermask.data.rows import is_mapping
from skfishermask.data.types import UserValue
from skfishermask.jacobian import (
    Inputs,
    ToOutputs,
    batch_length,
    exact_mode,
    first_output,
    isolated,
    read_outputs,
)


@dataclass(frozen=True)
class LayerValue:
    """A value inside of a network: what a module is called with first, or what it returns.

    Attributes
    ----------
    module : str
        Its name, as in ``named_modules()``.
    side : {"input", "output"}
        Which of the two.
    """

    module: str
    side: Literal["input", "output"]

    def __str__(self) -> str:
        return f"{self.side} of {self.module}"


def coverage_layers(
    module: nn.Module, first: Inputs, asked: str, to_logits: ToOutputs
) -> list[LayerValue | None]:
    """Return what coverage may look at in a network, the preferred one first.

    Parameters
    ----------
    module : nn.Module
        The network.
    first : tensor, list of tensors or dict of tensors
        A sample.
    asked : str
        The parameter `coverage_inputs`.
    to_logits : callable
        Maps what the module returns to logits.

    Returns
    -------
    list of LayerValue or None
        None stands for the inputs of the network. With ``"auto"``, what the first trained layer is
        given goes before, where frozen layers come before that one.

    Raises
    ------
    ValueError
        If the network has no module of that name.
    """
    if asked == "inputs":
        return [None]
    if asked == "auto":
        trained = _first_trained(module, first, to_logits)
        return [None] if trained is None else [LayerValue(trained, "input"), None]
    names = [name for name, _ in module.named_modules() if name]
    if asked not in names:
        raise ValueError(
            f"coverage_inputs={asked!r} is no module of the network: expected 'auto', 'inputs' or "
            f"one of {', '.join(map(repr, names))}."
        )
    return [LayerValue(asked, "output")]


def has_frozen_parameters(module: nn.Module) -> bool:
    """Return whether some parameters of a network are not trained."""
    return not all(p.requires_grad for p in module.parameters())


def _first_trained(module: nn.Module, first: Inputs, to_logits: ToOutputs) -> str | None:
    """Name the first layer to run that is trained, if frozen ones run before it."""
    if not has_frozen_parameters(module):
        return None
    order: list[tuple[str, bool]] = []  # layers with parameters, and whether one is trained
    hooks = []
    for name, layer in module.named_modules():
        own = [p.requires_grad for p in layer.parameters(recurse=False)]
        if own:
            note = partial(_note_call, order, (name, any(own)))
            hooks.append(layer.register_forward_pre_hook(note))
    try:
        with isolated(module), exact_mode(next(module.parameters()).device), torch.no_grad():
            read_outputs(module, first, to_logits)
    finally:
        for hook in hooks:
            hook.remove()
    trained = next((i for i, (_, is_trained) in enumerate(order) if is_trained), 0)
    return order[trained][0] if trained else None


def _note_call(
    order: list[tuple[str, bool]],
    item: tuple[str, bool],
    module: nn.Module,
    args: tuple[UserValue, ...],
) -> None:
    order.append(item)


class CoverageInputs:
    """Returns what coverage looks at of a batch that a network has just read, in a ``with`` block.

    Parameters
    ----------
    module : nn.Module
        The network.
    layer : LayerValue or None, default=None
        Where in it; None: what it is given.
    """

    def __init__(self, module: nn.Module, layer: LayerValue | None = None) -> None:
        self._module, self._layer = module, layer
        self._thread = threading.get_ident()
        self._value: UserValue = None

    def __enter__(self) -> Self:
        if self._layer is not None:
            there = dict(self._module.named_modules())[self._layer.module]
            if self._layer.side == "input":
                self._hook = there.register_forward_pre_hook(self._note_input, with_kwargs=True)
            else:
                self._hook = there.register_forward_hook(self._note_output)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._layer is not None:
            self._hook.remove()

    def _note_input(
        self, module: nn.Module, args: tuple[UserValue, ...], kwargs: dict[str, UserValue]
    ) -> None:
        self._note(args[0] if args else next(iter(kwargs.values()), None))

    def _note_output(
        self, module: nn.Module, args: tuple[UserValue, ...], output: UserValue
    ) -> None:
        self._note(first_output(output))

    def _note(self, value: UserValue) -> None:
        # Another thread may read the same network.
        if threading.get_ident() == self._thread:
            self._value = value.detach().clone() if isinstance(value, Tensor) else None

    def __call__(self, batch: Inputs) -> Tensor | None:
        """Return one row a sample, flat and of unit length, (n, d); None: no real numbers."""
        value = batch
        if self._layer is not None:
            value, self._value = self._value, None
            if value is None or len(value) != batch_length(batch):
                return None
        return unit_inputs(value)


def unit_inputs(batch: Inputs) -> Tensor | None:
    """Return one row a sample, flat and of unit length, (n, d); None: no real numbers."""
    flat = _flat(batch)
    return None if flat is None else normalize(flat)


def _flat(batch: Inputs) -> Tensor | None:
    if isinstance(batch, Tensor):
        return batch.reshape(len(batch), -1).float() if batch.is_floating_point() else None
    if not isinstance(batch, Mapping | list | tuple):
        return None
    # Inputs by name come in another order in another set.
    several = [batch[key] for key in sorted(batch, key=str)] if is_mapping(batch) else batch
    flat = [inputs for inputs in map(_flat, several) if inputs is not None]
    return torch.cat(flat, 1) if flat and len(flat) == len(several) else None
