"""A parameter's per-sample gradients in one batch, from the forms of its uses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from skfishermask.jacobian.contractions import Pairs, added_rows, squares_of_products, sums_of_pairs
from skfishermask.jacobian.gradient_forms import Form, Outer, Sum, Table
from skfishermask.jacobian.sample_layout import Arrangement

# Per-sample gradients of whole parameters are formed for so many numbers at once.
_CHUNK = 1 << 24

Gradients = Sequence[Tensor]
"""One for each form of a part: the gradient at its operation's output."""


class Budget:
    """How much may be held through the backward passes; what exceeds it is made for each anew.

    Parameters
    ----------
    n_bytes : int
        The most that may be held.

    Attributes
    ----------
    exceeded : bool
        Whether anything is made anew, from what the graph has saved.
    """

    def __init__(self, n_bytes: int) -> None:
        self._left = n_bytes
        self.exceeded = False

    def hold(self, make: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Make a tensor once, if there is room for it."""
        made = make()
        size = made.untyped_storage().nbytes()
        if size > self._left:
            self.exceeded = True
            return make
        self._left -= size
        return lambda: made


@dataclass(frozen=True)
class Part:
    """Uses of a parameter that are read together.

    Attributes
    ----------
    forms : sequence of Form
        All outer products of the same sizes, or all sums.
    arranged : sequence of Arrangement
        Of the rows of each.
    which, place : Tensor of int64, or None
        See `Places.of`; on the device.
    pairs : Pairs or None
        The features at `place`, for an outer product.
    work : torch.dtype
        In which sums are made.
    budget : Budget
        For what is held.
    """

    forms: Sequence[Form]
    arranged: Sequence[Arrangement]
    which: Tensor | None
    place: Tensor | None
    pairs: Pairs | None
    work: torch.dtype
    budget: Budget

    def reader(self, *, absolute: bool = False) -> Callable[[Gradients], Tensor]:
        """Prepare for gradients: each gives (n, number of places).

        With `absolute`, sums are of absolute values: what their rounding is measured by.
        """
        outer = [form for form in self.forms if isinstance(form, Outer)]
        if not outer:
            sums = self._sums(absolute=absolute)
            return lambda gradients: self._placed(sums(gradients))
        assert self.pairs is not None
        pairs, is_left = self.pairs, outer[0].fixed_is_left
        ours, theirs = (pairs.left, pairs.right) if is_left else (pairs.right, pairs.left)
        fixed = self.budget.hold(
            lambda: self._features_first([form.fixed(_all(ours, form, is_left)) for form in outer])
        )

        def read(gradients: Gradients) -> Tensor:
            moving = self._features_first(
                [
                    form.moving(g, _all(theirs, form, not is_left))
                    for form, g in zip(outer, gradients, strict=True)
                ]
            )
            left, right = (fixed(), moving) if is_left else (moving, fixed())
            if absolute:
                left, right = left.abs(), right.abs()
            return sums_of_pairs(left, right, pairs)

        return read

    def squares(self) -> Callable[[Gradients], Tensor]:
        """Prepare for gradients: each gives the squares summed over samples, of the operand."""
        outer = [form for form in self.forms if isinstance(form, Outer)]
        if not outer:
            sums = self._sums()
            return lambda gradients: sums(gradients).square().sum(0)
        if isinstance(outer[0], Table):
            return self._squares_of_table([form for form in outer if isinstance(form, Table)])
        first = outer[0]
        if first.blocks is not None and first.restored is not None:
            restored = first.restored
            fixed = self.budget.hold(
                lambda: self._blocks([form.blocks() for form in outer if form.blocks])
            )
            return lambda gradients: restored(
                squares_of_products(self._side(outer, gradients, left=True), fixed())
            ).flatten()
        fixed = self.budget.hold(lambda: self._side(outer, None, left=first.fixed_is_left))

        def square(gradients: Gradients) -> Tensor:
            moving = self._side(outer, gradients, left=not first.fixed_is_left)
            sides = (fixed(), moving) if first.fixed_is_left else (moving, fixed())
            return squares_of_products(*sides).flatten()

        return square

    def dense(self, gradients: Gradients) -> Callable[[slice], Tensor]:
        """Give whole gradients, of the operand, of some samples: (number of samples, numel)."""
        outer = [form for form in self.forms if isinstance(form, Outer)]
        if not outer:
            values = self._sums()(gradients)
            return lambda samples: values[samples]
        if isinstance(outer[0], Table):
            tables = [form for form in outer if isinstance(form, Table)]
            ids, rows = self._ids(tables), self._rows_of_tables(tables, gradients)
            n_rows = outer[0].left

            def of_table(samples: slice) -> Tensor:
                some, sample = ids[samples], torch.arange(len(ids[samples]), device=ids.device)
                # One more row takes what belongs to none.
                key = sample[:, None] * (n_rows + 1) + torch.where(some < 0, n_rows, some)
                n_keys = len(some) * (n_rows + 1)
                found = added_rows(n_keys, key.flatten(), rows[samples].flatten(0, 1))
                return found.view(len(some), n_rows + 1, -1)[:, :n_rows].flatten(1)

            return of_table
        is_left = outer[0].fixed_is_left
        left = self._side(outer, None if is_left else gradients, left=True)
        right = self._side(outer, gradients if is_left else None, left=False)
        return lambda samples: (left[samples] @ right[samples]).flatten(1)

    def _placed(self, values: Tensor) -> Tensor:
        return values if self.place is None else values.index_select(1, self.place)

    def _arranged(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Arrange rows (rows, ...) by sample: (n, rows of a sample, ...)."""
        pairs = zip(self.arranged, parts, strict=True)
        return [arranged(part).to(self.work) for arranged, part in pairs]

    def _features_first(self, parts: Sequence[Tensor]) -> Tensor:
        """Lay (rows, features, positions) out as (n, features, all positions)."""
        laid = [
            part[:, 0] if part.shape[1] == 1 else part.transpose(1, 2).flatten(2)
            for part in self._arranged(parts)
        ]
        return laid[0] if len(laid) == 1 else torch.cat(laid, 2)

    def _side(self, outer: Sequence[Outer], gradients: Gradients | None, *, left: bool) -> Tensor:
        """Lay all features of a side out.

        (n, groups, left, positions) or (n, groups, positions, right).
        """
        first = outer[0]
        if gradients is None:
            parts = [form.fixed(None) for form in outer]
        else:
            parts = [form.moving(g, None) for form, g in zip(outer, gradients, strict=True)]
        if left:
            grouped: Tensor = self._features_first(parts).unflatten(1, (first.groups, first.left))
            return grouped
        laid = [part.transpose(2, 3).flatten(1, 2) for part in self._arranged(parts)]
        whole = laid[0] if len(laid) == 1 else torch.cat(laid, 1)
        grouped = whole.unflatten(2, (first.groups, first.right)).transpose(1, 2)
        # A plain product is faster than a transposed one.
        return grouped.contiguous()

    def _blocks(self, parts: Sequence[Tensor]) -> Tensor:
        laid = [part.flatten(1, 2) for part in self._arranged(parts)]
        whole = laid[0] if len(laid) == 1 else torch.cat(laid, 1)
        return whole.transpose(1, 2).contiguous()

    def _sums(self, *, absolute: bool = False) -> Callable[[Gradients], Tensor]:
        """Prepare for gradients: each gives (n, numel of the operand)."""
        forms = [form for form in self.forms if isinstance(form, Sum)]
        factors = [None if f.factor is None else self.budget.hold(f.factor) for f in forms]

        def add(gradients: Gradients) -> Tensor:
            total: Tensor | None = None
            for form, arranged, factor, g in zip(
                forms, self.arranged, factors, gradients, strict=True
            ):
                g = form.view(g).to(self.work)
                g = g if factor is None else g * factor().to(self.work)
                g = arranged(g.abs() if absolute else g)
                others = [size for axis, size in enumerate(form.shape) if axis != arranged.axis]
                axes = [1, *(2 + i for i, size in enumerate(others) if size == 1)]
                found = g.sum(axes).reshape(len(g), -1)
                scale = abs(form.scale) if absolute else form.scale
                found = found if scale == 1 else found * scale
                total = found if total is None else total + found
            assert total is not None
            return total

        return add

    def _ids(self, tables: Sequence[Table]) -> Tensor:
        pairs = zip(self.arranged, (form.ids for form in tables), strict=True)
        # Where a sample has fewer rows, an arrangement fills up with zeros.
        return torch.cat([arranged(ids + 1) - 1 for arranged, ids in pairs if ids is not None], 1)

    def _rows_of_tables(self, tables: Sequence[Table], gradients: Gradients) -> Tensor:
        parts = [form.moving(g, None)[..., 0] for form, g in zip(tables, gradients, strict=True)]
        return torch.cat(self._arranged(parts), 1)

    def _squares_of_table(self, tables: Sequence[Table]) -> Callable[[Gradients], Tensor]:
        # Equal rows of a sample are added up first, then squared, then added over samples.
        ids, n_rows = self._ids(tables), tables[0].left
        sample = torch.arange(len(ids), device=ids.device)[:, None]
        whole = sample * (n_rows + 1) + torch.where(ids < 0, n_rows, ids)
        key, number = torch.unique(whole, return_inverse=True)
        row = key % (n_rows + 1)

        def square(gradients: Gradients) -> Tensor:
            rows = self._rows_of_tables(tables, gradients).flatten(0, 1)
            sums = added_rows(len(key), number.flatten(), rows)
            return added_rows(n_rows + 1, row, sums.square_())[:n_rows].flatten()

        return square


def _all(which: Tensor, form: Outer, left: bool) -> Tensor | None:
    """Give None where the features that occur are all there are."""
    size = form.groups * (form.left if left else form.right)
    return None if len(which) == size else which


def squares_of_parameter(
    parts: Sequence[Part], gradients: Sequence[Gradients], n: int, numel: int
) -> Tensor:
    """Sum squares over samples where several parts must be added up first.

    Parameters
    ----------
    parts : sequence of Part
        Of all entries of the parameter.
    gradients : sequence of Gradients
        For each.
    n, numel : int
        Numbers of samples and of entries.

    Returns
    -------
    Tensor of shape (numel,)
    """
    given = [part.dense(g) for part, g in zip(parts, gradients, strict=True)]
    total: Tensor | None = None
    step = max(1, _CHUNK // numel)
    for start in range(0, n, step):
        some = None
        for part, dense in zip(parts, given, strict=True):
            values = spread(part, part._placed(dense(slice(start, start + step))), numel)
            some = values if some is None else some + values
        assert some is not None
        squares = some.square().sum(0)
        total = squares if total is None else total + squares
    assert total is not None
    return total


def spread(part: Part, values: Tensor, numel: int) -> Tensor:
    """Bring values at a part's places, (n, places), to the parameter's entries, (n, numel)."""
    if part.which is None:
        return values
    return added_rows(numel, part.which, values.T).T
