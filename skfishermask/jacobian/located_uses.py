"""The uses of parameters in a batch's graph, and whose the rows of each are."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from skfishermask.jacobian.gradient_forms import Form
from skfishermask.jacobian.graph import Graph, Use
from skfishermask.jacobian.mixing import groups_that_mix
from skfishermask.jacobian.operations import Node, operation_of
from skfishermask.jacobian.rules import form_of
from skfishermask.jacobian.sample_layout import (
    SHARED,
    Arrangement,
    arrangement,
    coded_weights,
    owners,
    radix,
)

K = TypeVar("K")


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
    gradients : dict of node to Tensor
        At the outputs of the operations, in one of the backward passes.
    whole : dict of str to Tensor
        Autograd's own gradients of the parameters that were asked for, in the same pass.
    """

    arranged: Sequence[Arrangement | None]
    lasting: bool
    gradients: Mapping[Node, Tensor]
    whole: Mapping[str, Tensor]


def find_rows(
    logits: Tensor,
    graph: Graph,
    uses: Sequence[Use],
    constants: Collection[int],
    parameters: Mapping[str, Tensor],
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
    parameters : dict of str to Tensor
        Whose own gradients are wanted, too.
    """
    n = len(logits)
    generator = torch.Generator().manual_seed(0)
    # No weight is small: what gets no gradient here gets none in any direction.
    base = torch.rand(logits.shape, generator=generator, dtype=torch.float64) + 0.5
    base = base.to(logits.device, logits.dtype)
    forms = [form_of(use) for use in uses]
    mixing = groups_that_mix(graph, constants)
    nodes = [use.node for use, form in zip(uses, forms, strict=True) if form is not None]
    edges = outputs([*nodes, *(node for node, _ in mixing or ())])
    own = {name: get_gradient_edge(p) for name, p in parameters.items()}
    if not edges:
        return Finding([None] * len(uses), False, {}, {})
    n_digits = radix({node._input_metadata[0].dtype for node in edges})
    both = backward(logits, {**edges, **own}, base, last=False)
    first = {node: both[node] for node in edges if node in both}
    passes = [first]
    for weights in coded_weights(base, n_digits):
        passes.append(backward(logits, edges, weights, last=False))

    def at(node: Node) -> list[Tensor]:
        return [gradients[node] for gradients in passes]

    def arranged(use: Use, form: Form | None) -> Arrangement | None:
        if form is None or use.node not in first:
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
            if node in first
        )
    )
    return Finding(found, lasting, first, {name: both[name] for name in parameters if name in both})


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
        elif operation_of(use.node).view is None:
            loose.setdefault(use.name, use.operation)
    return [read for read in reads if read.use.name not in loose], loose


def outputs(nodes: Iterable[Node]) -> dict[Node, GradientEdge]:
    """Name the outputs of nodes, for `backward`."""
    return {node: GradientEdge(cast(torch.autograd.graph.Node, node), 0) for node in nodes}


def backward(
    logits: Tensor, wanted: Mapping[K, GradientEdge], weights: Tensor, *, last: bool
) -> dict[K, Tensor]:
    """Give the gradients of sum(weights * logits) at parameters and outputs that get any."""
    found = torch.autograd.grad(
        logits, [*wanted.values()], grad_outputs=weights, retain_graph=not last, allow_unused=True
    )
    return {key: g for key, g in zip(wanted, found, strict=True) if g is not None}
