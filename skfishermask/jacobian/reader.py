"""Rows R(x) J(x) of a network for one batch, at chosen parameter entries.

One forward pass makes the batch's autograd graph. It names every operation that a wanted parameter
enters; one backward pass a direction brings the gradients at the outputs of these operations, and
the rules contract them, sample by sample, with the operations' other operands. A parameter with a
use that no rule covers is *loose*: it is read by a forward pass of each sample alone.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from skfishermask.jacobian.batch_jacobian import Reading
from skfishermask.jacobian.entries import Wanted
from skfishermask.jacobian.graph import Graph, Use
from skfishermask.jacobian.isolation import exact_mode, visit
from skfishermask.jacobian.located_uses import Finding, Read, find_rows, resolved
from skfishermask.jacobian.module_io import (
    Inputs,
    ToLogits,
    batch_length,
    check_outputs,
    logits_of,
    move,
    rows_of,
)
from skfishermask.jacobian.per_sample import Budget, spread
from skfishermask.jacobian.rules import form_of
from skfishermask.jacobian.sample_layout import Arrangement

# Entries of each parameter at which the books are balanced.
_BALANCED = 64
# ... up to so many roundings of the sum of absolute values.
_ROUNDINGS = 256


@dataclass(frozen=True)
class _Known:
    """What is known of all graphs with a signature.

    Attributes
    ----------
    arranged : list of Arrangement or None
        For each use.
    unbalanced : set of str
        Parameters whose rules do not give autograd's own gradient.
    """

    arranged: Sequence[Arrangement | None]
    unbalanced: frozenset[str]


class JacobianReader:
    """Reads R(x) J(x) of one network, batch by batch.

    Parameters
    ----------
    module : nn.Module
        The network. In evaluation mode its output for a sample must not depend on the other
        samples of the batch.
    entries : dict of str to Tensor, optional
        Parameter name -> flat indices of the wanted entries, int64, on the CPU. None: all.
    to_logits : callable, optional
        Maps the module's output to logits (n, C). Default: it is logits, a tuple whose first
        element is, or has them as ``.logits``.

    Raises
    ------
    ValueError
        If the parameters differ in dtype or device, or `entries` names an unknown one.
    """

    def __init__(
        self,
        module: nn.Module,
        entries: Mapping[str, Tensor] | None = None,
        to_logits: ToLogits | None = None,
    ) -> None:
        self.module = module
        self.to_logits = to_logits
        self.wanted = Wanted(module, entries)
        tensors = [*module.parameters(), *module.buffers()]
        self._constants = {t.untyped_storage().data_ptr() for t in tensors}
        self._graphs: dict[Hashable, _Known] = {}
        self._checked: set[Hashable] = set()
        self._balanced: set[Hashable] = set()
        self._told: set[str] = set()

    @contextmanager
    def open(self) -> Iterator[JacobianReader]:
        """Visit the network: evaluation mode, and no trace afterwards."""
        with visit(self.module, self.wanted.parameters.values()):
            yield self

    def logits(self, batch: Inputs, first_row: int = 0) -> Tensor:
        """Run a forward pass; give checked logits, with their graph."""
        logits = logits_of(self.module, batch, self.to_logits)
        check_outputs(logits, batch_length(batch), first_row)
        return logits

    def forward(self, batch: Inputs, first_row: int = 0) -> Reading:
        """Run a forward pass, and find out how its graph is to be read.

        Parameters
        ----------
        batch : tensor, list of tensors or dict of tensors
            Samples first.
        first_row : int
            The number of the batch's first sample, for messages.

        Returns
        -------
        Reading
            Of this batch.

        Raises
        ------
        ValueError
            If the logits have another shape, are not finite, or of a sample depend on the
            other samples of the batch.
        """
        with exact_mode(self.wanted.device):
            batch = move(batch, self.module)
            logits = self.logits(batch, first_row)
            if len(logits) == 1 or not logits.requires_grad:
                return Reading(self.wanted, self.logits, batch, logits, {}, [])
            with torch.no_grad():
                reads, loose = self._uses(batch, logits)
        self._tell(loose)
        by_name: dict[str, list[Read]] = defaultdict(list)
        for read in reads:
            by_name[read.use.name].append(read)
        return Reading(self.wanted, self.logits, batch, logits, by_name, [*loose])

    def _uses(self, batch: Inputs, logits: Tensor) -> tuple[list[Read], dict[str, str]]:
        """Find the uses of the wanted parameters; name those that are loose, and why."""
        graph = Graph(logits, self.wanted.parameters)
        uses = [*graph.uses()]
        key = graph.signature()
        if key not in self._checked:
            self._check_alone(batch, logits)
            self._checked.add(key)
        known = self._graphs.get(key)
        if known is None:
            finding = find_rows(logits, graph, uses, self._constants, self._new(uses))
            reads, _ = resolved(uses, finding.arranged)
            known = _Known(finding.arranged, self._unbalanced(reads, finding))
            if finding.lasting:
                self._graphs[key] = known
        reads, loose = resolved(uses, known.arranged)
        for name in known.unbalanced:
            loose[name] = "its rule does not give autograd's gradient"
        return [read for read in reads if read.use.name not in loose], loose

    def _check_alone(self, batch: Inputs, logits: Tensor) -> None:
        """Raise ValueError if the first or the last sample's logits depend on the others."""
        hint = (
            "In evaluation mode the network's output for a sample must not depend on the other "
            "samples of its batch (a BatchNorm with track_running_stats=False does that)"
        )
        n = len(logits)
        tolerance = _coarsest([logits]) ** 0.5 * logits.abs().max()
        gap = torch.zeros_like(tolerance)
        for s in (0, n - 1):
            try:
                alone = self.logits(rows_of(batch, slice(s, s + 1)))
            except ValueError as error:
                raise ValueError(f"{hint}; alone it gave: {error}") from error
            gap = torch.maximum(gap, (alone - logits[s]).abs().max())
        if gap <= tolerance:
            return
        again = self.logits(batch)
        if (again - logits).abs().max() > tolerance:
            raise ValueError(
                "The network's output is another at each evaluation of the same batch, also in "
                "evaluation mode; expected one that does not draw random numbers there."
            )
        raise ValueError(f"{hint}; alone, its logits differ by {float(gap):.3g}.")

    def _new(self, uses: Sequence[Use]) -> dict[str, Tensor]:
        """Give the parameters with a kind of use whose books have not been balanced yet."""
        names = {
            use.name for use in uses if use.kind not in self._balanced and form_of(use) is not None
        }
        return {name: p for name, p in self.wanted.parameters.items() if name in names}

    def _unbalanced(self, reads: Sequence[Read], finding: Finding) -> frozenset[str]:
        """Name parameters for which the rules, summed over samples, do not give what autograd does.

        That is looked at once for each kind of use.
        """
        bad = set()
        for name, whole in finding.whole.items():
            some = [read for read in reads if read.use.name == name]
            if not some:
                continue
            whole = (whole.to_dense() if whole.is_sparse else whole).flatten()
            index = self.wanted.some(name, _BALANCED)
            values, sizes = self._sums(some, index, finding)
            eps = _coarsest([*(finding.gradients[read.use.node] for read in some), whole])
            gap = values - whole[index.to(whole.device)]
            if bool((gap.abs() > _ROUNDINGS * eps * sizes).any()):
                bad.add(name)
            else:
                self._balanced |= {read.use.kind for read in some}
        return frozenset(bad)

    def _sums(
        self, reads: Sequence[Read], index: Tensor, finding: Finding
    ) -> tuple[Tensor, Tensor]:
        """Contract a parameter at some entries, summed over samples; also in absolute values."""
        sums = []
        for absolute in (False, True):
            total = torch.zeros(len(index), dtype=self.wanted.work, device=self.wanted.device)
            for part, nodes in self.wanted.parts(reads, index, Budget(0), sampled=True):
                values = part.reader(absolute=absolute)([finding.gradients[node] for node in nodes])
                total += spread(part, values, len(index)).sum(0)
            sums.append(total)
        return sums[0], sums[1]

    def _tell(self, loose: Mapping[str, str]) -> None:
        new = {name: reason for name, reason in loose.items() if name not in self._told}
        if not new:
            return
        self._told |= new.keys()
        named = ", ".join(f"{name} ({reason})" for name, reason in new.items())
        warnings.warn(
            f"Reading sample by sample, which is slow: {named}. There is no rule for what these "
            "parameters go through, so each sample needs a forward pass of its own. A mask that "
            "leaves them out is read fast.",
            UserWarning,
            stacklevel=2,
        )


def _coarsest(tensors: Sequence[Tensor]) -> float:
    """Give the largest rounding of their types."""
    return max(torch.finfo(t.dtype).eps for t in tensors)
