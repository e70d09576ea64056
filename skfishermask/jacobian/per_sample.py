"""A parameter's per-sample gradients in one batch, from the forms of its uses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from skfishermask.jacobian.contractions import (
    FeaturePairs,
    scatter_add_rows,
    squares_of_products,
    sums_of_pairs,
)
from skfishermask.jacobian.gradient_forms import (
    BroadcastGrad,
    EmbeddingGrad,
    Form,
    OuterProductGrad,
)
from skfishermask.jacobian.sample_layout import SampleLayout

# Per-sample gradients of whole parameters are formed for samples of this size at once.
_CHUNK_NUMBERS = 1 << 24

Gradients = Sequence[Tensor]
"""One for each form of a group: the gradient at its operation's output."""


class TensorCache:
    """Holds tensors through the backward passes of a batch, up to a number of bytes.

    It is `exceeded` where a tensor was too large, and is made anew from what the graph has saved.
    """

    def __init__(self, n_bytes: int) -> None:
        self._left_bytes = n_bytes
        self.exceeded = False

    def get(self, make: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Return a function that returns the tensor: held if it fits, else made at each call."""
        made = make()
        n_bytes = made.untyped_storage().nbytes()
        if n_bytes > self._left_bytes:
            self.exceeded = True
            return make
        self._left_bytes -= n_bytes
        return lambda: made


@dataclass(frozen=True)
class UseGroup:
    """Uses of a parameter that are contracted together."""

    forms: Sequence[Form]  # all outer products of the same sizes, or all broadcast
    layouts: Sequence[SampleLayout]  # of the rows of each
    entry_index: Tensor | None  # see `entry_positions`; on the device
    operand_index: Tensor | None  # the same
    pairs: FeaturePairs | None  # the features at `operand_index`, for an outer product
    sum_dtype: torch.dtype
    cache: TensorCache  # for the operands that the operations have saved

    def contraction(self, *, absolute: bool = False) -> Callable[[Gradients], Tensor]:
        """Return a function of gradients: each sample's, (n, length of `operand_index`).

        With `absolute`, sums are of absolute values: their rounding is relative to these.
        """
        products = self._products()
        if not products:
            sums = self._broadcast_sums(absolute=absolute)
            return lambda gradients: self._at_operand_index(sums(gradients))
        assert self.pairs is not None
        pairs, saved_is_left = self.pairs, products[0].saved_is_left
        saved_index, grad_index = (
            (pairs.left, pairs.right) if saved_is_left else (pairs.right, pairs.left)
        )
        saved = self.cache.get(
            lambda: self._features_first(
                [form.saved_side(_features(saved_index, form, saved_is_left)) for form in products]
            )
        )

        def contract(gradients: Gradients) -> Tensor:
            grad = self._features_first(
                [
                    form.grad_side(g, _features(grad_index, form, not saved_is_left))
                    for form, g in zip(products, gradients, strict=True)
                ]
            )
            left, right = (saved(), grad) if saved_is_left else (grad, saved())
            if absolute:
                left, right = left.abs(), right.abs()
            return sums_of_pairs(left, right, pairs)

        return contract

    def square_sums(self) -> Callable[[Gradients], Tensor]:
        """Return a function of gradients: squares summed over samples, (numel of the operand,)."""
        products = self._products()
        if not products:
            sums = self._broadcast_sums()
            return lambda gradients: sums(gradients).square().sum(0)
        if isinstance(products[0], EmbeddingGrad):
            return self._square_sums_of_tables()
        first = products[0]
        if first.saved_blocks is not None and first.restore_order is not None:
            restore_order = first.restore_order
            blocks = self.cache.get(
                lambda: self._blocks(
                    [form.saved_blocks() for form in products if form.saved_blocks]
                )
            )
            return lambda gradients: restore_order(
                squares_of_products(self._side(gradients, left=True), blocks())
            ).flatten()
        saved = self.cache.get(lambda: self._side(None, left=first.saved_is_left))

        def square_sums(gradients: Gradients) -> Tensor:
            grad = self._side(gradients, left=not first.saved_is_left)
            left, right = (saved(), grad) if first.saved_is_left else (grad, saved())
            return squares_of_products(left, right).flatten()

        return square_sums

    def whole_gradients(self, gradients: Gradients) -> Callable[[slice], Tensor]:
        """Return a function of a slice of samples: their gradients, (samples, numel of operand)."""
        products = self._products()
        if not products:
            values = self._broadcast_sums()(gradients)
            return lambda samples: values[samples]
        if isinstance(products[0], EmbeddingGrad):
            ids, rows = self._ids(), self._table_rows(gradients)
            n_rows = products[0].left

            def of_table(samples: slice) -> Tensor:
                keys = _row_keys(ids[samples], n_rows)
                n_keys = len(keys) * (n_rows + 1)
                sums = scatter_add_rows(n_keys, keys.flatten(), rows[samples].flatten(0, 1))
                return sums.view(len(keys), n_rows + 1, -1)[:, :n_rows].flatten(1)

            return of_table
        saved_is_left = products[0].saved_is_left
        left = self._side(None if saved_is_left else gradients, left=True)
        right = self._side(gradients if saved_is_left else None, left=False)
        return lambda samples: (left[samples] @ right[samples]).flatten(1)

    def at_entries(self, values: Tensor, numel: int) -> Tensor:
        """Return gradients of the whole operand as those of the whole parameter, (n, numel)."""
        return scatter_to_entries(self, self._at_operand_index(values), numel)

    def _products(self) -> list[OuterProductGrad]:
        return [form for form in self.forms if isinstance(form, OuterProductGrad)]

    def _at_operand_index(self, values: Tensor) -> Tensor:
        return values if self.operand_index is None else values.index_select(1, self.operand_index)

    def _by_sample(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return each use's rows (rows, ...) by sample: (n, rows of a sample, ...)."""
        pairs = zip(self.layouts, tensors, strict=True)
        return [layout(t).to(self.sum_dtype) for layout, t in pairs]

    def _features_first(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return (rows, features, positions) as (n, features, all positions)."""
        by_sample = [
            t[:, 0] if t.shape[1] == 1 else t.transpose(1, 2).flatten(2)
            for t in self._by_sample(tensors)
        ]
        return _joined(by_sample, 2)

    def _side(self, gradients: Gradients | None, *, left: bool) -> Tensor:
        """Return all features of a side: of the gradients, or without them the saved one.

        The shape is (n, groups, left, positions) or (n, groups, positions, right).
        """
        products = self._products()
        if gradients is None:
            sides = [form.saved_side(None) for form in products]
        else:
            sides = [form.grad_side(g, None) for form, g in zip(products, gradients, strict=True)]
        first = products[0]
        if left:
            grouped: Tensor = self._features_first(sides).unflatten(1, (first.groups, first.left))
            return grouped
        whole = _joined([t.transpose(2, 3).flatten(1, 2) for t in self._by_sample(sides)], 1)
        grouped = whole.unflatten(2, (first.groups, first.right)).transpose(1, 2)
        # A plain product is faster than a transposed one.
        return grouped.contiguous()

    def _blocks(self, blocks: Sequence[Tensor]) -> Tensor:
        whole = _joined([t.flatten(1, 2) for t in self._by_sample(blocks)], 1)
        return whole.transpose(1, 2).contiguous()

    def _broadcast_sums(self, *, absolute: bool = False) -> Callable[[Gradients], Tensor]:
        """Return a function of gradients: each sample's, (n, numel of the operand)."""
        forms = [form for form in self.forms if isinstance(form, BroadcastGrad)]
        factors = [None if f.factor is None else self.cache.get(f.factor) for f in forms]

        def sums(gradients: Gradients) -> Tensor:
            total: Tensor | None = None
            for form, layout, factor, g in zip(
                forms, self.layouts, factors, gradients, strict=True
            ):
                g = form.view(g).to(self.sum_dtype)
                g = g if factor is None else g * factor().to(self.sum_dtype)
                g = layout(g.abs() if absolute else g)
                others = [size for axis, size in enumerate(form.shape) if axis != layout.axis]
                axes = [1, *(2 + i for i, size in enumerate(others) if size == 1)]
                values = g.sum(axes).reshape(len(g), -1)
                scale = abs(form.scale) if absolute else form.scale
                values = values if scale == 1 else values * scale
                total = values if total is None else total + values
            assert total is not None
            return total

        return sums

    def _ids(self) -> Tensor:
        """Return which rows of its table each sample looks up, -1 for none: (n, rows)."""
        tables = [form for form in self.forms if isinstance(form, EmbeddingGrad)]
        pairs = zip(self.layouts, (form.ids for form in tables), strict=True)
        # Where a sample has fewer rows, a layout fills up with zeros.
        return torch.cat([layout(ids + 1) - 1 for layout, ids in pairs if ids is not None], 1)

    def _table_rows(self, gradients: Gradients) -> Tensor:
        """Return the gradients of the rows that each sample looks up: (n, rows, columns)."""
        pairs = zip(self._products(), gradients, strict=True)
        return torch.cat(self._by_sample([form.grad_side(g, None)[..., 0] for form, g in pairs]), 1)

    def _square_sums_of_tables(self) -> Callable[[Gradients], Tensor]:
        # Equal rows of a sample are added up first, then squared, then added over samples.
        ids, n_rows = self._ids(), self._products()[0].left
        unique, inverse = torch.unique(_row_keys(ids, n_rows), return_inverse=True)
        row = unique % (n_rows + 1)

        def square_sums(gradients: Gradients) -> Tensor:
            rows = self._table_rows(gradients).flatten(0, 1)
            sums = scatter_add_rows(len(unique), inverse.flatten(), rows)
            return scatter_add_rows(n_rows + 1, row, sums.square_())[:n_rows].flatten()

        return square_sums


def _row_keys(ids: Tensor, n_rows: int) -> Tensor:
    """Return numbers of the rows of each sample's own table, with one more for no gradient."""
    sample = torch.arange(len(ids), device=ids.device)[:, None]
    return sample * (n_rows + 1) + torch.where(ids < 0, n_rows, ids)


def _joined(tensors: list[Tensor], axis: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, axis)


def _features(index: Tensor, form: OuterProductGrad, left: bool) -> Tensor | None:
    """Return which features of a side to compute; None: all."""
    size = form.groups * (form.left if left else form.right)
    return None if len(index) == size else index


def squares_of_parameter(
    groups: Sequence[UseGroup], gradients: Sequence[Gradients], n: int, numel: int
) -> Tensor:
    """Sum squares over n samples where the gradients of several groups must be added up first.

    The groups are of all entries of the parameter; returns (numel,).
    """
    of_samples = [group.whole_gradients(g) for group, g in zip(groups, gradients, strict=True)]
    total: Tensor | None = None
    step = max(1, _CHUNK_NUMBERS // numel)
    for start in range(0, n, step):
        chunk = None
        for group, gradients_of in zip(groups, of_samples, strict=True):
            values = group.at_entries(gradients_of(slice(start, start + step)), numel)
            chunk = values if chunk is None else chunk + values
        assert chunk is not None
        squares = chunk.square().sum(0)
        total = squares if total is None else total + squares
    assert total is not None
    return total


def scatter_to_entries(group: UseGroup, values: Tensor, numel: int) -> Tensor:
    """Add values at a group's positions, (n, positions), up at its entries: (n, numel)."""
    if group.entry_index is None:
        return values
    return scatter_add_rows(numel, group.entry_index, values.T).T
