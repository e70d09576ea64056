"""Sums over positions of products of features: the arithmetic of the rules."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# How much faster per multiply-add a batched product is than gathering both factors, about.
_PRODUCT_ADVANTAGE = 32
# Temporary tensors are kept about this small ...
_CHUNK_NUMBERS = 1 << 24
# ... and on a CPU this small, where squares are summed while the products are in its cache.
_CPU_CACHE_NUMBERS = 1 << 19
# From this size on, the product of each sample is made by itself there.
_LARGE_PRODUCT_NUMBERS = 1 << 16


@dataclass(frozen=True)
class FeaturePairs:
    """Pairs of a left and a right feature."""

    left: Tensor  # features that occur, increasing
    right: Tensor  # the same
    i: Tensor  # of each pair, the position in `left`
    j: Tensor  # and in `right`

    @classmethod
    def at(
        cls, index: Tensor, groups: int, left: int, right: int, device: torch.device
    ) -> FeaturePairs:
        """Return the pairs at flat indices, on the CPU, of an operand (groups, left, right).

        Features are counted through all groups.
        """
        group = index // (left * right)
        lefts, i = torch.unique(group * left + index // right % left, return_inverse=True)
        rights, j = torch.unique(group * right + index % right, return_inverse=True)
        return cls(*(t.to(device) for t in (lefts, rights, i, j)))


def sums_of_pairs(left: Tensor, right: Tensor, pairs: FeaturePairs) -> Tensor:
    """Sum left[:, i] * right[:, j] over positions, for each pair: (n, pairs).

    Both factors are (n, features that occur, positions).
    """
    n, n_left, length = left.shape
    n_right, i, j = right.shape[1], pairs.i, pairs.j
    if length == 1:
        return left[:, :, 0].index_select(1, i).mul_(right[:, :, 0].index_select(1, j))
    if n_left * n_right <= _PRODUCT_ADVANTAGE * len(i):
        return torch.bmm(left, right.mT).flatten(1).index_select(1, i * n_right + j)
    step = max(1, _CHUNK_NUMBERS // (n * length))
    chunks = zip(i.split(step), j.split(step), strict=True)
    return torch.cat(
        [left.index_select(1, a).mul_(right.index_select(1, b)).sum(2) for a, b in chunks], 1
    )


def squares_of_products(left: Tensor, right: Tensor) -> Tensor:
    """Sum (left @ right)^2 over samples, (groups, a, b).

    The factors are (n, groups, a, positions) and (n, groups, positions, b).
    """
    n, groups, a, length = left.shape
    b = right.shape[3]
    if length == 1:
        return torch.einsum("nga,ngb->gab", left[..., 0].square(), right[:, :, 0].square())
    total = left.new_zeros(groups, a, b)
    if left.is_cpu and a * b >= _LARGE_PRODUCT_NUMBERS:
        step = max(1, _CPU_CACHE_NUMBERS // b)
        buffer = left.new_empty(min(a, step), b)
        for group in range(groups):
            chunks = zip(left[:, group].split(step, 1), total[group].split(step), strict=True)
            for chunk, chunk_total in chunks:
                block = buffer[: len(chunk_total)]
                for x, y in zip(chunk, right[:, group], strict=True):
                    chunk_total.addcmul_(torch.mm(x, y, out=block), block)
        return total
    step = min(
        n, max(1, (_CPU_CACHE_NUMBERS if left.is_cpu else _CHUNK_NUMBERS) // (groups * a * b))
    )
    buffer = left.new_empty(step * groups, a, b)
    for x, y in zip(left.split(step), right.split(step), strict=True):
        block = buffer[: len(x) * groups]
        torch.bmm(x.flatten(0, 1), y.flatten(0, 1), out=block).square_()
        total += block.view(len(x), *total.shape).sum(0)
    return total


def scatter_add_rows(n: int, index: Tensor, rows: Tensor) -> Tensor:
    """Add each row to the row of the result, (n, ...), at its index; in the same order always."""
    total = rows.new_zeros(n, *rows.shape[1:])
    # On a GPU index_add adds in any order.
    if rows.is_cpu:
        return total.index_add_(0, index, rows)
    return total.index_put_((index,), rows, accumulate=True)
