"""Layer rules: per-sample parameter gradients from a layer's input and its output gradient.

A rule never forms a per-sample copy of the parameters: it contracts the layer's input with
the gradient at its output, and only at the entries that are asked for. Each rule is a few
lines, because two families cover all of them. In the *outer-product* family (linear,
convolution, embedding) a weight's gradient is a sum over positions of (output gradient) x
(a column of the input); in the *elementwise* family (normalisation in evaluation mode) it is a
sum over positions of a product.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Temporaries of one contraction are kept under about this many elements.
_CHUNK = 1 << 24
# Squares are summed while the products are still in the cache.
_SQUARES_CHUNK = 1 << 21
# A batched product is so much faster per multiply-add than gathering both factors.
_BLOCK_ADVANTAGE = 32

Entries = Mapping[str, Tensor]
"""Parameter name (within its module) -> flat indices of the entries that are asked for."""
Layer = Any
"""A module of the rule's own type: its attributes are read without more ado."""
Contraction = Callable[[Tensor], dict[str, Tensor]]
"""Takes the gradient at the output; gives a tensor for each parameter of the module."""


class Rule(Protocol):
    """What the engine needs to know of a layer type."""

    def accepts(self, module: Layer, x: Tensor, y: Tensor) -> bool:
        """Tell whether input and output of a call have the shapes that the rule reads."""

    def gather(self, module: Layer, x: Tensor, n: int, entries: Entries) -> Contraction:
        """Prepare for output gradients: each gives (n, len(indices)) a parameter."""

    def squares(self, module: Layer, x: Tensor, n: int, names: Collection[str]) -> Contraction:
        """Prepare for output gradients: each gives sum over n of the squared gradient."""


def _by_sample(t: Tensor, n: int) -> Tensor:
    """Fold (n m, D, L) into (n, D, m L): windows or frames of a sample are more positions."""
    if len(t) == n:
        return t
    return t.reshape(n, -1, *t.shape[1:]).transpose(1, 2).flatten(2)


def _take(t: Tensor, index: Tensor) -> Tensor:
    """Take entries of the second axis; increasing indices, so as many as there are mean all."""
    return t if len(index) == t.shape[1] else t.index_select(1, index)


def _pairs(columns: Tensor, i: Tensor, j: Tensor, n_rows: int) -> Callable[[Tensor], Tensor]:
    """Prepare the sums over positions of rows[:, i] * columns[:, j].

    `columns` is (n, I, L), the `n_rows` rows come as (n, O, L), the result is (n, len(i)).
    """
    n, n_columns, length = columns.shape
    if length == 1:
        taken = columns[:, :, 0].index_select(1, j)
        return lambda rows: rows[:, :, 0].index_select(1, i).mul_(taken)
    if n_rows * n_columns <= _BLOCK_ADVANTAGE * len(i):
        flat = j * n_rows + i
        return lambda rows: torch.bmm(columns, rows.mT).flatten(1).index_select(1, flat)
    step = max(1, _CHUNK // (n * length))

    def contract(rows: Tensor) -> Tensor:
        parts = zip(i.split(step), j.split(step), strict=True)
        return torch.cat(
            [rows.index_select(1, a).mul_(columns.index_select(1, b)).sum(2) for a, b in parts], 1
        )

    return contract


def _sum_of_squared_products(rows: Tensor, columns: Tensor) -> Tensor:
    """Sum over n of (rows @ columns)^2; (n, g, O, L), (n, g, L, I) -> (g, O, I)."""
    n, groups, n_rows, length = rows.shape
    n_columns = columns.shape[3]
    if length == 1:
        return torch.einsum("ngo,ngi->goi", rows[..., 0].square(), columns[:, :, 0].square())
    step = min(n, max(1, _SQUARES_CHUNK // (groups * n_rows * n_columns)))
    total = rows.new_zeros(groups, n_rows, n_columns)
    buffer = rows.new_empty(step * groups, n_rows, n_columns)
    for r, c in zip(rows.split(step), columns.split(step), strict=True):
        block = buffer[: len(r) * groups]
        torch.bmm(r.flatten(0, 1), c.flatten(0, 1), out=block).square_()
        total += block.view(len(r), *total.shape).sum(0)
    return total


class _OuterProductRule(ABC):
    """A weight whose gradient is a sum over positions of output gradient x input column."""

    @abstractmethod
    def rows(self, module: Layer, g: Tensor) -> Tensor:
        """View the gradient at the output as (n, O, L)."""

    @abstractmethod
    def columns(self, module: Layer, x: Tensor, which: Tensor) -> Tensor:
        """Take columns of the input: (n, len(which), L)."""

    def all_columns(self, module: Layer, x: Tensor) -> Tensor:
        """Lay out all columns so that the rows can be multiplied by them: (n, L, groups, I)."""
        every = torch.arange(module.weight[0].numel(), device=x.device)
        return self.columns(module, x, every).mT[:, :, None]

    def weight_of(self, module: Layer, t: Tensor) -> Tensor:
        """View (groups, O, I), in the order of `all_columns`, as the weight."""
        return t.view(module.weight.shape)

    def locate(self, module: Layer, index: Tensor) -> tuple[Tensor, Tensor]:
        """Turn flat weight indices into row and (absolute) column numbers."""
        n_columns = module.weight.numel() // module.weight.shape[0]
        return index // n_columns, index % n_columns

    def gather(self, module: Layer, x: Tensor, n: int, entries: Entries) -> Contraction:
        if "weight" in entries:
            row, column = self.locate(module, entries["weight"])
            row_set, i = torch.unique(row, return_inverse=True)
            column_set, j = torch.unique(column, return_inverse=True)
            columns = _by_sample(self.columns(module, x, column_set), n)
            weight = _pairs(columns, i, j, len(row_set))

        def contract(g: Tensor) -> dict[str, Tensor]:
            rows, out = _by_sample(self.rows(module, g), n), {}
            if "weight" in entries:
                out["weight"] = weight(_take(rows, row_set))
            if "bias" in entries:
                out["bias"] = rows[:, entries["bias"]].sum(2)
            return out

        return contract

    def squares(self, module: Layer, x: Tensor, n: int, names: Collection[str]) -> Contraction:
        if "weight" in names:
            # Positions before columns: a plain product is faster than a transposed one.
            columns = self.all_columns(module, x)
            columns = columns.reshape(n, -1, *columns.shape[2:]).transpose(1, 2).contiguous()

        def contract(g: Tensor) -> dict[str, Tensor]:
            rows, out = _by_sample(self.rows(module, g), n), {}
            if "weight" in names:
                grouped = rows.unflatten(1, (columns.shape[1], -1))
                squares = _sum_of_squared_products(grouped, columns)
                out["weight"] = self.weight_of(module, squares)
            if "bias" in names:
                out["bias"] = rows.sum(2).square().sum(0)
            return out

        return contract


class _LinearRule(_OuterProductRule):
    def accepts(self, module: Layer, x: Tensor, y: Tensor) -> bool:
        return x.dim() >= 2 and y.shape == (*x.shape[:-1], module.out_features)

    def rows(self, module: Layer, g: Tensor) -> Tensor:
        return g.reshape(g.shape[0], -1, g.shape[-1]).transpose(1, 2)

    def columns(self, module: Layer, x: Tensor, which: Tensor) -> Tensor:
        return _take(x.reshape(x.shape[0], -1, x.shape[-1]).transpose(1, 2), which)


class _ConvRule(_OuterProductRule):
    def accepts(self, module: Layer, x: Tensor, y: Tensor) -> bool:
        return x.dim() == y.dim() == len(module.kernel_size) + 2

    def rows(self, module: Layer, g: Tensor) -> Tensor:
        return g.flatten(2)

    def padded(self, module: Layer, x: Tensor) -> Tensor:
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        padding = module._reversed_padding_repeated_twice
        return F.pad(x, padding, mode=mode) if any(padding) else x

    def windows(self, module: Layer, x: Tensor) -> Tensor:
        """View all windows of a padded input: (n, channels, *positions, *kernel)."""
        for d, size in enumerate(module.kernel_size):
            span = (size - 1) * module.dilation[d] + 1
            x = x.unfold(2 + d, span, module.stride[d])[..., :: module.dilation[d]]
        return x

    def columns(self, module: Layer, x: Tensor, which: Tensor) -> Tensor:
        x = self.windows(module, self.padded(module, x))
        n_axes = len(module.kernel_size)
        x = x.movedim(tuple(range(-n_axes, 0)), tuple(range(2, 2 + n_axes)))
        taps = x.shape[1 : 2 + n_axes]
        if len(which) == taps.numel():
            return x.reshape(len(x), len(which), -1)
        index: list[Any] = [slice(None), *torch.unravel_index(which, taps)]
        return x[tuple(index)].flatten(2)

    def all_columns(self, module: Layer, x: Tensor) -> Tensor:
        # Channels last: windows are then copied in long runs.
        x = self.padded(module, x).movedim(1, -1).contiguous().movedim(-1, 1)
        x = self.windows(module, x).unflatten(1, (module.groups, -1))
        n_axes = len(module.kernel_size)
        x = x.movedim((1, 2), (1 + n_axes, -1))
        return x.reshape(len(x), x.shape[1 : 1 + n_axes].numel(), module.groups, -1)

    def weight_of(self, module: Layer, t: Tensor) -> Tensor:
        return t.view(len(module.weight), *module.kernel_size, -1).movedim(-1, 1)

    def locate(self, module: Layer, index: Tensor) -> tuple[Tensor, Tensor]:
        row, column = super().locate(module, index)
        per_group = module.weight.numel() // module.weight.shape[0]
        group = row // (module.out_channels // module.groups)
        return row, column + group * per_group


class _EmbeddingRule(_OuterProductRule):
    """The rows are embedding dimensions, the columns are tokens (a one-hot view of the input)."""

    def accepts(self, module: Layer, x: Tensor, y: Tensor) -> bool:
        return x.dim() >= 1 and y.shape == (*x.shape, module.embedding_dim)

    def rows(self, module: Layer, g: Tensor) -> Tensor:
        return g.reshape(g.shape[0], -1, g.shape[-1]).transpose(1, 2)

    def columns(self, module: Layer, x: Tensor, which: Tensor) -> Tensor:
        same = x.reshape(x.shape[0], 1, -1) == which[:, None]
        if module.padding_idx is not None:
            same &= (which != module.padding_idx)[:, None]
        return same.to(module.weight.dtype)

    def locate(self, module: Layer, index: Tensor) -> tuple[Tensor, Tensor]:
        return index % module.embedding_dim, index // module.embedding_dim

    def squares(self, module: Layer, x: Tensor, n: int, names: Collection[str]) -> Contraction:
        # A one-hot view of the whole vocabulary would be large: add up equal tokens of a
        # sample first, then square, then add up over samples.
        ids = x.reshape(n, -1)
        sample = torch.arange(len(ids), device=x.device)[:, None]
        key, place = torch.unique(sample * module.num_embeddings + ids, return_inverse=True)
        token = key % module.num_embeddings

        def contract(g: Tensor) -> dict[str, Tensor]:
            flat = g.reshape(-1, module.embedding_dim)
            sums = flat.new_zeros(len(key), module.embedding_dim)
            sums.index_add_(0, place.flatten(), flat)
            out = flat.new_zeros(module.weight.shape).index_add_(0, token, sums.square())
            if module.padding_idx is not None:
                out[module.padding_idx] = 0
            return {"weight": out}

        return contract


class _ElementwiseRule(ABC):
    """A weight (and bias) that multiplies a normalised input feature by feature."""

    @abstractmethod
    def normalized(self, module: Layer, x: Tensor) -> Tensor:
        """Normalise without the weight and the bias."""

    def features(self, module: Layer, t: Tensor) -> Tensor:
        """View as (n, D, L): samples, features, positions."""
        return t.reshape(t.shape[0], t.shape[1], -1)

    def gather(self, module: Layer, x: Tensor, n: int, entries: Entries) -> Contraction:
        if "weight" in entries:
            x = _by_sample(self.features(module, self.normalized(module, x)), n)
            x = _take(x, entries["weight"])

        def contract(g: Tensor) -> dict[str, Tensor]:
            g, out = _by_sample(self.features(module, g), n), {}
            if "weight" in entries:
                out["weight"] = (_take(g, entries["weight"]) * x).sum(2)
            if "bias" in entries:
                out["bias"] = _take(g, entries["bias"]).sum(2)
            return out

        return contract

    def squares(self, module: Layer, x: Tensor, n: int, names: Collection[str]) -> Contraction:
        shapes = {name: module._parameters[name].shape for name in names}
        every = {k: torch.arange(s.numel(), device=x.device) for k, s in shapes.items()}
        contract = self.gather(module, x, n, every)
        return lambda g: {k: v.square().sum(0).view(shapes[k]) for k, v in contract(g).items()}


class _BatchNormRule(_ElementwiseRule):
    def accepts(self, module: Layer, x: Tensor, y: Tensor) -> bool:
        # Without running statistics the samples of a batch mix, also in evaluation mode.
        return x.dim() >= 2 and module.running_mean is not None

    def normalized(self, module: Layer, x: Tensor) -> Tensor:
        return F.batch_norm(x, module.running_mean, module.running_var, eps=module.eps)


class _GroupNormRule(_ElementwiseRule):
    def accepts(self, module: Layer, x: Tensor, y: Tensor) -> bool:
        return x.dim() >= 2

    def normalized(self, module: Layer, x: Tensor) -> Tensor:
        return F.group_norm(x, module.num_groups, eps=module.eps)


class _LayerNormRule(_ElementwiseRule):
    def accepts(self, module: Layer, x: Tensor, y: Tensor) -> bool:
        return x.dim() > len(module.normalized_shape)

    def features(self, module: Layer, t: Tensor) -> Tensor:
        return t.reshape(t.shape[0], -1, math.prod(module.normalized_shape)).transpose(1, 2)

    def normalized(self, module: Layer, x: Tensor) -> Tensor:
        return F.layer_norm(x, module.normalized_shape, eps=module.eps)


_CONV, _BATCH_NORM = _ConvRule(), _BatchNormRule()
_RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: _LinearRule(),
    nn.Conv1d: _CONV,
    nn.Conv2d: _CONV,
    nn.Conv3d: _CONV,
    nn.Embedding: _EmbeddingRule(),
    nn.BatchNorm1d: _BATCH_NORM,
    nn.BatchNorm2d: _BATCH_NORM,
    nn.BatchNorm3d: _BATCH_NORM,
    nn.LayerNorm: _LayerNormRule(),
    nn.GroupNorm: _GroupNormRule(),
}


def rule_for(module: nn.Module) -> Rule | None:
    """Find the rule of a module, or None: a subclass that computes otherwise has none.

    Parameters
    ----------
    module : nn.Module
        Any module.

    Returns
    -------
    Rule or None
        The rule of the registered type whose ``forward`` this module runs.
    """
    for cls, rule in _RULES.items():
        if isinstance(module, cls):
            own = "forward" in vars(module) or any(
                getattr(type(module), name, None) is not getattr(cls, name, None)
                for name in ("forward", "_conv_forward")
            )
            return None if own else rule
    return None
