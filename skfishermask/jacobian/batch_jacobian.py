"""R(x) J(x) of one batch: a backward pass for each row of R, contracted sample by sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from skfishermask.jacobian.entries import ParameterEntries
from skfishermask.jacobian.hidden_gradients import gradients_by_backward
from skfishermask.jacobian.isolation import exact_mode
from skfishermask.jacobian.linear_head import LinearHead, NoLinearHeadError, linear_head
from skfishermask.jacobian.located_uses import LocatedUse, backward, output_edges
from skfishermask.jacobian.module_io import Inputs, slice_batch
from skfishermask.jacobian.operations import Node
from skfishermask.jacobian.per_sample import (
    TensorCache,
    scatter_to_entries,
    squares_of_parameter,
)
from skfishermask.jacobian.rule_check import RuleCheck

# The most that is held of other operands through the backward passes of a batch.
TENSOR_CACHE_BYTES = 1 << 29
# Gradients of whole parameters are computed together up to this size, for a single sample.
_MAX_NUMBERS_TOGETHER = 1 << 23


@dataclass(frozen=True)
class BatchJacobian:
    """The Jacobian of a batch's outputs, in the form of its autograd graph."""

    entries: ParameterEntries  # those to read
    run: Callable[[Inputs], Tensor]  # returns a batch's checked outputs
    rules: RuleCheck  # checks the rules of what is `unverified`
    batch: Inputs  # on the network's device
    outputs: Tensor  # with their graph, which `multiply` and `sum_of_squares` free
    # by the name of the parameter
    uses: Mapping[str, Sequence[LocatedUse]] = field(default_factory=dict)
    unsupported: Sequence[str] = ()  # parameters that are read sample by sample
    # parameters with rules that are checked as they are used; the verified ones leave it
    unverified: set[str] = field(default_factory=set)
    # made inside a backward pass, so that ``.backward()`` alone gives them
    hides_gradients: bool = False

    def multiply(self, rows: Tensor) -> Tensor:
        """Compute R(x) J(x) at the entries, in their order: (n, r, k), in float32 at least.

        R(x), (n, r, ...), has r rows of the shape of a sample's outputs.
        """
        entries = self.entries
        spans = self._spans()
        with exact_mode(entries.device), torch.no_grad():
            n, r = rows.shape[:2]
            k = sum(span.stop - span.start for span in spans.values())
            out = torch.zeros(n, r, k, dtype=entries.sum_dtype, device=entries.device)
            cache, contractions = TensorCache(TENSOR_CACHE_BYTES), []
            for name, uses in self.uses.items():
                for group, nodes in entries.use_groups(uses, entries.indices[name], cache):
                    contractions.append((name, group, group.contraction(), nodes))
            groups = [nodes for *_, nodes in contractions]
            for i, gradients in self._backward_passes(rows, groups, keep_graph=cache.exceeded):
                for name, group, contract, nodes in contractions:
                    if name not in self.rules.wrong:
                        span = spans[name]
                        values = contract([gradients[node] for node in nodes])
                        out[:, i, span] += scatter_to_entries(group, values, span.stop - span.start)

            def store(s: int, i: int, name: str, gradient: Tensor) -> None:
                out[s, i, spans[name]] = gradient[entries.device_indices[name]]

            self._read_sample_by_sample(rows, store)
        return out

    def factors(self, rows: Tensor, head: LinearHead) -> Tensor:
        """Return the factors of `multiply` at a head: features beside R(x), (n, 1, d + r C).

        Raises NoLinearHeadError unless this batch has the same one.
        """
        entries, own = self.entries, None
        if not (self.hides_gradients or self.unsupported):
            own = linear_head(self.outputs, entries.parameters, entries.indices)
        if own is None or not torch.equal(own.columns, head.columns):
            raise NoLinearHeadError
        # In the precision of a backward pass.
        sides = own.features, rows.to(self.outputs.dtype).flatten(1)
        return torch.cat([side.to(entries.sum_dtype) for side in sides], 1)[:, None]

    def sum_of_squares(self, rows: Tensor) -> dict[str, Tensor]:
        """Compute the squares of R(x) J(x), summed over samples and rows, of each parameter.

        R(x) is as for :meth:`multiply`; the sums have the parameters' shapes, in float32 at least.
        """
        entries = self.entries
        with exact_mode(entries.device), torch.no_grad():
            totals = {
                name: torch.zeros(p.numel(), dtype=entries.sum_dtype, device=entries.device)
                for name, p in entries.parameters.items()
            }
            cache, single, several = TensorCache(TENSOR_CACHE_BYTES), [], []
            for name, uses in self.uses.items():
                use_groups = entries.use_groups(uses, None, cache)
                if len(use_groups) == 1 and use_groups[0][0].entry_index is None:
                    [(group, nodes)] = use_groups
                    single.append((name, group, group.square_sums(), nodes))
                elif use_groups:
                    several.append((name, use_groups))
            groups = [nodes for *_, nodes in single]
            groups += [nodes for _, use_groups in several for _, nodes in use_groups]
            for _, gradients in self._backward_passes(rows, groups, keep_graph=cache.exceeded):
                for name, group, square, nodes in single:
                    if name in self.rules.wrong:
                        continue
                    squares = square([gradients[node] for node in nodes])
                    index = group.operand_index
                    totals[name] += squares if index is None else squares[index]
                for name, use_groups in several:
                    if name in self.rules.wrong:
                        continue
                    totals[name] += squares_of_parameter(
                        [group for group, _ in use_groups],
                        [[gradients[node] for node in nodes] for _, nodes in use_groups],
                        len(rows),
                        totals[name].numel(),
                    )

            def add(s: int, i: int, name: str, gradient: Tensor) -> None:
                totals[name] += gradient.to(entries.sum_dtype).square()

            self._read_sample_by_sample(rows, add)
        return {name: t.view(entries.parameters[name].shape) for name, t in totals.items()}

    def _spans(self) -> dict[str, slice]:
        """Return the columns of each parameter's entries."""
        spans: dict[str, slice] = {}
        start = 0
        for name, index in self.entries.indices.items():
            if index is None:
                raise ValueError("A reader of whole parameters has no entries to multiply at.")
            spans[name] = slice(start, start := start + len(index))
        return spans

    def _backward_passes(
        self, rows: Tensor, groups: Sequence[Sequence[Node]], *, keep_graph: bool
    ) -> Iterator[tuple[int, dict[Node | str, Tensor]]]:
        """Run a backward pass for each row, to the outputs of these operations.

        The first one goes on to the parameters with unverified rules. The last one frees the graph,
        unless tensors that it has saved are still needed.
        """
        edges = output_edges(node for group in groups for node in group)
        if not edges:
            return
        rows = rows.to(self.outputs.dtype)
        unverified = self.unverified & self.uses.keys()
        further = self.rules.edges(unverified)
        for i in range(rows.shape[1]):
            last = i == rows.shape[1] - 1 and not keep_graph and not further
            gradients = backward(self.outputs, {**edges, **further}, rows[:, i], last=last)
            if further:
                self.unverified.difference_update(self.rules.check(self.uses, gradients))
                further = {}
            yield i, gradients

    def _read_sample_by_sample(
        self, rows: Tensor, store: Callable[[int, int, str, Tensor], None]
    ) -> None:
        """Read the unsupported parameters of each sample alone; of a single one, all parameters."""
        entries, n = self.entries, len(rows)
        is_new = n > 1 or self.hides_gradients
        wrong = [name for name in self.uses if name in self.rules.wrong]
        names = [*self.unsupported, *wrong] if is_new else [*entries.indices]
        if not names or not (self.outputs.requires_grad or self.hides_gradients):
            return
        for s in range(n):
            outputs = self.outputs
            if is_new:
                with torch.enable_grad():
                    outputs = self.run(slice_batch(self.batch, slice(s, s + 1)))
            read_sample = _read_sample_by_backward if self.hides_gradients else _read_sample
            read_sample(
                outputs,
                {name: entries.parameters[name] for name in names},
                rows[s].to(outputs.dtype),
                partial(store, s),
            )


def _read_sample_by_backward(
    outputs: Tensor,
    parameters: Mapping[str, Tensor],
    rows: Tensor,
    store: Callable[[int, str, Tensor], None],
) -> None:
    """Do what `_read_sample` does, where gradients are made inside a backward pass."""
    for i, row in enumerate(rows):
        retain_graph = i < len(rows) - 1
        gradients = gradients_by_backward(outputs, row[None], parameters, retain_graph=retain_graph)
        for name, g in gradients.items():
            store(i, name, (g.to_dense() if g.is_sparse else g).flatten())


def _read_sample(
    outputs: Tensor,
    parameters: Mapping[str, Tensor],
    rows: Tensor,
    store: Callable[[int, str, Tensor], None],
) -> None:
    """Call `store` with each row's gradient of each parameter, flat, for a single sample."""
    if not outputs.requires_grad:
        return
    groups: list[list[str]] = [[]]
    size = 0
    for name, p in parameters.items():
        if groups[-1] and size + p.numel() > _MAX_NUMBERS_TOGETHER:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += p.numel()
    for i, row in enumerate(rows):
        for group in groups:
            last = i == len(rows) - 1 and group is groups[-1]
            gradients = torch.autograd.grad(
                outputs,
                [parameters[name] for name in group],
                row[None],
                retain_graph=not last,
                allow_unused=True,
            )
            for name, g in zip(group, gradients, strict=True):
                if g is not None:
                    store(i, name, (g.to_dense() if g.is_sparse else g).flatten())
            # Before the next ones are made: they may be as large as a table.
            del gradients, g
