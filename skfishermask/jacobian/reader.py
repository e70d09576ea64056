"""R(x) J(x) for batches of samples: a network's Jacobian at chosen entries, times given rows.

One forward pass makes the batch's autograd graph. It names every operation that a parameter
enters; one backward pass for each row of R brings the gradients at the outputs of these operations,
and the rules contract them, sample by sample, with the operations' other operands. A parameter with
a use that no rule covers is *unsupported*: it is read by a forward pass of each sample alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor, nn

from skfishermask.jacobian.batch_jacobian import BatchJacobian
from skfishermask.jacobian.entries import ParameterEntries
from skfishermask.jacobian.graph import Graph, Signature
from skfishermask.jacobian.graph_facts import GraphLayout, facts_of
from skfishermask.jacobian.hidden_gradients import hides_gradients, with_gradients
from skfishermask.jacobian.interrupts import Reversible
from skfishermask.jacobian.isolation import exact_mode, isolated
from skfishermask.jacobian.located_uses import locate_uses, probe_layouts, uses_by_name
from skfishermask.jacobian.module_io import (
    Inputs,
    ToOutputs,
    batch_length,
    call_module,
    check_outputs,
    move,
    slice_batch,
)
from skfishermask.jacobian.restoring import storage_of
from skfishermask.jacobian.rule_check import RuleCheck

# Samples of a batch that show which rows belong to which sample, where shapes alone decide.
_N_PROBED = 4
# Of the largest tensor in a CPU's passes, for each thread: larger ones leave its cache, and the
# system hands them out as new pages each time. The samples that are read together are
_TENSOR_BYTES_PER_THREAD = 1 << 21
# at least this many, and this many before the size of a sample's tensors is known.
_LEAST_TOGETHER, _FIRST_TOGETHER = 16, 64


@dataclass(frozen=True)
class _FewSamples:
    """Some samples of a batch, with their outputs and graph."""

    batch: Inputs
    outputs: Tensor
    graph: Graph


_FirstFew = Callable[[], _FewSamples | None]


class JacobianReader:
    """Reads R(x) J(x) of one network, batch by batch.

    In evaluation mode the network's output for a sample must not depend on the other samples of the
    batch. For `indices` see `ParameterEntries`; `to_outputs` maps what the module returns to
    outputs (n, ...), by default as `first_output` does. Raises TypeError if a parameter or buffer
    is a subclass of Tensor that stands for other tensors. At most `most_together` samples of a
    batch are best read together; None: all.
    """

    def __init__(
        self,
        module: nn.Module,
        indices: Mapping[str, Tensor] | None = None,
        to_outputs: ToOutputs | None = None,
    ) -> None:
        self.module = module
        self.to_outputs = to_outputs
        self.entries = ParameterEntries(module, indices)
        self._constants = _storages(module)
        facts = facts_of(module)
        self._facts = facts.of(frozenset(self.entries.parameters))
        self._warned: set[str] = set()
        self._rules = RuleCheck(self.entries, self._warn, facts)
        on_cpu = self.entries.device.type == "cpu"
        self.most_together: int | None = _FIRST_TOGETHER if on_cpu else None

    def open(self) -> Reversible:
        """Isolate the network: evaluation mode inside, no side effects afterwards."""
        return isolated(self.module, self.entries.parameters.values())

    def outputs(self, batch: Inputs, first_row: int = 0) -> Tensor:
        """Run a forward pass; return checked outputs, with their graph."""
        outputs = call_module(self.module, batch, self.to_outputs)
        check_outputs(outputs, batch_length(batch), first_row)
        return outputs

    def forward(self, batch: Inputs, first_row: int = 0) -> BatchJacobian:
        """Run a forward pass, and find the uses of parameters in its graph.

        Raises ValueError if the outputs have another length, are not finite, or of a sample depend
        on the other samples of the batch. Messages count samples from `first_row`.
        """
        with exact_mode(self.entries.device):
            batch = move(batch, self.module)
            outputs = self.outputs(batch, first_row)
            graph = Graph(outputs, self.entries.parameters)
            if self.most_together is not None:
                self.most_together = _most_together(graph.bytes_of_sample())
            signature = self._facts.first_alike(graph.signature())
            if len(outputs) > 1 and signature not in self._facts.unmixed:
                self._check_unmixed(batch, outputs)
                self._facts.unmixed.add(signature)
            # Once at most, and only where something is to be found out.
            first_few = cache(partial(self._first_few, batch, graph))
            if self._has_hidden_gradients(graph, batch, first_few):
                return self._by_backward(batch, outputs)
            if len(outputs) == 1 or not outputs.requires_grad:
                return BatchJacobian(self.entries, self.outputs, self._rules, batch, outputs)
            known = self._known(graph, signature, outputs, first_few)
            located, unsupported = locate_uses([*graph.uses()], known.of(len(outputs)))
        unsupported |= self._rules.wrong
        self._warn(unsupported)
        uses = uses_by_name(one for one in located if one.use.name not in unsupported)
        return BatchJacobian(
            self.entries,
            self.outputs,
            self._rules,
            batch,
            outputs,
            uses,
            [*unsupported],
            known.unverified,
        )

    def _has_hidden_gradients(self, graph: Graph, batch: Inputs, first_few: _FirstFew) -> bool:
        """Return whether parameters get gradients that a graph does not show."""

        def run() -> Tensor:
            few = first_few()
            return self._outputs_with_gradients(batch if few is None else few.batch)

        known = self._facts.hides_gradients
        if graph.structure not in known:
            known[graph.structure] = hides_gradients(graph, self.entries.parameters, run)
        return known[graph.structure]

    def _first_few(self, batch: Inputs, graph: Graph) -> _FewSamples | None:
        """Run the first samples alone; None: their graph has other operations than the batch's."""
        if batch_length(batch) <= _N_PROBED:
            return None
        few = slice_batch(batch, slice(0, _N_PROBED))
        outputs = self.outputs(few)
        graph_of_few = Graph(outputs, self.entries.parameters)
        return (
            _FewSamples(few, outputs, graph_of_few)
            if graph_of_few.structure == graph.structure
            else None
        )

    def _outputs_with_gradients(self, batch: Inputs) -> Tensor:
        return self.outputs(with_gradients(batch))

    def _by_backward(self, batch: Inputs, outputs: Tensor) -> BatchJacobian:
        names = [*self.entries.parameters]
        self._warn(dict.fromkeys(names, "gradients are made inside a backward pass"))
        run = self._outputs_with_gradients
        return BatchJacobian(
            self.entries, run, self._rules, batch, outputs, unsupported=names, hides_gradients=True
        )

    def _known(
        self, graph: Graph, signature: Signature, outputs: Tensor, first_few: _FirstFew
    ) -> GraphLayout:
        """Return what is known of the batch's graph, or find it out, on a few samples if it can."""
        known = self._facts.layouts.get(signature)
        if known is not None and known.reusable:
            return known
        few = first_few() if known is None else None
        if few is not None and few.graph.signature().is_alike(graph.signature()):
            known = self._probe(few.graph, few.outputs)
        if known is None or not known.reusable:
            known = self._probe(graph, outputs)
        self._facts.add(signature, known)
        return known

    @torch.no_grad()
    def _probe(self, graph: Graph, outputs: Tensor) -> GraphLayout:
        """Find the layouts of a batch's graph, and check the rules."""
        uses = [*graph.uses()]
        unverified = self._rules.unverified(uses)
        edges = self._rules.edges(unverified)
        probe = probe_layouts(outputs, graph, uses, self._constants, edges)
        located, _ = locate_uses(uses, probe.layouts)
        verified = self._rules.check(uses_by_name(located), probe.gradients)
        layouts = [(use.name, layout) for use, layout in zip(uses, probe.layouts, strict=True)]
        return GraphLayout(layouts, probe.reusable, unverified - verified)

    def _check_unmixed(self, batch: Inputs, outputs: Tensor) -> None:
        """Raise ValueError if the first or the last sample's outputs depend on the others."""
        hint = (
            "In evaluation mode the network's output for a sample must not depend on the other "
            "samples of its batch (a BatchNorm with track_running_stats=False does that)"
        )
        n = len(outputs)
        own = [p for p in self.module.parameters() if p.is_floating_point()]
        tolerance = _largest_eps([outputs, *own]) ** 0.5 * outputs.detach().abs().max()
        gap = torch.zeros_like(tolerance)
        for s in (0, n - 1):
            try:
                alone = self.outputs(slice_batch(batch, slice(s, s + 1)))
            except ValueError as error:
                raise ValueError(f"{hint}; for one sample alone: {error}") from error
            gap = torch.maximum(gap, (alone - outputs[s]).detach().abs().max())
        if gap <= tolerance:
            return
        again = self.outputs(batch)
        if (again - outputs).abs().max() > tolerance:
            raise ValueError(
                "The network's output differs between two evaluations of the same batch, also in "
                "evaluation mode; expected one that does not draw random numbers there."
            )
        raise ValueError(f"{hint}; the output for one sample alone differs by {float(gap):.3g}.")

    def _warn(self, unsupported: Mapping[str, str]) -> None:
        """Warn of parameters that are read sample by sample, once for each."""
        new = {name: reason for name, reason in unsupported.items() if name not in self._warned}
        if not new:
            return
        self._warned |= new.keys()
        named = ", ".join(f"{name} ({reason})" for name, reason in new.items())
        warnings.warn(
            f"Reading sample by sample, which is slow: {named}. There is no rule for an operation "
            "that these parameters enter, so each sample needs a forward pass of its own. A mask "
            "without them is read fast.",
            UserWarning,
            stacklevel=2,
        )


def _most_together(bytes_of_sample: float) -> int:
    """Return how many samples with largest tensors of this size are read together on a CPU."""
    n_bytes = _TENSOR_BYTES_PER_THREAD * max(2, torch.get_num_threads())
    return max(_LEAST_TOGETHER, int(n_bytes // max(bytes_of_sample, 1)))


def _storages(module: nn.Module) -> set[int]:
    """Return the addresses of all parameters and buffers."""
    storages = set()
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        storage = storage_of(tensor)
        if storage is None:
            raise TypeError(
                f"Expected parameters and buffers with memory of their own, found {name}, a "
                f"{type(tensor).__name__} on {tensor.device}. Quantised or sharded weights must be "
                "made plain tensors first (as by dequantize() or full_tensor()) in a copy of the "
                "network."
            )
        storages.add(storage)
    return storages


def _largest_eps(tensors: Sequence[Tensor]) -> float:
    """Return the largest rounding of the tensors' types."""
    return max(torch.finfo(t.dtype).eps for t in tensors)
