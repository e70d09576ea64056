"""The uses of parameters in a batch's graph, and whose the rows of each are."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from skfishermask.fisher.forms import Form
from skfishermask.fisher.graph import Graph, Node, Use, is_spread
from skfishermask.fisher.rules import form_of
from skfishermask.fisher.samples import (
    SHARED,
    Arrangement,
    arrangement,
    coded_weights,
    owners,
    radix,
)
from skfishermask.fisher.shapes import groups_that_mix


@dataclass(frozen=True)
class Read:
    """A use, the form of its gradient, and whose its rows are; in one batch."""

    use: Use
    form: Form
    arranged: Arrangement


@dataclass(frozen=True)
class Finding:
    """What two backward passes or more say of a graph.

    Attributes
    ----------
    arranged : list of Arrangement or None
        For each use; None: its rows are no sample's, or no rule covers it.
    lasting : bool
        Whether that holds for all batches whose graph has the same signature.
    weights : Tensor of shape (n, C)
        Of the logits, in one of the backward passes.
    gradients : dict of node to Tensor
        At the outputs of the operations, with these weights.
    """

    arranged: Sequence[Arrangement | None]
    lasting: bool
    weights: Tensor
    gradients: Mapping[Node, Tensor]


def find_rows(
    logits: Tensor, graph: Graph, uses: Sequence[Use], constants: Collection[int]
) -> Finding:
    """Find whose the rows of each use are.

    Parameters
    ----------
    logits : Tensor of shape (n, C)
        Of several samples.
    graph : Graph
        Theirs.
    uses : sequence of Use
        In it.
    constants : collection of int
        As for `groups_that_mix`.
    """
    n = len(logits)
    generator = torch.Generator().manual_seed(0)
    # No weight is small: what gets no gradient here gets none in any direction.
    base = torch.rand(logits.shape, generator=generator, dtype=torch.float64) + 0.5
    base = base.to(logits.device, logits.dtype)
    forms = [form_of(use) for use in uses]
    mixing = groups_that_mix(graph, constants)
    nodes = [use.node for use, form in zip(uses, forms, strict=True) if form is not None]
    nodes = list(dict.fromkeys([*nodes, *(node for node, _ in mixing or ())]))
    if not nodes:
        return Finding([None] * len(uses), False, base, {})
    n_digits = radix({node._input_metadata[0].dtype for node in nodes})
    passes = [
        backward(logits, nodes, weights, last=False)
        for weights in (base, *coded_weights(base, n_digits))
    ]

    def at(node: Node) -> list[Tensor]:
        return [gradients[node] for gradients in passes]

    def arranged(use: Use, form: Form | None) -> Arrangement | None:
        if form is None or use.node not in passes[0]:
            return None
        return arrangement(form.rows, form.axes, at(use.node), n, n_digits)

    found = [arranged(use, form) for use, form in zip(uses, forms, strict=True)]
    reads, _ = resolved(uses, found)
    lasting = (
        mixing is not None
        and all(read.arranged.lasting for read in reads)
        and all(
            bool((owners([view(g) for g in at(node)], n, n_digits) != SHARED).all())
            for node, view in mixing
            if node in passes[0]
        )
    )
    return Finding(found, lasting, base, passes[0])


def resolved(
    uses: Sequence[Use], found: Sequence[Arrangement | None]
) -> tuple[list[Read], dict[str, str]]:
    """Decide which uses to read, and which parameters are loose, with the reason.

    A use that may be a view is one where its rows are no sample's: then the uses of its output
    count.
    """
    reads: list[Read] = []
    loose: dict[str, str] = {}
    settled: dict[str, set[Node]] = defaultdict(set)
    for use, arranged in zip(uses, found, strict=True):
        if any(step.node in settled[use.name] for step in use.views):
            continue
        if 0 in use.node._input_metadata[0].shape:
            settled[use.name].add(use.node)
        elif arranged is not None:
            form = form_of(use)
            assert form is not None
            settled[use.name].add(use.node)
            reads.append(Read(use, form, arranged))
        elif not is_spread(use.node):
            loose.setdefault(use.name, use.operation)
    return [read for read in reads if read.use.name not in loose], loose


def backward(
    logits: Tensor, nodes: Sequence[Node], weights: Tensor, *, last: bool
) -> dict[Node, Tensor]:
    """Give the gradients of sum(weights * logits) at the outputs of nodes that get any."""
    edges = [GradientEdge(cast(torch.autograd.graph.Node, node), 0) for node in nodes]
    found = torch.autograd.grad(
        logits, edges, grad_outputs=weights, retain_graph=not last, allow_unused=True
    )
    return {node: g for node, g in zip(nodes, found, strict=True) if g is not None}
