"""The inputs of a net, batch by batch, in the order of the rows."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import skorch
import torch
from skorch.utils import to_tensor
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils.data import DataLoader, Subset

from skfishermask.data.diagnostics import odd_sample
from skfishermask.data.logits import not_finite
from skfishermask.data.rows import as_rows, check_finite, inputs_of
from skfishermask.data.types import Data
from skfishermask.jacobian import Inputs, NonFiniteOutputError, ToOutputs, batch_length, seeded

# What decides which rows come, and in which order: the user's choice is not asked.
_ORDER = ("batch_size", "shuffle", "sampler", "batch_sampler", "drop_last", "generator")
# Stands for the end of an iterator.
_NO_BATCH = object()


class Batches(Protocol):
    """Inputs of a net, batch by batch, readable again.

    Attributes
    ----------
    name : str
        What messages call the user's data.
    rows : ndarray of int
        Which of their rows these are.
    """

    name: str
    rows: np.ndarray

    @property
    def n_rows(self) -> int:
        """Number of samples."""

    def __len__(self) -> int:
        """Give the number of batches."""

    def __iter__(self) -> Iterator[Inputs]:
        """Give tensors on the net's device, what its module's forward takes first."""


class Source(Protocol):
    """Samples that a net reads.

    Attributes
    ----------
    name : str
        What messages call them.
    """

    name: str

    def __len__(self) -> int:
        """Count the samples."""

    def first(self) -> Inputs:
        """Give the first sample alone."""

    def batches(self, rows: np.ndarray | None = None) -> Batches:
        """Give some rows, ascending, or all."""


def _dataset(net: skorch.NeuralNet, X: Data) -> Data:
    dataset = net.get_dataset(X)
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise TypeError(
            f"Expected a dataset with a length and indexing, found {type(dataset).__name__}."
        )
    return dataset


class NetBatches:
    """The inputs of a net, batch by batch, in the order of the rows: readable again.

    The net's own dataset, collate function and workers are used; its order is not.

    Parameters
    ----------
    net : skorch.NeuralNet
        The net.
    X : array-like, dict, or Dataset
        What the net takes in ``predict``.
    rows : array of int, optional
        Which rows, in which order. None: all.
    batch_size : int, optional
        None: the net's own.
    name : str
        What messages call X.
    """

    def __init__(
        self,
        net: skorch.NeuralNet,
        X: Data,
        rows: np.ndarray | None = None,
        batch_size: int | None = None,
        name: str = "X",
    ) -> None:
        self._net = net
        self._whole = _dataset(net, X)
        self.name, self.rows = name, np.arange(len(self._whole)) if rows is None else rows
        self._dataset = self._whole if rows is None else Subset(self._whole, rows.tolist())
        size = self.size_of(net, batch_size)
        self._size = len(self._dataset) if size == -1 else size
        options = net.get_params_for("iterator_valid")
        self._options = {k: v for k, v in options.items() if k not in _ORDER}

    @staticmethod
    def size_of(net: skorch.NeuralNet, batch_size: int | None) -> int:
        """Give the number of samples in a batch; -1 stands for all there are."""
        options = net.get_params_for("iterator_valid")
        size: int = batch_size or options.get("batch_size", net.batch_size)
        return size

    @property
    def n_rows(self) -> int:
        """Number of samples."""
        return len(self._dataset)

    def __len__(self) -> int:
        """Give the number of batches."""
        return -(-len(self._dataset) // self._size)

    def __iter__(self) -> Iterator[Inputs]:
        """Give tensors on the net's device, what its module's forward takes first."""
        if self.n_rows == 0:
            return
        own = self._net.iterator_valid
        loader = own if isinstance(own, type) and issubclass(own, DataLoader) else DataLoader
        batches = loader(
            self._dataset,
            batch_size=self._size,
            shuffle=False,
            # The loader seeds its workers from here, not from the global random state.
            generator=torch.Generator().manual_seed(0),
            **self._options,
        )
        iterator = iter(batches)
        for number in range(len(self)):
            rows = self.rows[number * self._size : (number + 1) * self._size]
            # PyTorch warns of arrays that it cannot write to, such as a memory map opened to read.
            # Nothing writes to them here.
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
                try:
                    batch = next(iterator, _NO_BATCH)
                except Exception as error:
                    if note := odd_sample(self._whole, rows, self.name):
                        error.add_note(note)
                    raise
            if batch is _NO_BATCH:
                raise self._wrong_length(number, rows, "no batch")
            inputs = to_tensor(inputs_of(batch), self._net.device)
            if (n := batch_length(inputs)) != len(rows):
                raise self._wrong_length(number, rows, str(n))
            yield inputs
        if next(iterator, _NO_BATCH) is not _NO_BATCH:
            raise self._wrong_length(len(self), self.rows[:0], "one more batch")

    def _wrong_length(self, number: int, rows: np.ndarray, found: str) -> ValueError:
        where = f" (row {rows[0]} to row {rows[-1]})" if len(rows) else ""
        return ValueError(
            f"Expected {len(rows)} samples in batch {number} of {self.name}{where}, found {found}: "
            "all later samples would be taken for others. The Dataset and the net's collate "
            "function must give each sample they are asked for. What cannot be read must be left "
            "out of the Dataset, as by torch.utils.data.Subset."
        )


class NetSamples:
    """Samples in whatever a user keeps them in, as a net sees them.

    Parameters
    ----------
    net : skorch.NeuralNet
        The net.
    X : array-like, dict or tuple of arrays, or Dataset
        What the net takes in ``predict``.
    name : str
        What messages call X.
    batch_size : int, optional
        None: the net's own.
    """

    def __init__(
        self, net: skorch.NeuralNet, X: Data, name: str, batch_size: int | None = None
    ) -> None:
        self.name = name
        self._net, self._X, self._batch_size = net, as_rows(X, name), batch_size
        self._n = len(_dataset(net, self._X))

    def __len__(self) -> int:
        return self._n

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of a sample; () where there are no arrays to tell."""
        return tuple(self._X.shape[1:]) if isinstance(self._X, np.ndarray | torch.Tensor) else ()

    def check_finite(self) -> None:
        """Raise ValueError at NaN or infinity."""
        check_finite(self._X, self.name)

    def first(self) -> Inputs:
        """Give the first sample alone; what a Dataset draws for it leaves no trace."""
        with seeded(0):
            return next(iter(self.batches(np.arange(1))))

    def batches(self, rows: np.ndarray | None = None) -> NetBatches:
        """Give some rows, ascending, or all."""
        return NetBatches(self._net, self._X, rows, self._batch_size, self.name)


def flat_inputs(batch: Inputs) -> Tensor | None:
    """Give the inputs of each sample in one row, (n, d); None where some are no real numbers."""
    if isinstance(batch, Tensor):
        return batch.reshape(len(batch), -1).float() if batch.is_floating_point() else None
    if not isinstance(batch, Mapping | list | tuple):
        return None
    several = batch.values() if isinstance(batch, Mapping) else batch
    parts = [flat_inputs(part) for part in several]
    flat = [part for part in parts if part is not None]
    return torch.cat(flat, 1) if flat and len(flat) == len(parts) else None


class UnitInputs:
    """Inputs of a net, each sample flat and of unit length, kept while its batches are read.

    Parameters
    ----------
    batches : iterable of Tensor, or of what else the net takes
        Given again by iterating.
    """

    def __init__(self, batches: Iterable[Inputs]) -> None:
        self._batches = batches
        self._parts: list[Tensor | None] = []

    def __iter__(self) -> Iterator[Inputs]:
        """Give the batches, and keep what is in them."""
        self._parts = []
        for batch in self._batches:
            flat = flat_inputs(batch)
            # A copy, before a network may change its inputs in place.
            self._parts.append(None if flat is None else normalize(flat))
            yield batch

    def together(self) -> Tensor | None:
        """Give what was read, (n, d) in float32; see :func:`in_one_length`."""
        return in_one_length(self._parts)


def in_one_length(parts: Sequence[Tensor | None]) -> Tensor | None:
    """Put parts (n, d) together; None where some are missing, or where they differ in d."""
    there = [part for part in parts if part is not None]
    is_one_length = len({part.shape[1] for part in there}) == 1
    return torch.cat(there) if is_one_length and len(there) == len(parts) else None


@contextmanager
def naming_rows(batches: Batches, to_logits: ToOutputs) -> Iterator[None]:
    """Turn the count of samples read into a row of the user's data, in messages."""
    try:
        yield
    except NonFiniteOutputError as error:
        raise not_finite(batches.rows[error.row], batches.name, to_logits) from error
