"""The entries of a network's parameters to read, and where they lie in a batch's operands."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from functools import reduce

import torch
from torch import Tensor, nn

from skfishermask.jacobian.contractions import FeaturePairs
from skfishermask.jacobian.gradient_forms import Form, OuterProductGrad
from skfishermask.jacobian.graph import Use
from skfishermask.jacobian.isolation import trainable_parameters
from skfishermask.jacobian.located_uses import LocatedUse
from skfishermask.jacobian.operations import Node
from skfishermask.jacobian.per_sample import TensorCache, UseGroup
from skfishermask.jacobian.views import entry_positions

_OperandPositions = tuple[Tensor | None, Tensor | None, FeaturePairs | None]


class ParameterEntries:
    """The entries of a network's parameters to read.

    The `indices` of each parameter are flat, int64, on the CPU, and so on its own device in
    `device_indices`; None: all of it, or without `indices`, all of the trainable parameters. Sums
    are made in `sum_dtype`. Raises ValueError if the parameters differ in device, or `indices`
    names an unknown one, or one that is not real.
    """

    def __init__(self, module: nn.Module, indices: Mapping[str, Tensor] | None) -> None:
        parameters = dict(module.named_parameters())
        self.indices: dict[str, Tensor | None] = dict(
            indices or dict.fromkeys(trainable_parameters(module))
        )
        unknown = [name for name in self.indices if name not in parameters]
        if unknown:
            raise ValueError(f"The module has no parameter {unknown[0]!r}.")
        self.device = _one_device(parameters)
        self.parameters = {name: parameters[name] for name in self.indices}
        _check_real(self.parameters)
        # Sums of 16-bit numbers are made in 32 bits.
        dtypes = [p.dtype for p in self.parameters.values()]
        self.sum_dtype = reduce(torch.promote_types, dtypes, torch.float32)
        self.device_indices = {
            name: None if index is None else index.to(self.device)
            for name, index in self.indices.items()
        }
        self._positions: dict[Hashable, _OperandPositions] = {}

    def sample(self, name: str, max_entries: int) -> Tensor:
        """Return at most `max_entries` of a parameter's entries, at equal distances."""
        index = self.indices[name]
        size = self.parameters[name].numel() if index is None else len(index)
        some = torch.linspace(0, size - 1, min(size, max_entries), dtype=torch.float64).long()
        return some if index is None else index[some]

    def use_groups(
        self,
        uses: Sequence[LocatedUse],
        index: Tensor | None,
        cache: TensorCache,
        *,
        sampled: bool = False,
    ) -> list[tuple[UseGroup, list[Node]]]:
        """Group the uses of one parameter that can be contracted together.

        Unless the entries are `sampled`, their positions are kept for other batches.
        """
        groups: dict[Hashable, list[LocatedUse]] = defaultdict(list)
        reusable: dict[Hashable, bool] = {}
        for one in uses:
            key, is_reusable = _group_key(one)
            groups[key].append(one)
            reusable[key] = is_reusable and not sampled
        result = []
        for key, group in groups.items():
            positions = self._positions.get(key) if reusable[key] else None
            if positions is None:
                positions = self._operand_positions(group[0].use, group[0].form, index)
            if reusable[key]:
                self._positions[key] = positions
            entry_index, operand_index, pairs = positions
            if entry_index is not None and len(entry_index) == 0:
                continue
            use_group = UseGroup(
                [one.form for one in group],
                [one.layout for one in group],
                entry_index,
                operand_index,
                pairs,
                self.sum_dtype,
                cache,
            )
            result.append((use_group, [one.use.node for one in group]))
        return result

    def _operand_positions(self, use: Use, form: Form, index: Tensor | None) -> _OperandPositions:
        positions = entry_positions(self.parameters[use.name].shape, use.views, index)
        _, operand_index = positions
        pairs = None
        if isinstance(form, OuterProductGrad) and index is not None:
            assert operand_index is not None
            pairs = FeaturePairs.at(operand_index, form.groups, form.left, form.right, self.device)
        entry_index, operand_index = (None if t is None else t.to(self.device) for t in positions)
        return entry_index, operand_index, pairs


def _group_key(located: LocatedUse) -> tuple[Hashable, bool]:
    """Return what uses of one group have in common, and whether it is so in every batch."""
    use, grad = located.use, located.form
    views = [step.key for step in use.views]
    kind: Hashable = "broadcast"
    if isinstance(grad, OuterProductGrad):
        kind = type(grad), grad.groups, grad.left, grad.right, grad.saved_is_left
    if None in views:
        return (use.name, id(use.node), use.operand, kind), False
    return (use.name, tuple(views), kind), True


def _one_device(parameters: Mapping[str, Tensor]) -> torch.device:
    devices = {p.device for p in parameters.values()}
    if len(devices) != 1:
        names = ", ".join(sorted(map(str, devices))) or "no parameters"
        raise ValueError(
            f"Expected all parameters of the network to be on one device, found {names}."
        )
    return devices.pop()


def _check_real(parameters: Mapping[str, Tensor]) -> None:
    for name, p in parameters.items():
        if not p.is_floating_point():
            raise ValueError(
                f"Expected parameters that are real numbers, found {name!r} of {p.dtype}. Of "
                "complex numbers make a real parameter, and torch.view_as_complex in forward; or "
                "freeze it, by requires_grad_(False), before the query."
            )
