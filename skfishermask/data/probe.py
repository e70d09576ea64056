"""A fitted net, as a query reads it: tried on a sample before any long work."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace

import numpy as np
import skorch
import torch
from torch import Tensor, nn

from skfishermask.compat import without_mode_changes
from skfishermask.data.batches import N_COMPARED, has_own_iterator, naming_rows
from skfishermask.data.dask import Source
from skfishermask.data.diagnostics import image_hint, integers_hint
from skfishermask.data.likelihoods import likelihood_of
from skfishermask.data.logits import not_finite, to_logits_of
from skfishermask.data.net import NetModule, criterion_of, is_net, net_module, whole_net
from skfishermask.data.rows import n_rows, take_rows
from skfishermask.data.samples import with_labels
from skfishermask.data.types import Data, Estimator, SampleRole, UserValue
from skfishermask.data.unwrap import Checking, innermost, unwrap
from skfishermask.fisher import (
    Likelihood,
    OutputLikelihood,
    ReadOptions,
    map_outputs,
    predicted_means,
)
from skfishermask.jacobian import (
    Inputs,
    NonFiniteOutputError,
    ToOutputs,
    exact_mode,
    first_output,
    isolated,
    seeded,
)

# How near to one the outputs of each sample sum that are probabilities; in half precision.
_PROBABILITY_SUM, _ROUNDED_SUM = 1e-4, 1e-2
# Relative difference of predictions; absolute below this share of the largest.
_TOLERANCE, _ABSOLUTE = 1e-3, 1e-2


@dataclass(frozen=True)
class ReadableNet:
    """A fitted net, and how it is read."""

    net: skorch.NeuralNet
    module: NetModule  # what it infers
    to_logits: ToOutputs  # what makes logits of that
    likelihood: OutputLikelihood  # the distribution of a label, given the logits
    has_own_logits: bool = False  # whether `to_logits` is the user's own

    @property
    def read_options(self) -> ReadOptions:
        """Keyword arguments of the functions that read the module."""
        return {"likelihood": self.likelihood, "to_logits": self.to_logits}

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self.module.parameters()).device

    def outputs_of(self, first: Inputs, role: SampleRole) -> Tensor:
        """Return the net's outputs for one sample; ValueError if it cannot read it."""
        try:
            outputs: Tensor
            [outputs] = map_outputs(
                lambda model, outputs, *_: outputs.detach(),
                self.module,
                [first],
                **self.read_options,
            )
        except torch.OutOfMemoryError:
            raise
        except NonFiniteOutputError as error:
            raise not_finite(0, role, self.to_logits) from error
        except (RuntimeError, IndexError, TypeError) as error:
            explained = ValueError(
                f"The network cannot read the {role.noun}. The first sample is "
                f"{_described(first)}, and PyTorch says: {error}"
            )
            numbers = integers_hint(first, "It") if isinstance(error, IndexError) else ""
            if note := numbers or image_hint(first):
                explained.add_note(note)
            raise explained from error
        return outputs


def first_sample(samples: Source) -> Inputs:
    """Return the first sample alone; what a Dataset draws for it leaves no trace."""
    with seeded(0):
        return next(iter(samples.head(1)[1]))


def read_net(
    net: skorch.NeuralNet,
    first: Inputs,
    to_logits: ToOutputs | None,
    likelihood: str | Likelihood = "auto",
) -> tuple[ReadableNet, Tensor]:
    """Try an initialized net on the first sample of a pool: how it is read, and its outputs.

    `to_logits` and `likelihood` are the user's parameters.
    """
    model = likelihood_of(net, likelihood)
    to_outputs = to_logits_of(net, to_logits, model)
    plain = ReadableNet(net, NetModule(net), to_outputs, model, to_logits is not None)
    outputs = plain.outputs_of(first, SampleRole.POOL)
    return replace(plain, module=net_module(net, first, plain.to_logits)), outputs


def check_as_predicted(net: ReadableNet, samples: Source) -> None:
    """Check that a query reads what the net predicts with, on the first `N_COMPARED` samples.

    Raises ValueError if the predictions that are read differ from those of the net's own
    ``predict_proba``.
    """
    X, batches = samples.head(N_COMPARED)
    outputs: list[UserValue] = []

    def noting(output: UserValue) -> Tensor:
        outputs.append(output)
        return net.to_logits(output)

    # All of the net is isolated, since a prediction may touch the criteria too.
    with isolated(whole_net(net.net)), exact_mode(net.device):
        with seeded(0), naming_rows(batches, net.to_logits):
            # One draw, as the loader of a prediction makes one: then what a Dataset draws is equal.
            torch.empty((), dtype=torch.int64).random_()
            p = predicted_means(
                net.module, batches, likelihood=net.likelihood, to_logits=noting
            ).cpu()
        with seeded(0):
            predicted = _predicted(net, X, p.shape)
    _warn_of_softmax(net.net, outputs[0])
    eps = torch.finfo(_dtype_of(outputs[0])).eps
    _compare(net.net, samples.role, p, predicted, max(_TOLERANCE, 4 * eps))


def warn_of_outputs(estimator: Estimator, X: Data) -> None:
    """Warn where a fitted net outputs what its criterion does not take, on the first samples of X.

    A criterion trains on anything: on logits for probabilities, and on these for logits. An
    estimator without a net, or one that has warned itself, is let pass.
    """
    if not is_net(innermost(estimator)) or isinstance(estimator, Checking):
        return
    unwrapped = unwrap(estimator)
    net, criterion = unwrapped.net, criterion_of(unwrapped.net)
    if not isinstance(criterion, nn.CrossEntropyLoss | nn.NLLLoss):
        return
    rows = take_rows(X, np.arange(min(N_COMPARED, n_rows(X))))
    with isolated(whole_net(net)), seeded(0), torch.no_grad():
        inputs = with_labels(unwrapped.transform(rows))
        output = next(iter(without_mode_changes(net).forward_iter(inputs)))
    _warn_of_softmax(net, output)
    takes_logarithm = type(net).get_loss is skorch.NeuralNetClassifier.get_loss
    if not isinstance(criterion, nn.NLLLoss) or not takes_logarithm:
        return
    if not _are_probabilities(output, _ROUNDED_SUM):
        warnings.warn(
            "The module's outputs are no probabilities, and skorch takes their logarithm before "
            "NLLLoss, which makes no loss of it, or NaN. For a module that outputs logits, set "
            "criterion=CrossEntropyLoss; in one that outputs a log_softmax, make it a softmax.",
            UserWarning,
            stacklevel=2,
        )


def _warn_of_softmax(net: skorch.NeuralNet, output: UserValue) -> None:
    """Warn where the criterion applies a softmax to what is one already."""
    if not isinstance(criterion_of(net), nn.CrossEntropyLoss):
        return
    if _are_probabilities(output, _PROBABILITY_SUM):
        warnings.warn(
            "The module's outputs are not negative and sum to one, as probabilities do, and "
            "CrossEntropyLoss applies a softmax to them: training is slow, and predictions are "
            "near to uniform. Leave the softmax out of the module, or set criterion=NLLLoss.",
            UserWarning,
            stacklevel=2,
        )


def _are_probabilities(output: UserValue, tolerance: float) -> bool:
    values = first_output(output)
    if not isinstance(values, Tensor) or values.dim() < 2:
        return False
    are_near_one = (values.sum(1) - 1).abs() <= tolerance
    return bool((values >= 0).all() & are_near_one.all())


def _dtype_of(output: UserValue) -> torch.dtype:
    tensor = first_output(output)
    is_float = isinstance(tensor, Tensor) and tensor.is_floating_point()
    return tensor.dtype if is_float else torch.float32


def _predicted(net: ReadableNet, X: Data, shape: torch.Size) -> Tensor:
    """Predict means of this shape, of the first samples, as the net does by itself."""
    own, n = without_mode_changes(net.net), shape[0]
    # An iterator of the net's own might order the samples by what they are.
    rows = np.arange(n - 1, -1, -1) if has_own_iterator(own) else np.arange(n)
    X = with_labels(take_rows(X, rows))

    def of_outputs() -> Tensor:
        outputs = [net.to_logits(output) for output in own.forward_iter(X)]
        return net.likelihood.mean(torch.cat(outputs))

    def of_net() -> Tensor:
        p = torch.as_tensor(own.predict_proba(X)).double()
        if p.shape != shape:
            raise ValueError(f"The net's predict_proba has the shape {tuple(p.shape)}.")
        return p

    # With to_logits, an output can be one that skorch makes no probabilities of, or others.
    # skorch's softmax goes along the last axis, which is that of positions where there are some.
    has_positions = len(shape) > 2
    is_raw = net.has_own_logits or own.predict_nonlinearity is None or has_positions
    first, second = (of_outputs, of_net) if is_raw else (of_net, of_outputs)
    with torch.no_grad():
        try:
            p = first()
        except torch.OutOfMemoryError:
            raise
        except Exception:  # a user's network, or to_logits, can raise anything
            p = second()
    return p[np.argsort(rows)].cpu()


def _compare(
    net: skorch.NeuralNet, role: SampleRole, p: Tensor, predicted: Tensor, tolerance: float
) -> None:
    """Raise ValueError, naming the first place, where what is read differs from predictions."""
    remedy = (
        f"What {type(net).__name__} does to its samples or outputs beside its dataset, iterator "
        "and infer, as in an overridden evaluation_step or predict_proba, belongs in infer."
    )
    size = predicted.abs()
    # NaN is never near.
    differ = ~((p - predicted).abs() <= tolerance * (size + _ABSOLUTE * size.max()))
    if bool(differ.any()):
        index = tuple(differ.nonzero()[0].tolist())
        raise ValueError(
            f"A query would not read what the net predicts with: for row {index[0]} of "
            f"{role.argument}, output {', '.join(map(str, index[1:]))}, it reads "
            f"{float(p[index]):.6g}, and the net predicts {float(predicted[index]):.6g}. {remedy}"
        )


def _described(batch: Inputs) -> str:
    if isinstance(batch, torch.Tensor):
        return f"{str(batch.dtype).removeprefix('torch.')} of shape {tuple(batch.shape)}"
    if isinstance(batch, dict):
        return "{" + ", ".join(f"{key!r}: {_described(t)}" for key, t in batch.items()) + "}"
    return f"[{', '.join(map(_described, batch))}]"
