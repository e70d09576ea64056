"""Candidates of a greedy selection, in blocks: wherever a share of the pool lies.

The greedy loop asks a block for its best candidates and for the embedding of one of them, and
hands it updates; it never sees a block's embedding as a whole. `selection` has the formulas.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

# So many updates run in float64, and so does the start. As a rule gains fall by orders of
# magnitude in the first steps, whose float32 errors would be large beside the gains that follow.
CAREFUL = 6


@dataclass(frozen=True)
class Update:
    """What one step changes, for every candidate; the list of them is the whole history.

    Attributes
    ----------
    position : int
        Position in the pool of the sample that is taken out of the candidates.
    u : Tensor of shape (k, r), float64, or float32 after the first `CAREFUL`
        U in the module's formulas.
    t : Tensor of the same shape and dtype
        T in the module's formulas.
    """

    position: int
    u: Tensor
    t: Tensor

    @property
    def n_bytes(self) -> int:
        """Size of the tensors.

        Returns
        -------
        int
            In bytes.
        """
        return self.u.nbytes + self.t.nbytes

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Update:
        """Give the update on another device, or in another precision.

        Parameters
        ----------
        device : torch.device or str
            The device.
        dtype : torch.dtype, optional
            None: as it is.

        Returns
        -------
        Update
            The same there.
        """
        return Update(self.position, self.u.to(device, dtype), self.t.to(device, dtype))


@dataclass(frozen=True)
class Step:
    """A pick that may still turn out wrong, as the candidates see it.

    Attributes
    ----------
    update : Update
        What it changes.
    exact : sequence of ExactState, default=()
        States computed afresh on the way to it, as they are before the update.
    gain : float, default=inf
        A candidate whose gain may reach this before the update makes the pick wrong.
    """

    update: Update
    exact: Sequence[ExactState] = field(default=())
    gain: float = math.inf


@dataclass(frozen=True)
class Candidates:
    """Candidates in the order of falling ``gains + errors``, equal ones by position.

    Attributes
    ----------
    positions : Tensor of shape (m,), int64
        Positions in the pool.
    gains : Tensor of shape (m,), float64
        Their gains, as far as the block knows them.
    errors : Tensor of shape (m,), float64
        How far each gain may be off.
    """

    positions: Tensor
    gains: Tensor
    errors: Tensor


@dataclass(frozen=True)
class Start:
    """The two matrices that give every candidate its first A and B.

    Attributes
    ----------
    inverse : Tensor of shape (k, k), float64, or float
        M_0^-1; a float stands for that multiple of the identity.
    target : Tensor of shape (k, k), float64
        M_0^-1 F M_0^-1.
    """

    inverse: Tensor | float
    target: Tensor


@dataclass(frozen=True)
class ExactState:
    """A candidate's state at some step, computed afresh in float64.

    Attributes
    ----------
    position : int
        Position in the pool.
    gain : float
        Decrease of tr(M^-1 F) if it is taken.
    error : float
        How far the gain may be off.
    error_a, error_b : float
        How far A and B may be off, in the Frobenius norm.
    a, b : Tensor of shape (r, r)
        A and B.
    """

    position: int
    gain: float
    error: float
    error_a: float
    error_b: float
    a: Tensor
    b: Tensor


class CandidateBlock(Protocol):
    """A share of the pool, wherever its embedding lies: all that the greedy loop asks for.

    An update is small and the updates are the whole history, so a lost block is made again
    from its embedding, the same start and the updates so far.
    """

    def __contains__(self, position: int) -> bool:
        """Say whether the sample at this position of the pool is one of the block's."""

    def best(self, count: int, aside: Sequence[int] = ()) -> Candidates:
        """Give the candidates that may have the largest gains.

        Parameters
        ----------
        count : int
            At most so many.
        aside : sequence of int, default=()
            Positions to leave out; those of other blocks are ignored.

        Returns
        -------
        Candidates
            Those with the largest ``gains + errors``, samples already taken left out.
        """

    def likely(self, count: int) -> Candidates:
        """Give candidates that may have the largest gains, without a search.

        Parameters
        ----------
        count : int
            At most so many.

        Returns
        -------
        Candidates
            As `best` does, or nearly; at least one, if there is one.
        """

    def subset(self, positions: Sequence[int]) -> CandidateBlock:
        """Give a few candidates, as they stand, as a block of their own.

        Parameters
        ----------
        positions : sequence of int
            Positions in the pool, ascending.

        Returns
        -------
        CandidateBlock
            In memory, and independent of this one.
        """

    def fetch(self, positions: Sequence[int]) -> None:
        """Make ready to be asked for the rows of some candidates, taken ones too.

        Parameters
        ----------
        positions : sequence of int
            Positions in the pool; those of other blocks are ignored.
        """

    def rows(self, position: int) -> Tensor:
        """Give the embedding of one sample.

        Parameters
        ----------
        position : int
            Position in the pool.

        Returns
        -------
        Tensor of shape (r, k), float64
        """

    def correct(self, exact: ExactState) -> None:
        """Replace a candidate's A and B by those computed afresh in float64.

        Parameters
        ----------
        exact : ExactState
            The candidate's state, after the updates applied so far.
        """

    def advance(self, updates: Sequence[Update]) -> None:
        """Apply updates for good, before the block is next asked for anything.

        Parameters
        ----------
        updates : sequence of Update
            In their order. The samples that they take are left out from then on.
        """

    def attempt(self, steps: Sequence[Step], aside: Sequence[int]) -> Tensor:
        """Apply steps until :meth:`keep` says how many of them were right.

        Parameters
        ----------
        steps : sequence of Step
            In their order.
        aside : sequence of int
            Positions not to look at for the result, those that the steps take among them.

        Returns
        -------
        Tensor of shape (len(steps) + 1,), float64
            The largest ``gains + errors`` of the other candidates, before the first step and
            after each; minus infinity where there are none.
        """

    def keep(self, count: int) -> None:
        """Take back all but the first `count` steps of the last attempt.

        Parameters
        ----------
        count : int
            How many were right.
        """
