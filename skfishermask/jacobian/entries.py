"""The wanted entries of a network's parameters, and where they stand in a batch's operands."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence

import torch
from torch import Tensor, nn

from skfishermask.jacobian.contractions import Pairs
from skfishermask.jacobian.gradient_forms import Form, Outer
from skfishermask.jacobian.graph import Use
from skfishermask.jacobian.located_uses import Read
from skfishermask.jacobian.operations import Node
from skfishermask.jacobian.per_sample import Budget, Part
from skfishermask.jacobian.views import Places

_Located = tuple[Tensor | None, Tensor | None, Pairs | None]


class Wanted:
    """Which entries of which parameters of a network are wanted.

    Parameters
    ----------
    module : nn.Module
        The network.
    entries : dict of str to Tensor, optional
        Parameter name -> flat indices of the wanted entries, int64, on the CPU. None: all.

    Attributes
    ----------
    parameters : dict of str to Parameter
        Those of which any are wanted.
    entries, here : dict of str to Tensor or None
        As given, on the CPU and on the network's device; None: all of the parameter.
    device, dtype : torch.device, torch.dtype
        The network's.
    work : torch.dtype
        In which sums are made.

    Raises
    ------
    ValueError
        If the parameters differ in dtype or device, or `entries` names an unknown one.
    """

    def __init__(self, module: nn.Module, entries: Mapping[str, Tensor] | None) -> None:
        parameters = dict(module.named_parameters())
        self.entries: dict[str, Tensor | None] = dict(entries or dict.fromkeys(parameters))
        unknown = [name for name in self.entries if name not in parameters]
        if unknown:
            raise ValueError(f"The module has no parameter {unknown[0]!r}.")
        self.device, self.dtype = _one_kind(parameters)
        # Sums of 16-bit numbers are made in 32 bits.
        self.work = torch.promote_types(self.dtype, torch.float32)
        self.parameters = {name: parameters[name] for name in self.entries}
        self.here = {
            name: None if index is None else index.to(self.device)
            for name, index in self.entries.items()
        }
        self._located: dict[Hashable, _Located] = {}

    def some(self, name: str, most: int) -> Tensor:
        """Give some of the wanted entries of a parameter, spread over all."""
        index = self.entries[name]
        size = self.parameters[name].numel() if index is None else len(index)
        some = torch.linspace(0, size - 1, min(size, most), dtype=torch.float64).long()
        return some if index is None else index[some]

    def parts(
        self, reads: Sequence[Read], index: Tensor | None, budget: Budget, *, sampled: bool = False
    ) -> list[tuple[Part, list[Node]]]:
        """Put the uses of one parameter together that can be read together.

        Unless they are `sampled`, the places of the entries are remembered for other batches.
        """
        together: dict[Hashable, list[Read]] = defaultdict(list)
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


def _alike(read: Read) -> tuple[Hashable, bool]:
    """Say with which other uses one can be read; and whether that holds for other batches too."""
    keys = [step.key for step in read.use.views]
    form: Hashable = "sum"
    if isinstance(read.form, Outer):
        kind = read.form
        form = type(kind), kind.groups, kind.left, kind.right, kind.fixed_is_left
    if None in keys:
        return (read.use.name, id(read.use.node), read.use.slot, form), False
    return (read.use.name, tuple(keys), form), True


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
