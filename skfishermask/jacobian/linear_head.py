"""Outputs that a linear layer makes: their Jacobian at its parameters is the layer's input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from skfishermask.jacobian.graph import Graph
from skfishermask.jacobian.operations import operation_name, operation_of
from skfishermask.jacobian.views import entry_positions

# The number of the bias and of the weight among the operands.
_OPERANDS = {"Mm": (None, 1), "Addmm": (0, 2)}


class NoLinearHeadError(Exception):
    """A batch has other operations than the sample by which a linear head was found."""


@dataclass(frozen=True)
class LinearHead:
    """Outputs (n, C) that are sums of features times parameters.

    The gradient of output c by an entry is one of the features if the entry is of that output, else
    zero.
    """

    features: Tensor  # (n, d), the last of them one
    columns: Tensor  # (2, k), of each entry its output and its feature; on the CPU
    n_outputs: int


def linear_head(
    outputs: Tensor, parameters: Mapping[str, Tensor], indices: Mapping[str, Tensor | None]
) -> LinearHead | None:
    """Find the linear layer that the chosen entries enter, once each, if it makes the outputs.

    Each sample has a row of the outputs, and so of the features. None: the parameters enter another
    operation, or another one follows.
    """
    graph = Graph(outputs, parameters)
    if outputs.dim() != 2 or not graph.nodes or operation_name(graph.nodes[0]) not in _OPERANDS:
        return None
    node = graph.nodes[0]
    bias, weight = _OPERANDS[operation_name(node)]
    uses = [*graph.uses()]
    of_name = {use.name: use for use in uses if use.node is node}
    scales = {getattr(node, f"_saved_{name}", 1) for name in ("alpha", "beta")}
    if not len(uses) == len(of_name) == len(parameters) or scales != {1}:
        return None
    if weight not in {use.operand for use in uses}:
        return None
    inputs = getattr(node, operation_of(node).factors[0]).detach()
    (n, d), n_outputs, columns = inputs.shape, outputs.shape[1], []
    for name, index in indices.items():
        use = of_name[name]
        moved, places = entry_positions(parameters[name].shape, use.views, index)
        if moved is not None or use.shape.numel() != n_outputs * (1 if use.operand == bias else d):
            return None
        places = torch.arange(use.shape.numel()) if places is None else places
        # A bias is the weight of the feature that is one.
        places = places + n_outputs * d * (use.operand == bias)
        columns.append(torch.stack([places % n_outputs, places // n_outputs]))
    features = torch.cat([inputs, inputs.new_ones(n, 1)], 1)
    return LinearHead(features, torch.cat(columns, 1), n_outputs)
