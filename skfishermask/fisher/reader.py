"""Rows R(x) J(x) of a network for one batch, at chosen parameter entries.

One forward pass makes the batch's autograd graph. It names every operation that a wanted parameter
enters; one backward pass a direction brings the gradients at the outputs of these operations, and
the rules contract them, sample by sample, with the operations' other operands. A parameter with a
use that no rule covers is *loose*: it is read by a forward pass of each sample alone.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from skfishermask.fisher.graph import Graph, Node, Places, Use, is_spread
from skfishermask.fisher.network import (
    Batch,
    ToLogits,
    batch_length,
    check_logits,
    logits_of,
    move,
    rows_of,
)
from skfishermask.fisher.parts import Budget, Part, spread, squares_of_parameter
from skfishermask.fisher.rules import Form, Outer, form_of
from skfishermask.fisher.samples import (
    SHARED,
    Arrangement,
    arrangement,
    coded_weights,
    owners,
    radix,
)
from skfishermask.fisher.shapes import groups_that_mix
from skfishermask.fisher.sums import Pairs
from skfishermask.fisher.visit import exact_mode, visit

# What is held of other operands through the backward passes of a batch.
HELD_BYTES = 1 << 29
# Entries of each parameter at which the books are balanced.
_BALANCED = 64
# ... up to so many roundings of the sum of absolute values.
_ROUNDINGS = 256
# Gradients of whole parameters are asked for together up to so many numbers.
_TOGETHER = 1 << 23


@dataclass(frozen=True)
class _Read:
    """A use, the form of its gradient, and whose its rows are; in one batch."""

    use: Use
    form: Form
    arranged: Arrangement


_Located = tuple[Tensor | None, Tensor | None, Pairs | None]


@dataclass(frozen=True)
class _Found:
    """What is known of the graph of a batch.

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
        self.parameters = dict(module.named_parameters())
        unknown = [name for name in entries or () if name not in self.parameters]
        if unknown:
            raise ValueError(f"The module has no parameter {unknown[0]!r}.")
        self.device, self.dtype = _one_kind(self.parameters)
        # Sums of 16-bit numbers are made in 32 bits.
        self.work = torch.promote_types(self.dtype, torch.float32)
        self.entries: dict[str, Tensor | None] = (
            dict.fromkeys(self.parameters) if entries is None else dict(entries)
        )
        self.entries_here = {
            name: None if index is None else index.to(self.device)
            for name, index in self.entries.items()
        }
        self._wanted = {name: self.parameters[name] for name in self.entries}
        tensors = [*self.parameters.values(), *module.buffers()]
        self._constants = {t.untyped_storage().data_ptr() for t in tensors}
        self._graphs: dict[Hashable, _Found] = {}
        self._checked: set[Hashable] = set()
        self._balanced: set[Hashable] = set()
        self._located: dict[Hashable, _Located] = {}
        self._told: set[str] = set()

    @contextmanager
    def open(self) -> Iterator[JacobianReader]:
        """Visit the network: evaluation mode, and no trace afterwards."""
        with visit(self.module, self._wanted.values()):
            yield self

    def logits(self, batch: Batch, first_row: int = 0) -> Tensor:
        """Run a forward pass; give checked logits, with their graph."""
        logits = logits_of(self.module, batch, self.to_logits)
        check_logits(logits, batch_length(batch), first_row)
        return logits

    def forward(self, batch: Batch, first_row: int = 0) -> Reading:
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
        with exact_mode(self.device):
            batch = move(batch, self.module)
            logits = self.logits(batch, first_row)
            if len(logits) == 1 or not logits.requires_grad:
                return Reading(self, batch, logits, {}, [])
            with torch.no_grad():
                reads, loose = self._uses(batch, logits)
        self._tell(loose)
        by_name: dict[str, list[_Read]] = defaultdict(list)
        for read in reads:
            by_name[read.use.name].append(read)
        return Reading(self, batch, logits, by_name, [*loose])

    def _uses(self, batch: Batch, logits: Tensor) -> tuple[list[_Read], dict[str, str]]:
        """Find the uses of the wanted parameters; name those that are loose, and why."""
        graph = Graph(logits, self._wanted)
        uses = [*graph.uses()]
        key = graph.signature()
        if key not in self._checked:
            self._check_alone(batch, logits)
            self._checked.add(key)
        found = self._graphs.get(key)
        if found is None:
            found, lasting = self._find(logits, graph, uses)
            if lasting:
                self._graphs[key] = found
        return _resolved(uses, found)

    def _find(self, logits: Tensor, graph: Graph, uses: Sequence[Use]) -> tuple[_Found, bool]:
        """Find whose the rows of each use are, and whether that holds for all such graphs."""
        n = len(logits)
        generator = torch.Generator().manual_seed(0)
        base = torch.rand(logits.shape, generator=generator, dtype=torch.float64) + 0.5
        base = base.to(logits.device, logits.dtype)
        forms = [form_of(use) for use in uses]
        mixing = groups_that_mix(graph, self._constants)
        nodes = [use.node for use, form in zip(uses, forms, strict=True) if form is not None]
        nodes = list(dict.fromkeys([*nodes, *(node for node, _ in mixing or ())]))
        if not nodes:
            return _Found([None] * len(uses), frozenset()), False
        n_digits = radix({node._input_metadata[0].dtype for node in nodes})
        passes = [
            dict(zip(nodes, _backward(logits, nodes, weights, last=False), strict=True))
            for weights in (base, *coded_weights(base, n_digits))
        ]

        def at(node: Node) -> list[Tensor]:
            return [gradients[node] for gradients in passes]

        arranged = []
        for use, form in zip(uses, forms, strict=True):
            one = None
            if form is not None and passes[0][use.node] is not None:
                one = arrangement(form.rows, form.axes, at(use.node), n, n_digits)
            arranged.append(one)
        lasting = mixing is not None and all(
            bool((owners([view(g) for g in at(node)], n, n_digits) != SHARED).all())
            for node, view in mixing
        )
        found = _Found(arranged, frozenset())
        reads, _ = _resolved(uses, found)
        lasting = lasting and all(read.arranged.lasting for read in reads)
        unbalanced = self._unbalanced(logits, base, reads, passes[0])
        return _Found(arranged, unbalanced), lasting

    def _check_alone(self, batch: Batch, logits: Tensor) -> None:
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

    def _unbalanced(
        self,
        logits: Tensor,
        base: Tensor,
        reads: Sequence[_Read],
        gradients: Mapping[Node, Tensor],
    ) -> frozenset[str]:
        """Name parameters for which the rules, summed over samples, do not give what autograd does.

        That is looked at once for each kind of use.
        """
        kinds = defaultdict(set)
        for read in reads:
            kinds[read.use.name].add(read.use.kind)
        names = [name for name, kind in kinds.items() if not kind <= self._balanced]
        if not names:
            return frozenset()
        own = torch.autograd.grad(
            logits, [self.parameters[name] for name in names], base, retain_graph=True
        )
        bad = set()
        for name, whole in zip(names, own, strict=True):
            whole = (whole.to_dense() if whole.is_sparse else whole).flatten()
            index = self._some_entries(name)
            some = [read for read in reads if read.use.name == name]
            values, sizes = self._sums(some, index, gradients)
            eps = _coarsest([*(gradients[read.use.node] for read in some), whole])
            gap = values - whole[index.to(whole.device)]
            if bool((gap.abs() > _ROUNDINGS * eps * sizes).any()):
                bad.add(name)
            else:
                self._balanced |= kinds[name]
        return frozenset(bad)

    def _some_entries(self, name: str) -> Tensor:
        index = self.entries[name]
        size = self.parameters[name].numel() if index is None else len(index)
        some = torch.linspace(0, size - 1, min(size, _BALANCED), dtype=torch.float64).long()
        return some if index is None else index[some]

    def _sums(
        self, reads: Sequence[_Read], index: Tensor, gradients: Mapping[Node, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Contract a parameter at some entries, summed over samples; also in absolute values."""
        sums = []
        for absolute in (False, True):
            total = torch.zeros(len(index), dtype=self.work, device=self.device)
            for part, nodes in self.parts(reads, index, Budget(0), sampled=True):
                values = part.reader(absolute=absolute)([gradients[node] for node in nodes])
                total += spread(part, values, len(index)).sum(0)
            sums.append(total)
        return sums[0], sums[1]

    def parts(
        self, reads: Sequence[_Read], index: Tensor | None, budget: Budget, *, sampled: bool = False
    ) -> list[tuple[Part, list[Node]]]:
        """Put the uses of one parameter together that can be read together.

        Unless they are `sampled`, the places of the entries are remembered for other batches.
        """
        together: dict[Hashable, list[_Read]] = defaultdict(list)
        lasting: dict[Hashable, bool] = {}
        for read in reads:
            alike, lasts = _alike(read)
            together[alike].append(read)
            lasting[alike] = lasts and not sampled
        parts = []
        for alike, some in together.items():
            located = self._located.get(alike) if lasting[alike] else None
            if located is None:
                located = self._locate(some[0].use, some[0].form, index)
            if lasting[alike]:
                self._located[alike] = located
            which, place, pairs = located
            if which is not None and len(which) == 0:
                continue
            part = Part(
                [read.form for read in some],
                [read.arranged for read in some],
                which,
                place,
                pairs,
                self.work,
                budget,
            )
            parts.append((part, [read.use.node for read in some]))
        return parts

    def _locate(self, use: Use, form: Form, index: Tensor | None) -> _Located:
        which, place = Places(self.parameters[use.name].shape, use.views).of(index)
        pairs = None
        if isinstance(form, Outer) and index is not None:
            assert place is not None
            pairs = Pairs.of(place, form.groups, form.left, form.right, self.device)
        which, place = (None if t is None else t.to(self.device) for t in (which, place))
        return which, place, pairs

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


@dataclass(frozen=True)
class Reading:
    """A forward pass of a batch, and how its graph is to be read.

    Attributes
    ----------
    reader : JacobianReader
        Whose network it is.
    batch : tensor, list of tensors or dict of tensors
        On the network's device.
    logits : Tensor of shape (n, C)
        With their graph, which :meth:`embed` and :meth:`squares` free.
    reads : dict of str to list of _Read
        Parameter name -> its uses.
    loose : list of str
        Names of the parameters that are read sample by sample.
    """

    reader: JacobianReader
    batch: Batch
    logits: Tensor
    reads: Mapping[str, Sequence[_Read]]
    loose: Sequence[str]

    def embed(self, rows: Tensor) -> Tensor:
        """Contract the batch into its Fisher embedding.

        Parameters
        ----------
        rows : Tensor of shape (n, r, C)
            Directions R(x).

        Returns
        -------
        Tensor of shape (n, r, k)
            R(x) J(x) at the entries, in their order; in float32 at least.
        """
        reader = self.reader
        spans: dict[str, slice] = {}
        start = 0
        for name, index in reader.entries.items():
            if index is None:
                raise ValueError("A reader of whole parameters has no entries to embed at.")
            spans[name] = slice(start, start := start + len(index))
        with exact_mode(reader.device), torch.no_grad():
            n, r = rows.shape[:2]
            out = torch.zeros(n, r, start, dtype=reader.work, device=reader.device)
            budget, todo = Budget(HELD_BYTES), []
            for name, reads in self.reads.items():
                for part, nodes in reader.parts(reads, reader.entries[name], budget):
                    todo.append((name, part, part.reader(), nodes))
            for i, gradients in self._directions(rows, [nodes for *_, nodes in todo]):
                for name, part, read, nodes in todo:
                    values = read([gradients[node] for node in nodes])
                    width = spans[name].stop - spans[name].start
                    out[:, i, spans[name]] += spread(part, values, width)

            def take(s: int, i: int, name: str, gradient: Tensor) -> None:
                out[s, i, spans[name]] = gradient[reader.entries_here[name]]

            self._alone(rows, take)
        return out

    def squares(self, rows: Tensor) -> dict[str, Tensor]:
        """Sum the squares of R(x) J(x) of the batch over samples and directions.

        Parameters
        ----------
        rows : Tensor of shape (n, r, C)
            Directions R(x).

        Returns
        -------
        dict of str to Tensor
            Parameter name -> tensor of the parameter's shape; in float32 at least.
        """
        reader = self.reader
        with exact_mode(reader.device), torch.no_grad():
            n = len(rows)
            totals = {
                name: torch.zeros(
                    reader.parameters[name].numel(), dtype=reader.work, device=reader.device
                )
                for name in reader.entries
            }
            budget, single, several = Budget(HELD_BYTES), [], []
            for name, reads in self.reads.items():
                parts = reader.parts(reads, None, budget)
                if len(parts) == 1 and parts[0][0].which is None:
                    [(part, nodes)] = parts
                    single.append((name, part, part.squares(), nodes))
                elif parts:
                    several.append((name, parts))
            groups = [nodes for *_, nodes in single]
            groups += [nodes for _, parts in several for _, nodes in parts]
            for _, gradients in self._directions(rows, groups):
                for name, part, square, nodes in single:
                    found = square([gradients[node] for node in nodes])
                    totals[name] += found if part.place is None else found[part.place]
                for name, parts in several:
                    given = [[gradients[node] for node in nodes] for _, nodes in parts]
                    totals[name] += squares_of_parameter(
                        [part for part, _ in parts], given, n, totals[name].numel()
                    )

            def take(s: int, i: int, name: str, gradient: Tensor) -> None:
                totals[name] += gradient.to(reader.work).square()

            self._alone(rows, take)
        return {name: t.view(reader.parameters[name].shape) for name, t in totals.items()}

    def _directions(
        self, rows: Tensor, groups: Sequence[Sequence[Node]]
    ) -> Iterator[tuple[int, dict[Node, Tensor]]]:
        """Run a backward pass a direction, to the outputs of these operations."""
        nodes = list(dict.fromkeys(node for group in groups for node in group))
        if not nodes:
            return
        rows = rows.to(self.logits.dtype)
        for i in range(rows.shape[1]):
            found = _backward(self.logits, nodes, rows[:, i], last=i == rows.shape[1] - 1)
            yield i, {node: g for node, g in zip(nodes, found, strict=True) if g is not None}

    def _alone(self, rows: Tensor, take: Callable[[int, int, str, Tensor], None]) -> None:
        """Read the loose parameters of each sample alone; of a single one, all parameters."""
        reader, n = self.reader, len(rows)
        names = self.loose if n > 1 else [*reader.entries]
        if not names or not self.logits.requires_grad:
            return
        for s in range(n):
            logits = self.logits
            if n > 1:
                with torch.enable_grad():
                    logits = reader.logits(rows_of(self.batch, slice(s, s + 1)))
            _gradients_of_one(
                logits,
                {name: reader.parameters[name] for name in names},
                rows[s].to(logits.dtype),
                partial(take, s),
            )


def _gradients_of_one(
    logits: Tensor,
    parameters: Mapping[str, Tensor],
    rows: Tensor,
    take: Callable[[int, str, Tensor], None],
) -> None:
    """Hand each direction's gradient of each parameter over, flat, for a single sample."""
    if not logits.requires_grad:
        return
    groups: list[list[str]] = [[]]
    size = 0
    for name, p in parameters.items():
        if groups[-1] and size + p.numel() > _TOGETHER:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += p.numel()
    for i, row in enumerate(rows):
        for group in groups:
            last = i == len(rows) - 1 and group is groups[-1]
            gradients = torch.autograd.grad(
                logits,
                [parameters[name] for name in group],
                row[None],
                retain_graph=not last,
                allow_unused=True,
            )
            for name, g in zip(group, gradients, strict=True):
                if g is not None:
                    take(i, name, (g.to_dense() if g.is_sparse else g).flatten())
            # Before the next ones are made: they may be as large as a table.
            del gradients, g


def _resolved(uses: Sequence[Use], found: _Found) -> tuple[list[_Read], dict[str, str]]:
    """Decide which uses to read, and which parameters are loose, with the reason.

    A use that may be a view is one where its rows are no sample's: then the uses of its output
    count.
    """
    reads: list[_Read] = []
    loose: dict[str, str] = {}
    settled: dict[str, set[Node]] = defaultdict(set)
    for use, arranged in zip(uses, found.arranged, strict=True):
        if any(step.node in settled[use.name] for step in use.views):
            continue
        if 0 in use.node._input_metadata[0].shape:
            settled[use.name].add(use.node)
        elif arranged is not None:
            form = form_of(use)
            assert form is not None
            settled[use.name].add(use.node)
            reads.append(_Read(use, form, arranged))
        elif not is_spread(use.node):
            loose.setdefault(use.name, use.operation)
    for name in found.unbalanced:
        loose.setdefault(name, "its rule does not give autograd's gradient")
    return [read for read in reads if read.use.name not in loose], loose


def _alike(read: _Read) -> tuple[Hashable, bool]:
    """Say with which other uses one can be read; and whether that holds for other batches too."""
    keys = [step.key for step in read.use.views]
    form: Hashable = "sum"
    if isinstance(read.form, Outer):
        kind = read.form
        form = type(kind), kind.groups, kind.left, kind.right, kind.fixed_is_left
    if None in keys:
        return (read.use.name, id(read.use.node), read.use.slot, form), False
    return (read.use.name, tuple(keys), form), True


def _backward(
    logits: Tensor, nodes: Sequence[Node], weights: Tensor, *, last: bool
) -> Sequence[Tensor | None]:
    """Give the gradients of sum(weights * logits) at the outputs of nodes."""
    edges = [GradientEdge(node, 0) for node in nodes]
    return torch.autograd.grad(
        logits, edges, grad_outputs=weights, retain_graph=not last, allow_unused=True
    )


def _coarsest(tensors: Sequence[Tensor]) -> float:
    """Give the largest rounding of their types."""
    return max(torch.finfo(t.dtype).eps for t in tensors)


def _one_kind(parameters: Mapping[str, Tensor]) -> tuple[torch.device, torch.dtype]:
    kinds = {(str(p.dtype), str(p.device)) for p in parameters.values()}
    if len(kinds) != 1:
        found = ", ".join(f"{dtype} on {device}" for dtype, device in sorted(kinds))
        raise ValueError(
            "Expected all parameters of the network to have one dtype and one device, "
            f"found {found or 'no parameters'}."
        )
    first = next(iter(parameters.values()))
    return first.device, first.dtype
