"""Sums over positions of products of features: the arithmetic of the rules."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# A batched product is so much faster per multiply-add than gathering both factors.
_PRODUCT_ADVANTAGE = 32
# Temporaries are kept under about so many numbers ...
_CHUNK = 1 << 24
# ... and on a CPU, where squares are summed while the products are in the cache, under so many.
_CACHED = 1 << 19
# Products of so many numbers are made sample by sample there.
_LARGE = 1 << 16


@dataclass(frozen=True)
class Pairs:
    """Pairs of a left and a right feature.

    Attributes
    ----------
    left, right : Tensor of int64
        The features that occur, increasing.
    i, j : Tensor of int64
        Of each pair, the places of its features in these.
    """

    left: Tensor
    right: Tensor
    i: Tensor
    j: Tensor

    @classmethod
    def of(cls, place: Tensor, groups: int, left: int, right: int, device: torch.device) -> Pairs:
        """Find the features of places in (groups, left, right), on the CPU; move them.

        Features are counted through all groups.
        """
        group = place // (left * right)
        lefts, i = torch.unique(group * left + place // right % left, return_inverse=True)
        rights, j = torch.unique(group * right + place % right, return_inverse=True)
        return cls(*(t.to(device) for t in (lefts, rights, i, j)))


def sums_of_pairs(left: Tensor, right: Tensor, pairs: Pairs) -> Tensor:
    """Sum left[:, i] * right[:, j] over positions.

    Parameters
    ----------
    left, right : Tensor of shape (n, features that occur, positions)
        The factors.
    pairs : Pairs
        Which to multiply.

    Returns
    -------
    Tensor of shape (n, number of pairs)
    """
    n, n_left, length = left.shape
    n_right, i, j = right.shape[1], pairs.i, pairs.j
    if length == 1:
        return left[:, :, 0].index_select(1, i).mul_(right[:, :, 0].index_select(1, j))
    if n_left * n_right <= _PRODUCT_ADVANTAGE * len(i):
        return torch.bmm(left, right.mT).flatten(1).index_select(1, i * n_right + j)
    step = max(1, _CHUNK // (n * length))
    parts = zip(i.split(step), j.split(step), strict=True)
    return torch.cat(
        [left.index_select(1, a).mul_(right.index_select(1, b)).sum(2) for a, b in parts], 1
    )


def squares_of_products(left: Tensor, right: Tensor) -> Tensor:
    """Sum (left @ right)^2 over samples.

    Parameters
    ----------
    left : Tensor of shape (n, groups, a, positions)
        One factor.
    right : Tensor of shape (n, groups, positions, b)
        The other one.

    Returns
    -------
    Tensor of shape (groups, a, b)
    """
    n, groups, a, length = left.shape
    b = right.shape[3]
    if length == 1:
        return torch.einsum("nga,ngb->gab", left[..., 0].square(), right[:, :, 0].square())
    total = left.new_zeros(groups, a, b)
    if left.is_cpu and a * b >= _LARGE:
        step = max(1, _CACHED // b)
        buffer = left.new_empty(min(a, step), b)
        for group in range(groups):
            for some, into in zip(
                left[:, group].split(step, 1), total[group].split(step), strict=True
            ):
                block = buffer[: len(into)]
                for x, y in zip(some, right[:, group], strict=True):
                    into.addcmul_(torch.mm(x, y, out=block), block)
        return total
    step = min(n, max(1, (_CACHED if left.is_cpu else _CHUNK) // (groups * a * b)))
    buffer = left.new_empty(step * groups, a, b)
    for x, y in zip(left.split(step), right.split(step), strict=True):
        block = buffer[: len(x) * groups]
        torch.bmm(x.flatten(0, 1), y.flatten(0, 1), out=block).square_()
        total += block.view(len(x), *total.shape).sum(0)
    return total


def added_rows(n: int, index: Tensor, rows: Tensor) -> Tensor:
    """Add rows at their indices, in an order that is always the same.

    Parameters
    ----------
    n : int
        Length of the result.
    index : Tensor of shape (rows,)
        Where each is added.
    rows : Tensor of shape (rows, ...)
        What is added.

    Returns
    -------
    Tensor of shape (n, ...)
    """
    total = rows.new_zeros(n, *rows.shape[1:])
    # On a GPU index_add adds in any order.
    if rows.is_cpu:
        return total.index_add_(0, index, rows)
    return total.index_put_((index,), rows, accumulate=True)
