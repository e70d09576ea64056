"""Reading a skorch net: its inputs in order, what it infers, and that as logits."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import skorch
import torch
from sklearn.base import is_classifier
from sklearn.pipeline import Pipeline
from skorch.utils import to_tensor
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from skfishermask.fisher import (
    Batch,
    NonFiniteOutputError,
    ToLogits,
    first_output,
    predicted_probabilities,
)

# What decides which rows come, and in which order: the user's choice is not asked.
_ORDER = ("batch_size", "shuffle", "sampler", "batch_sampler", "drop_last", "generator")


def is_net(estimator: object) -> bool:
    """Tell whether this is a skorch net."""
    return isinstance(estimator, skorch.NeuralNet)


def is_binary(estimator: object) -> bool:
    """Tell whether this is a skorch net with a single output for two classes."""
    return isinstance(estimator, skorch.NeuralNetBinaryClassifier)


def check_no_module(estimator: object) -> None:
    """Raise TypeError at a torch module, or a class of them, that no skorch net is around."""
    while isinstance(estimator, Pipeline):
        estimator = estimator.steps[-1][1]
    if isinstance(estimator, nn.Module):
        found = f"{type(estimator).__name__}, a torch module"
    elif isinstance(estimator, type) and issubclass(estimator, nn.Module):
        found = f"{estimator.__name__}, a class of torch modules"
    else:
        return
    raise TypeError(
        f"Expected a skorch classifier, found {found}: wrap it, as in NeuralNetClassifier(module, "
        "criterion=torch.nn.CrossEntropyLoss), where its output is logits."
    )


@contextmanager
def explaining_labels(y: Any) -> Iterator[None]:
    """Say what a net, which fails at strings without a word about labels, expects of them."""
    try:
        yield
    except TypeError as error:
        names = [label for label in y if isinstance(label, str)] if hasattr(y, "__len__") else []
        if not names:
            raise
        raise TypeError(
            f"{str(error).rstrip('.')}. A skorch net takes class numbers from 0, but y has "
            f"{str(names[0])!r}: encode the labels (sklearn.preprocessing.LabelEncoder), "
            "or train FisherMaskSampler(net), which takes labels of any type."
        ) from error


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


class NetModule(nn.Module):
    """What a net computes, as a module: its forward is the net's own ``infer``.

    Made afresh for every query, and known to nobody else: the net stays as it is.

    Parameters
    ----------
    net : skorch.NeuralNet
        Initialized.
    criteria : sequence of str
        Attributes of the net that are criteria and that ``infer`` uses too.

    Notes
    -----
    It holds the net's modules: ``module_`` alone where ``infer`` is skorch's own, else all. Of one
    module, parameters have their names in there, ``"0.weight"``; of several, the name of the net's
    attribute goes before: ``"module_.0.weight"``, ``"head_.weight"``.
    """

    def __init__(self, net: skorch.NeuralNet, criteria: Sequence[str] = ()) -> None:
        super().__init__()
        self._net, self.criteria = net, tuple(criteria)
        modules = {name: getattr(net, name) for name in [*_modules_of(net), *criteria]}
        if len(modules) == 1:
            # An empty name adds nothing to those of parameters and modules inside.
            modules = {"": next(iter(modules.values()))}
        self._modules.update(modules)

    def forward(self, x: Any = None, /, **inputs: Any) -> Any:
        """Give what the net infers from a batch: from a dict, if there are keywords."""
        return self._net.infer(inputs or x)


class _EvaluatedNet(NetModule):
    """What a net predicts with: its forward is the net's own ``evaluation_step``."""

    def forward(self, x: Any = None, /, **inputs: Any) -> Any:
        # What a loader gives: the inputs, and labels, which skorch makes up in prediction.
        return self._net.evaluation_step((inputs or x, torch.zeros(1)), training=False)


class _TracedNet(NetModule):
    """Notes which criteria have parameters that the logits depend on.

    Attributes
    ----------
    used : list of str
        Their names, after a forward pass.
    """

    def __init__(self, net: skorch.NeuralNet, criteria: Sequence[str], to_logits: ToLogits) -> None:
        super().__init__(net, criteria)
        self._to_logits = to_logits
        self.used: list[str] = []

    def forward(self, x: Any = None, /, **inputs: Any) -> Any:
        with torch.enable_grad():
            for parameter in self.parameters():
                parameter.requires_grad_(True)
            output = super().forward(x, **inputs)
            total = self._to_logits(output).sum()
            for name in self.criteria:
                own = list(getattr(self, name).parameters())
                found = torch.autograd.grad(total, own, retain_graph=True, allow_unused=True)
                if any(gradient is not None for gradient in found):
                    self.used.append(name)
        return output


def _infers_as_skorch(net: skorch.NeuralNet) -> bool:
    own = getattr(net.infer, "__func__", None)
    return own in (skorch.NeuralNet.infer, skorch.NeuralNetBinaryClassifier.infer)


def _torch_parts(net: skorch.NeuralNet) -> list[str]:
    """Name the attributes of a net that are modules; skorch ends their names in "_"."""
    parts = [name for name, value in vars(net).items() if isinstance(value, nn.Module)]
    return [name for name in parts if name.endswith("_")]


def _modules_of(net: skorch.NeuralNet) -> list[str]:
    if _infers_as_skorch(net):
        return ["module_"]
    criteria = _criteria_of(net)
    return [name for name in _torch_parts(net) if name not in criteria]


def _criteria_of(net: skorch.NeuralNet) -> list[str]:
    names = [f"{name}_" for name in net._criteria]
    return [name for name in _torch_parts(net) if name in names]


def net_module(net: skorch.NeuralNet, batch: Batch, to_logits: ToLogits) -> NetModule:
    """Make the module that a query reads, having tried the net on a batch.

    Parameters
    ----------
    net : skorch classifier
        Initialized. It is left as it was.
    batch : tensor, list of tensors or dict of tensors
        A sample will do.
    to_logits : callable
        Maps what ``infer`` gives to logits.

    Returns
    -------
    NetModule
        With those criteria whose parameters the logits depend on, such as a margin loss that holds
        a weight for each class.

    Raises
    ------
    ValueError
        If an overridden ``evaluation_step`` predicts something else than ``infer`` gives.
    """
    if type(net).evaluation_step is not skorch.NeuralNet.evaluation_step:
        _check_evaluation_step(net, batch, to_logits)
    module = NetModule(net)
    if _infers_as_skorch(net):
        return module
    known = {id(p) for p in module.parameters()}
    criteria = [
        name
        for name in _criteria_of(net)
        if any(id(p) not in known for p in getattr(net, name).parameters())
    ]
    if not criteria:
        return module
    traced = _TracedNet(net, criteria, to_logits)
    predicted_probabilities(traced, [batch], to_logits=to_logits)
    return NetModule(net, traced.used)


def _check_evaluation_step(net: skorch.NeuralNet, batch: Batch, to_logits: ToLogits) -> None:
    """Raise ValueError unless the net predicts what it infers."""
    # Setting the mode, evaluation_step reaches the criteria too.
    criteria = _criteria_of(net)
    inferred: list[Any] = []

    def noting(output: Any) -> Tensor:
        inferred.append(output)
        return to_logits(output)

    def reading(output: Any) -> Tensor:
        # It may pick the logits out of what infer gives.
        picked = isinstance(output, Tensor) and not isinstance(inferred[0], Tensor | tuple)
        return output if picked else to_logits(output)

    p = predicted_probabilities(NetModule(net, criteria), [batch], to_logits=noting)
    try:
        evaluated = _EvaluatedNet(net, criteria)
        other = predicted_probabilities(evaluated, [batch], to_logits=reading)
    except (ValueError, TypeError) as error:
        raise _two_answers(net, f"none: {error}", _listed(p)) from error
    if p.shape != other.shape or not torch.allclose(p, other, rtol=1e-3, atol=1e-5):
        raise _two_answers(net, _listed(other), _listed(p))


def _two_answers(net: skorch.NeuralNet, predicted: str, inferred: str) -> ValueError:
    return ValueError(
        f"A query reads {type(net).__name__}.infer, but the net predicts by an evaluation_step of "
        f"its own, and they disagree: for the first sample infer gives the probabilities "
        f"{inferred}, evaluation_step {predicted}. What evaluation_step does beyond skorch's "
        "belongs into infer."
    )


def _listed(p: Tensor) -> str:
    numbers = ", ".join(f"{value:.3g}" for value in p[0, :4].tolist())
    return f"({numbers}{', ...' if p.shape[1] > 4 else ''})"


def _has_logits(output: Any) -> bool:
    """Tell whether this is such as a Hugging Face model gives."""
    return isinstance(getattr(output, "logits", None), Tensor)


def _logits(output: Any) -> Tensor:
    found = output.logits if _has_logits(output) else first_output(output)
    if not isinstance(found, Tensor):
        raise ValueError(
            "Expected the net to infer a tensor, a tuple that begins with one or an output with "
            f"logits, found {type(found).__name__}. to_logits says how other outputs become logits."
        )
    return found


def _binary_logits(output: Any) -> Tensor:
    z = _logits(output)
    z = z.reshape(len(z))
    return torch.stack([torch.zeros_like(z), z], dim=1)


class _LogProbabilities:
    """Logits of a net that outputs probabilities, or whose ``predict_nonlinearity`` makes them.

    Rows that are none become NaN, to be reported with their row: nothing here waits for the
    device, or depends on numbers, which `torch.vmap` does not allow.

    Parameters
    ----------
    net : skorch classifier
        Initialized.

    Attributes
    ----------
    expected : str
        What such a row lacks.
    """

    def __init__(self, net: skorch.NeuralNet) -> None:
        self._nonlinearity = net._get_predict_nonlinearity()
        self._binary = is_binary(net)
        self._by_rule = net.predict_nonlinearity == "auto"
        self.expected = (
            f"With {type(_criterion(net)).__name__}, {type(net).__name__} expects the module to "
            "output probabilities that sum to one (or a predict_nonlinearity that makes them). "
            "For a module that outputs logits, the criterion is CrossEntropyLoss; for other "
            "outputs there is to_logits."
        )

    def __call__(self, output: Any) -> Tensor:
        if self._by_rule and _has_logits(output):
            # By their name, whatever the criterion: such models often have a loss of their own.
            return _binary_logits(output) if self._binary else output.logits
        output = _logits(output)
        p: Tensor = self._nonlinearity(output.reshape(len(output)) if self._binary else output)
        seen = p.detach()
        wrong = (seen < 0).any(-1) | ((seen.sum(-1) - 1).abs() > 0.01)
        # p (d log p) has the limit zero where p underflows.
        return p.clamp_min(torch.finfo(p.dtype).tiny).log().masked_fill(wrong[..., None], math.nan)


def to_logits_of(net: skorch.NeuralNet, to_logits: ToLogits | None = None) -> ToLogits:
    """Find how a net's raw output becomes logits (n, C).

    Parameters
    ----------
    net : skorch classifier
        Initialized.
    to_logits : callable, optional
        The user's own, which goes before all rules.

    Returns
    -------
    callable
        Output of ``net.infer`` -> logits. Where the criterion takes logits, they are used as
        they are; else the net's own ``predict_nonlinearity`` gives probabilities, and their
        logarithm is what is needed, since a softmax undoes it.
    """
    if to_logits is not None:
        return to_logits
    if net.predict_nonlinearity == "auto":
        if isinstance(_criterion(net), nn.CrossEntropyLoss):
            return _logits
        if isinstance(_criterion(net), nn.BCEWithLogitsLoss):
            return _binary_logits
    return _LogProbabilities(net)


def not_finite(row: int, name: str, to_logits: ToLogits) -> ValueError:
    """Say that the output for a row of the user's data is of no use."""
    what, why = "NaN or infinite", ""
    if isinstance(to_logits, _LogProbabilities):
        what, why = "NaN, infinite or not probabilities", f" {to_logits.expected}"
    return ValueError(f"The network's output is {what} for row {row} of {name}.{why}")


# Parts of a net that only training uses, and that may be large or unable to travel.
_TRAINING = ("callbacks", "callbacks_", "history_", "_optimizers", "train_split")


class _NotCompiled(nn.Module):
    """Stands for a compiled module, which cannot travel: the same names, run as it is written."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._orig_mod = module

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "_orig_mod":  # not there yet
                raise
            return getattr(self._orig_mod, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module."""
        return self._orig_mod(*args, **kwargs)


def _travelling(module: nn.Module, copied: dict[int, Any]) -> nn.Module:
    plain = getattr(module, "_orig_mod", module)
    # One memo for all: modules that share parameters still do so afterwards.
    found: nn.Module = copy.deepcopy(plain, copied).cpu()
    return found if plain is module else _NotCompiled(found)


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
    copied: dict[int, Any] = {}
    for name, value in parts.items():
        if isinstance(value, nn.Module):
            parts[name] = _travelling(value, copied)
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
def naming_rows(parts: Sequence[_Numbered], to_logits: ToLogits) -> Iterator[None]:
    """Turn the count of samples read into a row of the user's data, in messages."""
    try:
        yield
    except NonFiniteOutputError as error:
        row = error.row
        for part in parts:
            if row < part.n_rows:
                raise not_finite(part.rows[row], part.name, to_logits) from error
            row -= part.n_rows
        raise


def _inputs(batch: Any) -> Any:
    """Take the inputs from what a loader gives: (X, y), or X alone."""
    if isinstance(batch, Mapping) or not isinstance(batch, list | tuple):
        return batch
    return batch[0]
