"""Gradients of single samples by hooks on layers, in the manner of Opacus and BackPACK."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Gradients of a layer's weight and bias, samples first, from its input and its output's gradient.
_Rule = Callable[[Any, Tensor, Tensor], tuple[Tensor, Tensor]]


def _linear(layer: nn.Linear, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    x, g = x.reshape(len(x), -1, x.shape[-1]), g.reshape(len(g), -1, g.shape[-1])
    return torch.einsum("npo,npi->noi", g, x), g.sum(1)


def _conv(layer: nn.Conv2d, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    if layer.groups != 1 or isinstance(layer.padding, str):
        raise NotImplementedError("a convolution in groups, or padded by name")
    windows = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
    weight = torch.einsum("nop,nip->noi", g.flatten(2), windows)
    return weight.reshape(len(x), *layer.weight.shape), g.flatten(2).sum(2)


def _batch_norm(layer: nn.BatchNorm2d, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    scale = (layer.running_var + layer.eps).rsqrt()
    x = (x - layer.running_mean[:, None, None]) * scale[:, None, None]
    return (g * x).sum((2, 3)), g.sum((2, 3))


def _layer_norm(layer: nn.LayerNorm, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    over = tuple(range(1, x.ndim - len(layer.normalized_shape)))
    x = F.layer_norm(x, layer.normalized_shape, eps=layer.eps)
    return ((g * x).sum(over), g.sum(over)) if over else (g * x, g)


def _embedding(layer: nn.Embedding, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    whole = g.new_zeros(len(x), *layer.weight.shape)
    index = x.reshape(len(x), -1, 1).expand(-1, -1, g.shape[-1])
    whole.scatter_add_(1, index, g.reshape(len(x), -1, g.shape[-1]))
    if layer.padding_idx is not None:
        whole[:, layer.padding_idx] = 0
    return whole, whole


_RULES: dict[type[nn.Module], _Rule] = {
    nn.Linear: _linear,
    nn.Conv2d: _conv,
    nn.BatchNorm2d: _batch_norm,
    nn.LayerNorm: _layer_norm,
    nn.Embedding: _embedding,
}


class HookedGradients:
    """Gradients of each sample at all parameters of a network's layers.

    Parameters
    ----------
    module : nn.Module
        In evaluation mode; each layer samples first, and used once in a forward pass.

    Raises
    ------
    NotImplementedError
        If a parameter belongs to a layer without a rule.
    """

    def __init__(self, module: nn.Module) -> None:
        self._layers = {}
        self._seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        for name, layer in module.named_modules():
            if not [*layer.parameters(recurse=False)]:
                continue
            if type(layer) not in _RULES:
                raise NotImplementedError(type(layer).__name__)
            self._layers[layer] = name

    def _note(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if layer in self._seen:
            raise NotImplementedError("a layer that is used twice")
        self._seen[layer] = inputs[0].detach(), output

    def forward(self, run: Callable[[], Tensor]) -> Tensor:
        """Run a forward pass; note the layers' inputs and outputs."""
        self._seen.clear()
        hooks = [layer.register_forward_hook(self._note) for layer in self._layers]
        try:
            return run()
        finally:
            for hook in hooks:
                hook.remove()

    def backward(self, logits: Tensor, rows: Tensor) -> dict[str, Tensor]:
        """Contract the logits with (n, C); return whole gradients, samples first, by name."""
        outputs = [output for _, output in self._seen.values()]
        gradients = torch.autograd.grad(logits, outputs, rows, retain_graph=True)
        found = {}
        for (layer, (x, _)), g in zip(self._seen.items(), gradients, strict=True):
            values = _RULES[type(layer)](layer, x, g)
            for name, value in zip(("weight", "bias"), values, strict=True):
                if getattr(layer, name, None) is not None:
                    found[f"{self._layers[layer]}.{name}"] = value
        return found
