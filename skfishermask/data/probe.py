"""A fitted net, as a query reads it: tried on a sample before any long work."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import skorch
import torch
from torch import Tensor

from skfishermask.data.diagnostics import image_hint
from skfishermask.data.likelihoods import likelihood_of
from skfishermask.data.logits import not_finite, to_logits_of
from skfishermask.data.net import NetModule, net_module
from skfishermask.fisher import Likelihood, OutputLikelihood, map_outputs
from skfishermask.jacobian import Inputs, NonFiniteOutputError, ToOutputs

_CALLED = {"X_pool": "pool", "X_labeled": "labelled data", "X_target": "target data"}


@dataclass(frozen=True)
class ReadableNet:
    """A fitted net, and how it is read.

    Attributes
    ----------
    net : skorch classifier
        As it is.
    module : NetModule
        What it infers.
    to_logits : callable
        What makes logits of that.
    likelihood : Likelihood
        The distribution of a label, given the logits.
    """

    net: skorch.NeuralNet
    module: NetModule
    to_logits: ToOutputs
    likelihood: OutputLikelihood

    @property
    def read_options(self) -> dict[str, Any]:
        """Keyword arguments of the functions that read the module."""
        return {"likelihood": self.likelihood, "to_logits": self.to_logits}

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self.module.parameters()).device

    def outputs_of(self, first: Inputs, name: str) -> Tensor:
        """Try the net on one sample, and return its outputs.

        Parameters
        ----------
        first : tensor, list of tensors or dict of tensors
            The sample.
        name : str
            What the user calls the samples.

        Raises
        ------
        ValueError
            If the net cannot read it, or gives NaN or infinity.
        """
        try:
            [outputs] = map_outputs(_outputs_alone, self.module, [first], **self.read_options)
        except torch.OutOfMemoryError:
            raise
        except NonFiniteOutputError as error:
            raise not_finite(0, name, self.to_logits) from error
        except (RuntimeError, IndexError, TypeError) as error:
            explained = ValueError(
                f"The network cannot read the {_CALLED[name]}. The first sample is "
                f"{_described(first)}, and PyTorch says: {error}"
            )
            if note := image_hint(first):
                explained.add_note(note)
            raise explained from error
        return outputs


def read_net(
    net: skorch.NeuralNet,
    first: Inputs,
    to_logits: ToOutputs | None,
    likelihood: str | Likelihood = "auto",
) -> tuple[ReadableNet, Tensor]:
    """Try a net on the first sample of a pool.

    Parameters
    ----------
    net : skorch classifier
        Initialized.
    first : tensor, list of tensors or dict of tensors
        The sample.
    to_logits : callable or None
        The user's own.
    likelihood : str or Likelihood
        The user's parameter.

    Returns
    -------
    readable : ReadableNet
        How a query reads it.
    outputs : Tensor of shape (1, ...)
        Of the sample.
    """
    model = likelihood_of(net, likelihood)
    plain = ReadableNet(net, NetModule(net), to_logits_of(net, to_logits, model), model)
    outputs = plain.outputs_of(first, "X_pool")
    return replace(plain, module=net_module(net, first, plain.to_logits)), outputs


def _outputs_alone(outputs: Tensor, counted: Tensor | None) -> Tensor:
    return outputs.detach()


def _described(batch: Inputs) -> str:
    if isinstance(batch, torch.Tensor):
        return f"{str(batch.dtype).removeprefix('torch.')} of shape {tuple(batch.shape)}"
    if isinstance(batch, dict):
        return "{" + ", ".join(f"{key!r}: {_described(part)}" for key, part in batch.items()) + "}"
    return f"[{', '.join(map(_described, batch))}]"
