"""What readers have found out about a network's graphs, and what of it serves further readers.

The readers of one query share all of it. For the network's next query the layouts are kept that its
graph's operations and shapes alone decide, with the parameters of which the rules are still to be
checked: they follow from the signature, also where parameters, buffers or the forward pass have
changed since. Whether samples mix, or gradients are hidden, is found out again in each query: it
might change without another signature.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

from torch import nn

from skfishermask.jacobian.graph import Signature, Structure, restrict
from skfishermask.jacobian.sample_layout import SampleLayout

# Signatures with layouts that are kept for a network's next query: sequences of each length have
# their own.
_MOST_KEPT = 32


@dataclass(frozen=True)
class GraphLayout:
    """What is known of all graphs with a signature, but for the number of samples."""

    # For each use the parameter's name, and which rows belong to which sample.
    layouts: Sequence[tuple[str, SampleLayout | None]]
    reusable: bool  # whether they hold for all batches with such a graph
    unverified: set[str]  # parameters with rules that are still to be checked

    def of(self, n: int) -> list[SampleLayout | None]:
        """Return the layouts in a batch of n samples."""
        return [layout and replace(layout, n=n) for _, layout in self.layouts]

    def restricted(self, names: Collection[str]) -> GraphLayout:
        """Return the same where some of the parameters alone take part."""
        layouts = [one for one in self.layouts if one[0] in names]
        if len(layouts) == len(self.layouts):
            return self
        return GraphLayout(layouts, self.reusable, self.unverified.intersection(names))


class GraphFacts:
    """What is known of the graphs in which the same parameters take part."""

    def __init__(self, kept: dict[Signature, GraphLayout]) -> None:
        self.layouts: dict[Signature, GraphLayout] = {}
        # Graphs of batches in which no sample's outputs depend on others.
        self.unmixed: set[Signature] = set()
        # Not for each shape: batches of other sizes call the same functions.
        self.hides_gradients: dict[Structure, bool] = {}
        self._first_alike: dict[Signature, Signature] = {}
        self._kept = kept  # for the network's next query

    def first_alike(self, signature: Signature) -> Signature:
        """Return the first signature that is alike."""
        if signature not in self._first_alike:
            known = dict.fromkeys([*self.layouts, *self.unmixed, *self._first_alike.values()])
            alike = (one for one in known if signature.is_alike(one))
            self._first_alike[signature] = next(alike, signature)
        return self._first_alike[signature]

    def add(self, signature: Signature, layout: GraphLayout) -> None:
        """Add a layout that was found."""
        self.layouts[signature] = layout
        if layout.reusable and len(self._kept) < _MOST_KEPT:
            self._kept[signature] = layout

    def restricted(self, names: frozenset[str]) -> GraphFacts:
        """Return what holds where some of the parameters alone take part."""
        facts = GraphFacts(self._kept)
        facts.add_restricted(self.layouts, names)
        facts.unmixed = {signature.restricted(names) for signature in self.unmixed}
        # Where gradients are hidden, they may be those of the other parameters.
        facts.hides_gradients = {
            restrict(structure, names)[0]: False
            for structure, hides in self.hides_gradients.items()
            if not hides
        }
        return facts

    def add_restricted(
        self, layouts: Mapping[Signature, GraphLayout], names: frozenset[str]
    ) -> None:
        """Add what holds for all batches, where some of the parameters alone take part."""
        for signature, layout in layouts.items():
            if layout.reusable and names <= signature.parameters:
                self.layouts[signature.restricted(names)] = layout.restricted(names)


class NetworkFacts:
    """What is known of one network's graphs.

    The parameters with a `wrong` rule are collected by name, with the reason; `verified` are the
    kinds of uses with a right one.
    """

    def __init__(self, kept: dict[Signature, GraphLayout]) -> None:
        self.wrong: dict[str, str] = {}
        self.verified: set[Hashable] = set()
        self._kept = kept
        self._of_parameters: dict[frozenset[str], GraphFacts] = {}

    def of(self, names: frozenset[str]) -> GraphFacts:
        """Return what is known of the graphs in which these parameters take part."""
        if names not in self._of_parameters:
            wider = [one for known, one in self._of_parameters.items() if names < known]
            facts = wider[0].restricted(names) if wider else GraphFacts(self._kept)
            # A copy: a query in another thread may keep more meanwhile.
            facts.add_restricted(self._kept.copy(), names)
            self._of_parameters[names] = facts
        return self._of_parameters[names]


# What is kept for a network's next query; and what is known to the readers of one query.
_kept: WeakKeyDictionary[nn.Module, dict[Signature, GraphLayout]] = WeakKeyDictionary()
_shared: WeakKeyDictionary[nn.Module, NetworkFacts] = WeakKeyDictionary()


def share_facts(module: nn.Module, network: nn.Module) -> None:
    """Share what readers of a module find out, which is made anew for each query of a network."""
    _shared[module] = NetworkFacts(_kept.setdefault(network, {}))


def facts_of(module: nn.Module) -> NetworkFacts:
    """Return what is known of a module's graphs: nothing, unless its readers share it."""
    return _shared.get(module) or NetworkFacts({})
