"""Gradients that are made inside a backward pass, out of the graph's sight.

Reentrant activation checkpointing and reversible blocks keep no graph of what they compute. Their
backward pass computes it again and calls ``.backward()`` itself, which adds to the parameters'
``.grad``. Such parameters are no leaves of the graph, and `torch.autograd.grad` does not see them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from skfishermask.jacobian.graph import Graph
from skfishermask.jacobian.module_io import Inputs, map_tensors

# Entries of a parameter's gradient that are compared, about.
_N_COMPARED = 4096
# `.grad` belongs to the parameter, not to the thread.
_lock = threading.Lock()


def with_gradients(batch: Inputs) -> Inputs:
    """Return a batch with floating-point inputs that require gradients.

    Without an input that does, reentrant checkpointing computes none, not even the parameters'.
    """
    return map_tensors(batch, lambda t: t.detach().requires_grad_() if t.is_floating_point() else t)


def gradients_by_backward(
    outputs: Tensor, weights: Tensor, parameters: Mapping[str, Tensor], *, retain_graph: bool
) -> dict[str, Tensor]:
    """Return what ``.backward()`` adds to the ``.grad`` of parameters, where it adds any."""
    with _lock:
        try:
            for p in parameters.values():
                p.grad = None
            if outputs.requires_grad:
                outputs.backward(weights, retain_graph=retain_graph)
            return {name: p.grad for name, p in parameters.items() if p.grad is not None}
        finally:
            for p in parameters.values():
                p.grad = None


def hides_gradients(
    graph: Graph, parameters: Mapping[str, Tensor], run: Callable[[], Tensor]
) -> bool:
    """Return whether ``.backward()`` gives parameters other gradients than the graph shows.

    `run` returns the outputs of the graph's batch again, with inputs that require gradients.
    """
    calls_python = any(
        isinstance(n, torch.autograd.function.BackwardCFunction) for n in graph.nodes
    )
    if not calls_python and graph.leaves.keys() == parameters.keys():
        return False
    outputs = run()
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(outputs.shape, generator=generator, dtype=torch.float64) + 0.5
    weights = weights.to(outputs.device, outputs.dtype)
    gradients = gradients_by_backward(outputs, weights, parameters, retain_graph=calls_python)
    # A few entries tell, and gradients may be as large as a table.
    reached = {name: _some_entries(gradient) for name, gradient in gradients.items()}
    del gradients
    if not reached.keys() <= graph.leaves.keys():
        return True
    if not calls_python or not reached:
        return False
    try:
        shown = torch.autograd.grad(
            outputs, [parameters[name] for name in reached], weights, allow_unused=True
        )
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # Reentrant checkpointing refuses it.
        return True
    pairs = zip(reached.values(), shown, strict=True)
    return not all(
        gradient is not None and _are_close(entries, _some_entries(gradient))
        for entries, gradient in pairs
    )


def _some_entries(gradient: Tensor) -> Tensor:
    flat = (gradient.to_dense() if gradient.is_sparse else gradient).flatten()
    return flat[:: max(1, len(flat) // _N_COMPARED)].clone()


def _are_close(a: Tensor, b: Tensor) -> bool:
    tolerance = torch.finfo(a.dtype).eps ** 0.5 * a.abs().max() if a.numel() else 0
    return bool(((a - b).abs() <= tolerance).all())
