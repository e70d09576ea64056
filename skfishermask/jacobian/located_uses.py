"""The uses of parameters in a batch's graph, and which rows of each belong to which sample."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from skfishermask.jacobian.gradient_forms import Form
from skfishermask.jacobian.graph import Graph, Use
from skfishermask.jacobian.mixing import groups_that_mix
from skfishermask.jacobian.operations import Node, operation_of
from skfishermask.jacobian.rules import form_of
from skfishermask.jacobian.sample_layout import (
    SHARED,
    SampleLayout,
    coded_weights,
    find_layout,
    radix,
    sample_of_row,
)

K = TypeVar("K")


@dataclass(frozen=True)
class LocatedUse:
    """A use, the form of its gradient, and which of its rows belong to which sample."""

    use: Use
    form: Form
    layout: SampleLayout


@dataclass(frozen=True)
class LayoutProbe:
    """What a few backward passes with coded weights show of a graph."""

    # For each use; None: rows belong to several samples, or no rule covers the use.
    layouts: Sequence[SampleLayout | None]
    reusable: bool  # whether the layouts hold for all batches with a graph of the same signature
    # At the outputs of the operations, and at the further edges, in the first backward pass.
    gradients: Mapping[Node | str, Tensor]


def probe_layouts(
    outputs: Tensor,
    graph: Graph,
    uses: Sequence[Use],
    constants: Collection[int],
    further: Mapping[Node | str, GradientEdge],
) -> LayoutProbe:
    """Find which rows of each use belong to which sample of the outputs (n, ...).

    `constants` are as for `groups_that_mix`; gradients are returned at `further` edges, too.
    """
    n = len(outputs)
    forms = [form_of(use) for use in uses]
    mixing = groups_that_mix(graph, constants)
    nodes = [use.node for use, form in zip(uses, forms, strict=True) if form is not None]
    nodes += [node for node, _ in mixing or ()]
    edges = output_edges(nodes)
    if not edges:
        return LayoutProbe([None] * len(uses), False, {})
    n_digits = radix({node._input_metadata[0].dtype for node in nodes})
    base = _base_weights(outputs)
    gradients = backward(outputs, {**edges, **further}, base, last=False)
    passes: list[Mapping[Node | str, Tensor]] = [gradients]
    for weights in coded_weights(base, n_digits):
        passes.append(backward(outputs, edges, weights, last=False))

    def at(node: Node) -> list[Tensor]:
        return [gradients_of[node] for gradients_of in passes]

    def layout(use: Use, form: Form | None) -> SampleLayout | None:
        if form is None or use.node not in gradients:
            return None
        return find_layout(form.rows, form.axes, at(use.node), n, n_digits)

    layouts = [layout(use, form) for use, form in zip(uses, forms, strict=True)]
    located, _ = locate_uses(uses, layouts)
    reusable = (
        mixing is not None
        and all(one.layout.reusable for one in located)
        and all(
            bool((sample_of_row([grouped(g) for g in at(node)], n, n_digits) != SHARED).all())
            for node, grouped in mixing
            if node in gradients
        )
    )
    return LayoutProbe(layouts, reusable, gradients)


def _base_weights(outputs: Tensor) -> Tensor:
    """Return random weights of all outputs, the same in every call.

    No weight is small: an operation that gets no gradient here gets none for any other weights.
    """
    generator = torch.Generator().manual_seed(0)
    base = torch.rand(outputs.shape, generator=generator, dtype=torch.float64) + 0.5
    return base.to(outputs.device, outputs.dtype)


def locate_uses(
    uses: Sequence[Use], layouts: Sequence[SampleLayout | None]
) -> tuple[list[LocatedUse], dict[str, str]]:
    """Decide which uses to contract, and which parameters are unsupported, with the reason.

    A use that may be a view is one where its rows belong to no single sample: then the uses of its
    output count.
    """
    located: list[LocatedUse] = []
    unsupported: dict[str, str] = {}
    settled: dict[str, set[Node]] = defaultdict(set)
    for use, layout in zip(uses, layouts, strict=True):
        if any(step.node in settled[use.name] for step in use.views):
            continue
        if 0 in use.node._input_metadata[0].shape:
            settled[use.name].add(use.node)
        elif layout is not None:
            form = form_of(use)
            assert form is not None
            settled[use.name].add(use.node)
            located.append(LocatedUse(use, form, layout))
        elif operation_of(use.node).view is None:
            unsupported.setdefault(use.name, use.operation)
    return [one for one in located if one.use.name not in unsupported], unsupported


def uses_by_name(located: Iterable[LocatedUse]) -> dict[str, list[LocatedUse]]:
    """Return the uses of each parameter."""
    uses: dict[str, list[LocatedUse]] = defaultdict(list)
    for one in located:
        uses[one.use.name].append(one)
    return uses


def output_edges(nodes: Iterable[Node]) -> dict[Node | str, GradientEdge]:
    """Return the edges at the outputs of nodes, for `backward`."""
    return {node: GradientEdge(cast(torch.autograd.graph.Node, node), 0) for node in nodes}


def backward(
    outputs: Tensor, edges: Mapping[K, GradientEdge], weights: Tensor, *, last: bool
) -> dict[K, Tensor]:
    """Compute the gradients of sum(weights * outputs) at those edges that get any.

    The `last` backward pass frees the graph.
    """
    gradients = torch.autograd.grad(
        outputs, [*edges.values()], grad_outputs=weights, retain_graph=not last, allow_unused=True
    )
    return {key: g for key, g in zip(edges, gradients, strict=True) if g is not None}
