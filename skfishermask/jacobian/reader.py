"""R(x) J(x) for batches of samples: a network's Jacobian at chosen entries, times given rows.

One forward pass makes the batch's autograd graph. It names every operation that a parameter
enters; one backward pass for each row of R brings the gradients at the outputs of these operations,
and the rules contract them, sample by sample, with the operations' other operands. A parameter with
a use that no rule covers is *unsupported*: it is read by a forward pass of each sample alone.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from skfishermask.jacobian.batch_jacobian import BatchJacobian
from skfishermask.jacobian.entries import ParameterEntries
from skfishermask.jacobian.graph import Graph, Signature, Use
from skfishermask.jacobian.hidden_gradients import hides_gradients, with_gradients
from skfishermask.jacobian.interrupts import Reversible
from skfishermask.jacobian.isolation import exact_mode, isolated
from skfishermask.jacobian.located_uses import LayoutProbe, LocatedUse, locate_uses, probe_layouts
from skfishermask.jacobian.module_io import (
    Inputs,
    ToOutputs,
    batch_length,
    call_module,
    check_outputs,
    move,
    slice_batch,
)
from skfishermask.jacobian.per_sample import TensorCache, scatter_to_entries
from skfishermask.jacobian.restoring import storage_of
from skfishermask.jacobian.rules import form_of
from skfishermask.jacobian.sample_layout import SampleLayout

# Samples of a batch that show which rows belong to which sample, where shapes alone decide.
_N_PROBED = 4
# Entries of each parameter at which the rules are checked against autograd's gradient.
_CHECKED_ENTRIES = 64
# Largest difference from autograd's gradient, in roundings of the sum of absolute values.
_MAX_ROUNDINGS = 256


@dataclass(frozen=True)
class _GraphLayout:
    """What is known of all graphs with a signature, but for the number of samples.

    Attributes
    ----------
    layouts : list of SampleLayout or None
        For each use.
    wrong : set of str
        Parameters for which the rules do not give autograd's gradient.
    reusable : bool
        Whether the layouts hold for all batches with such a graph.
    """

    layouts: Sequence[SampleLayout | None]
    wrong: frozenset[str]
    reusable: bool

    def of(self, n: int) -> Sequence[SampleLayout | None]:
        """Return the layouts in a batch of n samples."""
        return [layout and replace(layout, n=n) for layout in self.layouts]


@dataclass(frozen=True)
class _FewSamples:
    """Some samples of a batch, with their outputs and graph."""

    batch: Inputs
    outputs: Tensor
    graph: Graph


class JacobianReader:
    """Reads R(x) J(x) of one network, batch by batch.

    Parameters
    ----------
    module : nn.Module
        The network. In evaluation mode its output for a sample must not depend on the other
        samples of the batch.
    indices : dict of str to Tensor, optional
        Parameter name -> flat indices of the entries to read, int64, on the CPU. None: all of the
        trainable parameters.
    to_outputs : callable, optional
        Maps what the module returns to outputs (n, ...). Default: it is the outputs, a tuple that
        begins with them, or an object that has them as ``.logits``.

    Raises
    ------
    ValueError
        If the parameters differ in device, `indices` names an unknown one, or one that is not real.
    TypeError
        If a parameter or buffer is a subclass of Tensor that stands for other tensors.
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
        # The first signature that is alike; what is known of all that are.
        self._first_alike: dict[Signature, Signature] = {}
        self._graph_layouts: dict[Signature, _GraphLayout] = {}
        self._unmixed: set[Signature] = set()
        # By a graph's operations, and by the kind of a use.
        self._hides_gradients: dict[Hashable, bool] = {}
        self._verified: set[Hashable] = set()
        self._warned: set[str] = set()

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
            signature = self._signature(graph)
            if len(outputs) > 1 and signature not in self._unmixed:
                self._check_unmixed(batch, outputs)
                self._unmixed.add(signature)
            if self._has_hidden_gradients(graph, batch):
                return self._by_backward(batch, outputs)
            if len(outputs) == 1 or not outputs.requires_grad:
                return BatchJacobian(self.entries, self.outputs, batch, outputs, {}, [])
            located, unsupported = self._locate(graph, signature, batch, outputs)
        self._warn(unsupported)
        uses: dict[str, list[LocatedUse]] = defaultdict(list)
        for one in located:
            uses[one.use.name].append(one)
        return BatchJacobian(self.entries, self.outputs, batch, outputs, uses, [*unsupported])

    def _signature(self, graph: Graph) -> Signature:
        """Return a graph's signature, or the first that is alike."""
        signature = graph.signature()
        if signature not in self._first_alike:
            known = dict.fromkeys(self._first_alike.values())
            alike = (one for one in known if signature.is_alike(one))
            self._first_alike[signature] = next(alike, signature)
        return self._first_alike[signature]

    def _has_hidden_gradients(self, graph: Graph, batch: Inputs) -> bool:
        """Return whether parameters get gradients that a graph does not show; once for a kind."""

        def run() -> Tensor:
            few = self._first_few(batch, graph)
            return self._outputs_with_gradients(batch if few is None else few.batch)

        # Not for each shape: batches of other sizes call the same functions.
        kind = graph.structure, frozenset(graph.leaves)
        if kind not in self._hides_gradients:
            hides = hides_gradients(graph, self.entries.parameters, run)
            self._hides_gradients[kind] = hides
        return self._hides_gradients[kind]

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
        return BatchJacobian(self.entries, run, batch, outputs, {}, names, hides_gradients=True)

    def _locate(
        self, graph: Graph, signature: Signature, batch: Inputs, outputs: Tensor
    ) -> tuple[list[LocatedUse], dict[str, str]]:
        """Locate the uses of parameters; name the unsupported ones, with the reason."""
        known = self._graph_layouts.get(signature)
        few = self._first_few(batch, graph) if known is None else None
        if few is not None and few.graph.signature().is_alike(graph.signature()):
            known = self._probe(few.graph, few.outputs)
        if known is None or not known.reusable:
            known = self._probe(graph, outputs)
        self._graph_layouts[signature] = known
        located, unsupported = locate_uses([*graph.uses()], known.of(len(outputs)))
        for name in known.wrong:
            unsupported[name] = "its rule does not give autograd's gradient"
        return [one for one in located if one.use.name not in unsupported], unsupported

    @torch.no_grad()
    def _probe(self, graph: Graph, outputs: Tensor) -> _GraphLayout:
        """Find the layouts of a batch's graph, and check the rules."""
        uses = [*graph.uses()]
        unverified = self._unverified_parameters(uses)
        probe = probe_layouts(outputs, graph, uses, self._constants, unverified)
        located, _ = locate_uses(uses, probe.layouts)
        wrong = self._wrong_parameters(located, probe)
        return _GraphLayout(probe.layouts, wrong, probe.reusable)

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

    def _unverified_parameters(self, uses: Sequence[Use]) -> dict[str, Tensor]:
        """Return the parameters with a kind of use that has not been verified yet."""
        names = {
            use.name for use in uses if use.kind not in self._verified and form_of(use) is not None
        }
        return {name: p for name, p in self.entries.parameters.items() if name in names}

    def _wrong_parameters(
        self, located: Sequence[LocatedUse], probe: LayoutProbe
    ) -> frozenset[str]:
        """Check the rules, summed over samples, against autograd's gradient of each parameter.

        Returns the names of those that differ. Each kind of use is checked once.
        """
        wrong = set()
        for name, gradient in probe.parameter_gradients.items():
            uses = [one for one in located if one.use.name == name]
            if not uses:
                continue
            gradient = (gradient.to_dense() if gradient.is_sparse else gradient).flatten()
            index = self.entries.sample(name, _CHECKED_ENTRIES)
            sums, absolute_sums = (
                self._sums_over_samples(uses, index, probe, absolute=absolute)
                for absolute in (False, True)
            )
            eps = _largest_eps([*(probe.gradients[one.use.node] for one in uses), gradient])
            gap = sums - gradient[index.to(gradient.device)]
            if bool((gap.abs() > _MAX_ROUNDINGS * eps * absolute_sums).any()):
                wrong.add(name)
            elif bool(gap.isfinite().all()):
                self._verified |= {one.use.kind for one in uses}
        return frozenset(wrong)

    def _sums_over_samples(
        self, uses: Sequence[LocatedUse], index: Tensor, probe: LayoutProbe, *, absolute: bool
    ) -> Tensor:
        """Contract a parameter's uses at some entries, summed over samples."""
        entries = self.entries
        total = torch.zeros(len(index), dtype=entries.sum_dtype, device=entries.device)
        for group, nodes in entries.use_groups(uses, index, TensorCache(0), sampled=True):
            contract = group.contraction(absolute=absolute)
            values = contract([probe.gradients[node] for node in nodes])
            total += scatter_to_entries(group, values, len(index)).sum(0)
        return total

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
