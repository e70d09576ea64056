"""A check of the rules: summed over samples, they must give autograd's own gradient."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from skfishermask.jacobian.entries import ParameterEntries
from skfishermask.jacobian.graph import Use
from skfishermask.jacobian.graph_facts import NetworkFacts
from skfishermask.jacobian.located_uses import LocatedUse
from skfishermask.jacobian.operations import Node
from skfishermask.jacobian.per_sample import TensorCache, scatter_to_entries

# Entries that are compared: at equal distances, and the largest in blocks of equal size.
_N_COMPARED = 64
# Largest difference from autograd's gradient, in roundings of the sum of absolute values.
_MAX_ROUNDINGS = 256
_REASON = "its rule does not give autograd's gradient"


class RuleCheck:
    """Compares what the rules give with autograd's gradient of each parameter.

    Each kind of use is verified once, on samples of which it adds something to the gradient: where
    all is zero (units that are off, rows of a table that are not read), a comparison shows nothing.
    What is found is noted in `facts`, and `warn` is given the parameters with a wrong rule.
    """

    def __init__(
        self,
        entries: ParameterEntries,
        warn: Callable[[Mapping[str, str]], None],
        facts: NetworkFacts,
    ) -> None:
        self._entries = entries
        self._warn = warn
        self._wrong, self._verified = facts.wrong, facts.verified

    @property
    def wrong(self) -> dict[str, str]:
        """The parameters with a wrong rule, and the reason."""
        return {n: reason for n, reason in self._wrong.items() if n in self._entries.indices}

    def unverified(self, uses: Sequence[Use]) -> set[str]:
        """Name the parameters with a kind of use that has not been verified yet."""
        return {use.name for use in uses if use.kind not in self._verified} - self.wrong.keys()

    def edges(self, names: set[str]) -> dict[Node | str, GradientEdge]:
        """Return the edges at parameters, for `backward`."""
        parameters = self._entries.parameters
        return {name: get_gradient_edge(p) for name, p in parameters.items() if name in names}

    def check(
        self, uses: Mapping[str, Sequence[LocatedUse]], gradients: Mapping[Node | str, Tensor]
    ) -> set[str]:
        """Check the rules of those parameters that have a gradient; name the verified ones.

        The gradients are those at the uses' nodes and at parameters, in one backward pass.
        """
        verified = set()
        for name, several in uses.items():
            if name not in gradients:
                continue
            gradient = gradients[name]
            gradient = (gradient.to_dense() if gradient.is_sparse else gradient).flatten()
            index = [self._entries.sample(name, _N_COMPARED), _largest_of_blocks(gradient)]
            where = torch.cat(index).unique()
            by_kind: dict[Hashable, list[LocatedUse]] = defaultdict(list)
            for one in several:
                by_kind[one.use.kind].append(one)
            sums = [self._sums(some, where, gradients) for some in by_kind.values()]
            absolute = [
                self._sums(some, where, gradients, absolute=True) for some in by_kind.values()
            ]
            nodes = [gradients[one.use.node] for one in several]
            eps = max(torch.finfo(t.dtype).eps for t in [*nodes, gradient])
            gap = sum(sums) - gradient[where.to(gradient.device)]
            if bool((gap.abs() > _MAX_ROUNDINGS * eps * sum(absolute)).any()):
                self._wrong[name] = _REASON
            elif bool(gap.isfinite().all()):
                shown = [kind for kind, s in zip(by_kind, absolute, strict=True) if bool(s.any())]
                self._verified |= {*shown}
                verified |= {name} if len(shown) == len(by_kind) else set()
        self._warn({name: _REASON for name in uses if name in self.wrong})
        return verified

    def _sums(
        self,
        uses: Sequence[LocatedUse],
        index: Tensor,
        gradients: Mapping[Node | str, Tensor],
        *,
        absolute: bool = False,
    ) -> Tensor:
        """Contract a parameter's uses at some entries, summed over samples."""
        entries = self._entries
        total = torch.zeros(len(index), dtype=entries.sum_dtype, device=entries.device)
        for group, nodes in entries.use_groups(uses, index, TensorCache(0), sampled=True):
            contract = group.contraction(absolute=absolute)
            values = contract([gradients[node] for node in nodes])
            total += scatter_to_entries(group, values, len(index)).sum(0)
        return total


def _largest_of_blocks(gradient: Tensor) -> Tensor:
    """Return the positions of the largest values in blocks of equal size, on the CPU."""
    size = max(1, -(-len(gradient) // _N_COMPARED))
    blocks = torch.nn.functional.pad(gradient.abs(), (0, -len(gradient) % size)).view(-1, size)
    return blocks.argmax(1).cpu() + torch.arange(len(blocks)) * size
