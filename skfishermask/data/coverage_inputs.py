"""What coverage looks at of each sample: the net's inputs, or values inside of the network."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, Self, Unpack

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from skfishermask.data.rows import is_mapping
from skfishermask.data.types import UserValue
from skfishermask.fisher import Predictions, ReadOptions, predict
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
    """A value inside of a network: what a module is called with first, or what it returns."""

    module: str  # its name, as in ``named_modules()``
    side: Literal["input", "output"]

    def __str__(self) -> str:
        return f"{self.side} of {self.module}"


def coverage_layers(
    module: nn.Module, first: Inputs, asked: str, to_logits: ToOutputs
) -> list[LayerValue | None]:
    """Return what coverage may look at in a network, the preferred one first.

    None stands for the inputs of the network. Where `asked`, the parameter `coverage_inputs`, is
    ``"auto"``, what the first trained layer is given goes before, if frozen layers come before that
    one. Raises ValueError if the network has no module of that name.
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
            item = name, any(own)
            hooks.append(layer.register_forward_pre_hook(lambda *_, item=item: order.append(item)))
    try:
        with isolated(module), exact_mode(next(module.parameters()).device), torch.no_grad():
            read_outputs(module, first, to_logits)
    finally:
        for hook in hooks:
            hook.remove()
    trained = next((i for i, (_, is_trained) in enumerate(order) if is_trained), 0)
    return order[trained][0] if trained else None


class CoverageInputs:
    """Returns what coverage looks at of a batch that a network has just read, in a ``with`` block.

    That is the value of a `layer`; None: what the network is given.
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

    def __exit__(self, *error: object) -> None:
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


def covered_predictions(
    layer: LayerValue | None,
    module: nn.Module,
    batches: Iterable[Inputs],
    **options: Unpack[ReadOptions],
) -> Predictions:
    """Return predictions, and what coverage looks at: a layer's value or the inputs."""
    with CoverageInputs(module, layer) as inputs:
        return predict(module, batches, inputs=inputs, **options)


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
