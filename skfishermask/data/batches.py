"""The inputs of a net, batch by batch, in the order of the rows."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import skorch
import torch
from skorch.utils import to_tensor
from torch.utils.data import DataLoader, Subset

from skfishermask.data.diagnostics import integers_hint, odd_sample
from skfishermask.data.logits import not_finite
from skfishermask.data.net import has_own_dataset
from skfishermask.data.rows import take_rows
from skfishermask.data.samples import as_rows, check_finite, inputs_of
from skfishermask.data.types import Data, SampleRole, UserValue
from skfishermask.jacobian import (
    Inputs,
    NonFiniteGradientError,
    NonFiniteOutputError,
    ToOutputs,
    batch_length,
)

# What decides which rows come, and in which order: the user's choice is not asked.
_ORDER = ("batch_size", "shuffle", "sampler", "batch_sampler", "drop_last", "generator")
# Samples of the first batch, at most, on which what is read is compared with predictions.
N_COMPARED = 16
# Stands for the end of an iterator.
_NO_BATCH = object()


def _dataset(net: skorch.NeuralNet, X: Data) -> Data:
    dataset = net.get_dataset(X)
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise TypeError(
            f"Expected a dataset with a length and indexing, found {type(dataset).__name__}."
        )
    return dataset


class NetBatches:
    """The inputs of a net, batch by batch, in the order of the rows: readable again.

    The net's own dataset, collate function and workers are used; its order is not. X is what the
    net takes in ``predict``; without `rows` all are read, without a `batch_size` in the net's own.
    """

    def __init__(
        self,
        net: skorch.NeuralNet,
        X: Data,
        rows: np.ndarray | None = None,
        batch_size: int | None = None,
        role: SampleRole = SampleRole.POOL,
    ) -> None:
        self._net = net
        self._whole = _dataset(net, X)
        self.role, self.rows = role, np.arange(len(self._whole)) if rows is None else rows
        self._dataset = self._whole if rows is None else Subset(self._whole, rows.tolist())
        size = self.size_of(net, batch_size)
        self._size = len(self._dataset) if size == -1 else size
        self._options = net.get_params_for("iterator_valid")

    @staticmethod
    def size_of(net: skorch.NeuralNet, batch_size: int | None) -> int:
        """Return the number of samples in a batch; -1 stands for all there are."""
        options = net.get_params_for("iterator_valid")
        size: int = batch_size or options.get("batch_size", net.batch_size)
        return size

    def __len__(self) -> int:
        """Return the number of batches."""
        return -(-len(self._dataset) // self._size)

    def __iter__(self) -> Iterator[Inputs]:
        """Yield tensors on the net's device, what its module's forward takes first."""
        n_rows = len(self.rows)
        if n_rows == 0:
            return
        iterator = iter(self._loader())
        has_own_sizes = has_own_iterator(self._net)
        start = number = 0
        while start < n_rows:
            rows = self.rows[start : start + self._size]
            # PyTorch warns of arrays that it cannot write to, such as a memory map opened to read.
            # Nothing writes to them here.
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
                try:
                    batch = next(iterator, _NO_BATCH)
                except Exception as error:
                    if note := odd_sample(self._whole, rows, self.role.argument):
                        error.add_note(note)
                    raise
            if batch is _NO_BATCH:
                raise self._wrong_length(number, rows, "no batch")
            inputs = to_tensor(inputs_of(batch), self._net.device)
            n = batch_length(inputs)
            if n > n_rows - start or (n != len(rows) and not has_own_sizes):
                raise self._wrong_length(number, rows, str(n))
            yield inputs
            start, number = start + n, number + 1
        if next(iterator, _NO_BATCH) is not _NO_BATCH:
            raise self._wrong_length(number, self.rows[:0], "one more batch")

    def _wrong_length(self, number: int, rows: np.ndarray, given: str) -> ValueError:
        where = f" (row {rows[0]} to row {rows[-1]})" if len(rows) else ""
        return ValueError(
            f"Expected {len(rows)} samples in batch {number} of {self.role.argument}{where}, found "
            f"{given}: all later samples would be taken for others. The Dataset and the net's "
            "collate function must give each sample they are asked for. What cannot be read must "
            "be left out of the Dataset, as by torch.utils.data.Subset."
        )

    def _loader(self) -> UserValue:
        """Return the net's own iterator over the rows, in their order."""
        net = self._net
        if not has_own_iterator(net):
            return net.iterator_valid(
                self._dataset,
                batch_size=self._size,
                shuffle=False,
                # The loader seeds its workers from here, not from the global random state.
                generator=torch.Generator().manual_seed(0),
                **{k: v for k, v in self._options.items() if k not in _ORDER},
            )
        if type(net).get_iterator is not skorch.NeuralNet.get_iterator:
            return net.get_iterator(self._dataset, training=False)
        return net.iterator_valid(self._dataset, **(self._options | {"batch_size": self._size}))


def has_own_iterator(net: skorch.NeuralNet) -> bool:
    """Return whether the net makes its batches by something else than a DataLoader."""
    own = net.iterator_valid
    is_loader = isinstance(own, type) and issubclass(own, DataLoader)
    return not is_loader or type(net).get_iterator is not skorch.NeuralNet.get_iterator


class NetSamples:
    """Samples in any container that a net takes in ``predict``, as it sees them."""

    def __init__(
        self, net: skorch.NeuralNet, X: Data, role: SampleRole, batch_size: int | None = None
    ) -> None:
        self.role = role
        self._net, self._batch_size = net, batch_size
        self._X = as_rows(X, role.argument, has_own_dataset=has_own_dataset(net))
        self._n = len(_dataset(net, self._X))

    def __len__(self) -> int:
        return self._n

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of a sample; () where there are no arrays to tell."""
        return tuple(self._X.shape[1:]) if isinstance(self._X, np.ndarray | torch.Tensor) else ()

    def check_finite(self) -> None:
        """Raise ValueError at NaN or infinity, where they are not the user's dataset's affair."""
        if not has_own_dataset(self._net) or isinstance(self._X, np.ndarray | torch.Tensor):
            check_finite(self._X, self.role.argument)

    def head(self, n: int) -> tuple[Data, NetBatches]:
        """Return the first samples, as the net's ``predict`` takes them, and their batches."""
        asked = [NetBatches.size_of(self._net, size) for size in (self._batch_size, None)]
        rows = np.arange(min(n, len(self), *(size for size in asked if size > 0)))
        return take_rows(self._X, rows), self.batches(rows)

    def batches(self, rows: np.ndarray | None = None) -> NetBatches:
        """Return some rows, ascending, or all."""
        return NetBatches(self._net, self._X, rows, self._batch_size, self.role)


@contextmanager
def naming_rows(batches: NetBatches, to_logits: ToOutputs) -> Iterator[None]:
    """Turn the count of samples read into a row of the user's data, in messages."""
    try:
        yield
    except NonFiniteOutputError as error:
        raise not_finite(batches.rows[error.row], batches.role, to_logits) from error
    except NonFiniteGradientError as error:
        raise ValueError(
            f"The network's gradients are NaN or infinite for row {batches.rows[error.row]} of "
            f"{batches.role.argument}, though its output is finite. Dividing by zero, the root of "
            "zero, or attention in which all positions are masked, does that."
        ) from error
    except IndexError as error:
        read = [batch for batch in batches if isinstance(batch, torch.Tensor)]
        if read and (hint := integers_hint(torch.cat(read), batches.role.argument, batches.rows)):
            raise ValueError(
                f"The network cannot read {batches.role.argument}: {error}. {hint}"
            ) from error
        raise
