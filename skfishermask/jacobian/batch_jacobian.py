"""Contracting one batch: a backward pass a direction, and the forms of all uses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from skfishermask.jacobian.entries import Wanted
from skfishermask.jacobian.isolation import exact_mode
from skfishermask.jacobian.located_uses import Read, backward, outputs
from skfishermask.jacobian.module_io import Inputs, rows_of
from skfishermask.jacobian.operations import Node
from skfishermask.jacobian.per_sample import Budget, spread, squares_of_parameter

# What is held of other operands through the backward passes of a batch.
HELD_BYTES = 1 << 29
# Gradients of whole parameters are asked for together up to so many numbers.
_TOGETHER = 1 << 23


@dataclass(frozen=True)
class Reading:
    """A forward pass of a batch, and how its graph is to be read.

    Attributes
    ----------
    wanted : Wanted
        What is read.
    run : callable
        Gives a batch's checked logits.
    batch : tensor, list of tensors or dict of tensors
        On the network's device.
    logits : Tensor of shape (n, C)
        With their graph, which :meth:`embed` and :meth:`squares` free.
    reads : dict of str to list of Read
        Parameter name -> its uses.
    loose : list of str
        Names of the parameters that are read sample by sample.
    """

    wanted: Wanted
    run: Callable[[Inputs], Tensor]
    batch: Inputs
    logits: Tensor
    reads: Mapping[str, Sequence[Read]]
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
        wanted = self.wanted
        spans: dict[str, slice] = {}
        start = 0
        for name, index in wanted.entries.items():
            if index is None:
                raise ValueError("A reader of whole parameters has no entries to embed at.")
            spans[name] = slice(start, start := start + len(index))
        with exact_mode(wanted.device), torch.no_grad():
            n, r = rows.shape[:2]
            out = torch.zeros(n, r, start, dtype=wanted.work, device=wanted.device)
            budget, todo = Budget(HELD_BYTES), []
            for name, reads in self.reads.items():
                for part, nodes in wanted.parts(reads, wanted.entries[name], budget):
                    todo.append((name, part, part.reader(), nodes))
            groups = [nodes for *_, nodes in todo]
            for i, gradients in self._directions(rows, groups, keep=budget.exceeded):
                for name, part, read, nodes in todo:
                    values = read([gradients[node] for node in nodes])
                    width = spans[name].stop - spans[name].start
                    out[:, i, spans[name]] += spread(part, values, width)

            def take(s: int, i: int, name: str, gradient: Tensor) -> None:
                out[s, i, spans[name]] = gradient[wanted.here[name]]

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
        wanted = self.wanted
        with exact_mode(wanted.device), torch.no_grad():
            n = len(rows)
            totals = {
                name: torch.zeros(
                    wanted.parameters[name].numel(), dtype=wanted.work, device=wanted.device
                )
                for name in wanted.entries
            }
            budget, single, several = Budget(HELD_BYTES), [], []
            for name, reads in self.reads.items():
                parts = wanted.parts(reads, None, budget)
                if len(parts) == 1 and parts[0][0].which is None:
                    [(part, nodes)] = parts
                    single.append((name, part, part.squares(), nodes))
                elif parts:
                    several.append((name, parts))
            groups = [nodes for *_, nodes in single]
            groups += [nodes for _, parts in several for _, nodes in parts]
            for _, gradients in self._directions(rows, groups, keep=budget.exceeded):
                for name, part, square, nodes in single:
                    found = square([gradients[node] for node in nodes])
                    totals[name] += found if part.place is None else found[part.place]
                for name, parts in several:
                    given = [[gradients[node] for node in nodes] for _, nodes in parts]
                    totals[name] += squares_of_parameter(
                        [part for part, _ in parts], given, n, totals[name].numel()
                    )

            def take(s: int, i: int, name: str, gradient: Tensor) -> None:
                totals[name] += gradient.to(wanted.work).square()

            self._alone(rows, take)
        return {name: t.view(wanted.parameters[name].shape) for name, t in totals.items()}

    def _directions(
        self, rows: Tensor, groups: Sequence[Sequence[Node]], *, keep: bool
    ) -> Iterator[tuple[int, dict[Node, Tensor]]]:
        """Run a backward pass a direction, to the outputs of these operations.

        The last one frees the graph, unless `keep` says that it is still read.
        """
        edges = outputs(node for group in groups for node in group)
        if not edges:
            return
        rows = rows.to(self.logits.dtype)
        for i in range(rows.shape[1]):
            last = i == rows.shape[1] - 1 and not keep
            yield i, backward(self.logits, edges, rows[:, i], last=last)

    def _alone(self, rows: Tensor, take: Callable[[int, int, str, Tensor], None]) -> None:
        """Read the loose parameters of each sample alone; of a single one, all parameters."""
        wanted, n = self.wanted, len(rows)
        names = self.loose if n > 1 else [*wanted.entries]
        if not names or not self.logits.requires_grad:
            return
        for s in range(n):
            logits = self.logits
            if n > 1:
                with torch.enable_grad():
                    logits = self.run(rows_of(self.batch, slice(s, s + 1)))
            _gradients_of_one(
                logits,
                {name: wanted.parameters[name] for name in names},
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
