"""Embeddings at a linear layer that makes the outputs, from its input and the rows of R alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from skfishermask.selection.linalg import Product, QuadraticForm
from skfishermask.selection.rounding import product_error
from skfishermask.selection.storage import StoredEmbedding


class HeadEmbedding(StoredEmbedding):
    """Embeddings V with columns that are one feature of the sample times one column of R(x).

    The `packed` ones, (n, 1, d + r C), hold features beside R(x), (r, C). Of each column `columns`,
    (2, k), has the output and the feature; here they are sorted by both. V is what the stored
    numbers say, without rounding, and is formed for few samples at a time.
    """

    def __init__(self, packed: StoredEmbedding, columns: Tensor, r: int, n_outputs: int) -> None:
        super().__init__((len(packed), r, columns.shape[1]), packed.dtype, packed.device)
        self.storage_name = packed.storage_name
        self._packed, self._n_features = packed, packed.shape[2] - r * n_outputs
        columns = columns[:, (columns[0] * self._n_features + columns[1]).argsort()]
        # The outputs with columns, and of each column the place of its output among these.
        kept, places, counts = torch.unique(columns[0], return_inverse=True, return_counts=True)
        self._outputs, self._places, self._features = (
            index.to(packed.device) for index in (kept, places, columns[1])
        )
        stops = counts.cumsum(0)
        # Of each of these outputs the first column, and the one after its last.
        self._spans = [*zip((stops - counts).tolist(), stops.tolist(), strict=True)]

    @property
    def n_bytes(self) -> int:
        return self._packed.n_bytes

    @property
    def is_fetched(self) -> bool:
        return self._packed.is_fetched

    def write(self, start: int, values: Tensor) -> None:
        """Write features beside rows of R(x) of the samples from `start` on."""
        self._packed.write(start, values)

    def columns(self, start: int, stop: int) -> Tensor:
        return self._dense(self._packed.columns(0, self._packed.shape[2]), slice(start, stop))

    def take(self, rows: Tensor | Sequence[int]) -> Tensor:
        return self._dense(self._packed.take(rows))

    def _read(self, chunks: Sequence[slice]) -> Iterator[Tensor]:
        return map(self._dense, self._packed._read(chunks))

    def _dense(self, packed: Tensor, some: slice = slice(None)) -> Tensor:
        """Form embeddings, in float64, in which products of float32 numbers are exact."""
        features, rows = self._unpacked(packed.double())
        return rows[:, :, self._places[some]] * features[:, None, self._features[some]]

    def _unpacked(self, packed: Tensor) -> tuple[Tensor, Tensor]:
        """Return features, (m, d), and R at the outputs with columns, (m, r, C)."""
        d, r = self._n_features, self.shape[1]
        rows = packed[:, 0, d:].unflatten(1, (r, -1)).index_select(2, self._outputs)
        return packed[:, 0, :d], rows

    def _factors(self, dtype: torch.dtype | None) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield slices of samples, their features at all columns, (k, m), and R, (m, r, C)."""
        for chunk, packed in self._packed.chunks(dtype):
            features, rows = self._unpacked(packed)
            yield chunk, features.T.contiguous().index_select(0, self._features), rows

    def _sums(self, values: Tensor) -> Tensor:
        """Sum the rows of some columns, the first ones, over those of each output."""
        sums = values.new_zeros(len(self._outputs), values.shape[1])
        return sums.index_add_(0, self._places[: len(values)], values)

    def information(self, most_rows: int) -> Iterator[tuple[int, Iterator[Product]]]:
        for _, x, rows in self._factors(None):
            for features, some in zip(x.split(most_rows, 1), rows.split(most_rows), strict=True):
                yield len(some), self._information(features, some.permute(2, 1, 0).contiguous())

    def _information(self, x: Tensor, rows: Tensor) -> Iterator[Product]:
        for c, (a, b) in enumerate(self._spans):
            of_pairs = (rows[c:] * rows[c]).sum(1)
            left = of_pairs.index_select(0, self._places[a:] - c).mul_(x[a:])
            yield a, b, left.T, x[a:b].T

    def quadratic_forms(
        self, forms: Sequence[QuadraticForm]
    ) -> Iterator[tuple[slice, Tensor, list[tuple[Tensor, Tensor]]]]:
        for chunk, x, rows in self._factors(torch.float64):
            sizes = self._sums(x.square()).T
            norms = (rows.square().sum(1) * sizes).sum(1).sqrt()
            yield chunk, norms, [self._quadratic_form(form, x, rows, sizes) for form in forms]

    def _quadratic_form(
        self, form: QuadraticForm, x: Tensor, rows: Tensor, sizes: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return R S R^T, where S has x Q x^T of each two outputs, and a bound of its error.

        The `sizes`, (m, C), are squares of those of x. Errors of the entries of S add up as
        squares; of each, x Q is summed up, times x, and times R.
        """
        half = form.half
        if not isinstance(half, Tensor):
            value = (rows * (half * sizes)[:, None]) @ rows.mT
            bound = half * (rows.square().sum(1) * sizes).sum(1)
        else:
            of_outputs = rows.permute(2, 1, 0).contiguous()
            partial, product = torch.empty_like(of_outputs), torch.empty_like(x)
            for c, (a, b) in enumerate(self._spans):
                torch.mm(half[a:b, :b].T, x[a:b], out=product[:b])
                of_pairs = self._sums(product[:b].mul_(x[:b]))[: c + 1]
                torch.sum(of_outputs[: c + 1] * of_pairs[:, None], 0, out=partial[c])
            value = partial.permute(2, 1, 0) @ rows.mT
            value = value + value.mT
            squares = self._sums(self._sums(half.square()).T)
            weights = rows.square().sum(1) * sizes
            bound = 2 * ((weights @ squares) * weights).sum(1).sqrt()
        return value, product_error(bound, 3 * bound, len(x), x.dtype)

    def products(self, factors: Tensor) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        # Those of single outputs may cancel. They are sums of this many terms, and summed again.
        n_terms = 4 + max(b - a for a, b in self._spans)
        for chunk, x, rows in self._factors(factors.dtype):
            of_outputs = x.new_empty(len(rows), len(self._spans), factors.shape[1])
            for c, (a, b) in enumerate(self._spans):
                torch.mm(x[a:b].T, factors[a:b], out=of_outputs[:, c])
            products, weights = rows @ of_outputs, rows.square().sum(1, keepdim=True)
            yield chunk, products, n_terms * (weights @ of_outputs.square_())[:, 0]
