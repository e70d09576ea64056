"""Reading a skorch net: what kind it is, and what it infers as a module."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import skorch
import torch
from sklearn.pipeline import Pipeline
from torch import Tensor, nn

from skfishermask.compat import as_written, criteria_of
from skfishermask.data.types import Labels, Whatever
from skfishermask.fisher import predicted_means
from skfishermask.jacobian import Inputs, ToOutputs


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
def explaining_labels(y: Labels) -> Iterator[None]:
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
    """Raise NotFittedError unless the net is initialized."""
    net.check_is_fitted(["module_", "criterion_"])


def criterion_of(net: skorch.NeuralNet) -> nn.Module:
    """Give the net's criterion as the user wrote it: ``torch.compile`` wraps it as well."""
    return as_written(net.criterion_)


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

    def forward(self, x: Inputs = None, /, **inputs: Whatever) -> Whatever:
        """Give what the net infers from a batch: from a dict, if there are keywords."""
        return self._net.infer(inputs or x)


class _EvaluatedNet(NetModule):
    """What a net predicts with: its forward is the net's own ``evaluation_step``."""

    def forward(self, x: Inputs = None, /, **inputs: Whatever) -> Whatever:
        # What a loader gives: the inputs, and labels, which skorch makes up in prediction.
        return self._net.evaluation_step((inputs or x, torch.zeros(1)), training=False)


class _TracedNet(NetModule):
    """Notes which criteria have parameters that the logits depend on.

    Attributes
    ----------
    used : list of str
        Their names, after a forward pass.
    """

    def __init__(
        self, net: skorch.NeuralNet, criteria: Sequence[str], to_logits: ToOutputs
    ) -> None:
        super().__init__(net, criteria)
        self._to_logits = to_logits
        self.used: list[str] = []

    def forward(self, x: Inputs = None, /, **inputs: Whatever) -> Whatever:
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
    names = criteria_of(net)
    return [name for name in _torch_parts(net) if name in names]


def net_module(net: skorch.NeuralNet, batch: Inputs, to_logits: ToOutputs) -> NetModule:
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
    predicted_means(traced, [batch], to_logits=to_logits)
    return NetModule(net, traced.used)


def _check_evaluation_step(net: skorch.NeuralNet, batch: Inputs, to_logits: ToOutputs) -> None:
    """Raise ValueError unless the net predicts what it infers."""
    # Setting the mode, evaluation_step reaches the criteria too.
    criteria = _criteria_of(net)
    inferred: list[Whatever] = []

    def noting(output: Whatever) -> Tensor:
        inferred.append(output)
        return to_logits(output)

    def reading(output: Whatever) -> Tensor:
        # It may pick the logits out of what infer gives.
        picked = isinstance(output, Tensor) and not isinstance(inferred[0], Tensor | tuple)
        return output if picked else to_logits(output)

    p = predicted_means(NetModule(net, criteria), [batch], to_logits=noting)
    try:
        evaluated = _EvaluatedNet(net, criteria)
        other = predicted_means(evaluated, [batch], to_logits=reading)
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
