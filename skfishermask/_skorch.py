"""Reading a skorch net: its inputs in order, and its output as logits."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import skorch
import torch
from sklearn.base import is_classifier
from skorch.utils import to_tensor
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from skfishermask.fisher import Batch, NonFiniteOutputError, ToLogits, first_output

# What decides which rows come, and in which order: the user's choice is not asked.
_ORDER = ("batch_size", "shuffle", "sampler", "batch_sampler", "drop_last", "generator")


def is_net(estimator: object) -> bool:
    """Tell whether this is a skorch net."""
    return isinstance(estimator, skorch.NeuralNet)


def is_binary(estimator: object) -> bool:
    """Tell whether this is a skorch net with a single output for two classes."""
    return isinstance(estimator, skorch.NeuralNetBinaryClassifier)


def check_net(net: skorch.NeuralNet) -> None:
    """Raise NotFittedError or TypeError unless the net is an initialized classifier."""
    if not is_classifier(net):
        raise TypeError(
            "Expected a skorch classifier (NeuralNetClassifier or NeuralNetBinaryClassifier), "
            f"found {type(net).__name__}."
        )
    net.check_is_fitted(["module_", "criterion_"])
    criterion = _criterion(net)
    binary = is_binary(net)
    multilabel = (nn.MultiLabelMarginLoss, nn.MultiLabelSoftMarginLoss)
    if isinstance(criterion, nn.BCELoss | nn.BCEWithLogitsLoss) and not binary:
        raise TypeError(
            f"{type(net).__name__} with {type(criterion).__name__} is a multi-label classifier, "
            "expected one label a sample (for two classes: NeuralNetBinaryClassifier)."
        )
    if isinstance(criterion, multilabel):
        raise TypeError(
            f"{type(criterion).__name__} is a multi-label loss, expected one label a sample."
        )


def _criterion(net: skorch.NeuralNet) -> nn.Module:
    # torch.compile wraps the criterion as well.
    criterion: nn.Module = getattr(net.criterion_, "_orig_mod", net.criterion_)
    return criterion


def _binary_logits(output: Any) -> Tensor:
    z = first_output(output)
    z = z.reshape(len(z))
    return torch.stack([torch.zeros_like(z), z], dim=1)


def to_logits_of(net: skorch.NeuralNet) -> ToLogits:
    """Find how a net's raw output becomes logits (n, C).

    Parameters
    ----------
    net : skorch classifier
        Initialized.

    Returns
    -------
    callable
        Output of ``net.module_`` -> logits. Where the criterion takes logits, they are used as
        they are; else the net's own ``predict_nonlinearity`` gives probabilities, and their
        logarithm is what is needed, since a softmax undoes it.
    """
    if net.predict_nonlinearity == "auto":
        if isinstance(_criterion(net), nn.CrossEntropyLoss):
            return first_output
        if isinstance(_criterion(net), nn.BCEWithLogitsLoss):
            return _binary_logits
    nonlinearity = net._get_predict_nonlinearity()
    binary = is_binary(net)

    def log_probabilities(output: Any) -> Tensor:
        output = first_output(output)
        p: Tensor = nonlinearity(output.reshape(len(output)) if binary else output)
        # Written so that NaN passes: it is reported with its row, elsewhere.
        if (p.detach() < 0).any() or ((p.detach().sum(-1) - 1).abs() > 0.01).any():
            raise ValueError(
                f"With {type(_criterion(net)).__name__}, {type(net).__name__} expects the module "
                "to output probabilities that sum to one (or a predict_nonlinearity that makes "
                f"them), found values from {float(p.min()):.3g} to {float(p.max()):.3g}. For a "
                "module that outputs logits, the criterion is CrossEntropyLoss."
            )
        # p (d log p) has the limit zero where p underflows.
        return p.clamp_min(torch.finfo(p.dtype).tiny).log()

    return log_probabilities


# Parts of a net that only training uses, and that may be large or unable to travel.
_TRAINING = ("callbacks", "callbacks_", "history_", "_optimizers", "train_split")


def luggage(net: skorch.NeuralNet) -> tuple[type, dict[str, Any]]:
    """Take what reading a net needs out of it, to travel to another process.

    Parameters
    ----------
    net : skorch classifier
        Initialized; left as it is.

    Returns
    -------
    kind : type
        Of the net.
    parts : dict
        Its attributes, with copies of its modules on the CPU.
    """
    parts = dict(vars(net), device="cpu")
    for name in (*_TRAINING, *(key for key in parts if key.startswith("optimizer"))):
        parts.pop(name, None)
    for name, value in parts.items():
        if isinstance(value, nn.Module):
            # torch.compile wraps modules, and what it makes does not travel.
            parts[name] = copy.deepcopy(getattr(value, "_orig_mod", value)).cpu()
    return type(net), parts


def unpacked(kind: type, parts: dict[str, Any], device: str) -> skorch.NeuralNet:
    """Make a net again of what `luggage` gave, to read it.

    Parameters
    ----------
    kind : type
        Of the net.
    parts : dict
        Its attributes.
    device : str
        Where it shall compute.

    Returns
    -------
    skorch classifier
        It can be read, not trained.
    """
    net: skorch.NeuralNet = object.__new__(kind)
    vars(net).update(parts, device=device)
    for value in parts.values():
        if isinstance(value, nn.Module):
            value.to(device)
    return net


def n_samples(net: skorch.NeuralNet, X: Any) -> int:
    """Count the rows that the net sees in X."""
    return len(_dataset(net, X))


def _dataset(net: skorch.NeuralNet, X: Any) -> Any:
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
        X: Any,
        rows: np.ndarray | None = None,
        batch_size: int | None = None,
        name: str = "X",
    ) -> None:
        self._net = net
        dataset = _dataset(net, X)
        self.name, self.rows = name, np.arange(len(dataset)) if rows is None else rows
        self._dataset = dataset if rows is None else Subset(dataset, rows.tolist())
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

    def __iter__(self) -> Iterator[Batch]:
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
        while True:
            # PyTorch warns of arrays that it cannot write to, such as a memory map opened to read.
            # Nothing writes to them here.
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
                try:
                    batch = next(iterator)
                except StopIteration:
                    return
            yield to_tensor(_inputs(batch), self._net.device)


class _Numbered(Protocol):
    """Batches that know which rows of the user's data they hold."""

    name: str
    rows: np.ndarray

    @property
    def n_rows(self) -> int: ...


@contextmanager
def naming_rows(parts: Sequence[_Numbered]) -> Iterator[None]:
    """Turn the count of samples read into a row of the user's data, in messages."""
    try:
        yield
    except NonFiniteOutputError as error:
        row = error.row
        for part in parts:
            if row < part.n_rows:
                raise ValueError(
                    f"The network's output is NaN or infinite for row {part.rows[row]} of "
                    f"{part.name}."
                ) from error
            row -= part.n_rows
        raise


def _inputs(batch: Any) -> Any:
    """Take the inputs from what a loader gives: (X, y), or X alone."""
    if isinstance(batch, Mapping) or not isinstance(batch, list | tuple):
        return batch
    return batch[0]
