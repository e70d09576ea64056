"""Reading a skorch net: what kind it is, and what it infers as a module."""

from __future__ import annotations

from collections.abc import Sequence

import skorch
import torch
from sklearn.pipeline import Pipeline
from torch import nn

from skfishermask.compat import as_written, criteria_of
from skfishermask.data.types import UserValue
from skfishermask.fisher import predicted_means
from skfishermask.jacobian import Inputs, ToOutputs, share_facts


def is_net(estimator: object) -> bool:
    """Return whether this is a skorch net."""
    return isinstance(estimator, skorch.NeuralNet)


def is_binary(estimator: object) -> bool:
    """Return whether this is a skorch net with a single output for two classes."""
    return isinstance(estimator, skorch.NeuralNetBinaryClassifier)


def check_no_module(estimator: object) -> None:
    """Raise TypeError at a torch module, or a class of them, that no skorch net is around."""
    while isinstance(estimator, Pipeline):
        estimator = estimator.steps[-1][1]
    if isinstance(estimator, nn.Module):
        kind = f"{type(estimator).__name__}, a torch module"
    elif isinstance(estimator, type) and issubclass(estimator, nn.Module):
        kind = f"{estimator.__name__}, a class of torch modules"
    else:
        return
    raise TypeError(
        f"Expected a skorch classifier, found {kind}: wrap it, as in NeuralNetClassifier(module, "
        "criterion=torch.nn.CrossEntropyLoss), where its output is logits."
    )


def has_own_dataset(net: skorch.NeuralNet) -> bool:
    """Return whether samples are read by a dataset of the user's: it may take anything."""
    own = type(net).get_dataset is not skorch.NeuralNet.get_dataset
    return own or net.dataset is not skorch.dataset.Dataset


def check_net(net: skorch.NeuralNet) -> None:
    """Raise NotFittedError unless the net is initialized."""
    net.check_is_fitted(["module_", "criterion_"])


def criterion_of(net: skorch.NeuralNet) -> nn.Module:
    """Return the net's criterion as the user wrote it: ``torch.compile`` wraps it as well."""
    return as_written(net.criterion_)


class NetModule(nn.Module):
    """What a net computes, as a module: its forward is the net's own ``infer``.

    Made afresh for every query, and the net stays as it is. It holds the net's modules: ``module_``
    alone where ``infer`` is skorch's own, else all, and those `criteria` that ``infer`` uses too.
    Of one module, parameters have their names in there, ``"0.weight"``; of several, the name of the
    net's attribute goes before: ``"module_.0.weight"``, ``"head_.weight"``.
    """

    def __init__(self, net: skorch.NeuralNet, criteria: Sequence[str] = ()) -> None:
        super().__init__()
        self._net, self.criteria = net, tuple(criteria)
        modules = {name: getattr(net, name) for name in [*_modules_of(net), *criteria]}
        first = next(iter(modules.values()))
        share_facts(self, first)
        if len(modules) == 1:
            # An empty name adds nothing to those of parameters and modules inside.
            modules = {"": first}
        self._modules.update(modules)

    def forward(self, x: Inputs = None, /, **inputs: UserValue) -> UserValue:
        """Return what the net infers from a batch: from a dict, if there are keywords."""
        return self._net.infer(inputs or x)


class _TracedNet(NetModule):
    """Notes the names of the criteria with parameters that the logits depend on, as `used`."""

    def __init__(
        self, net: skorch.NeuralNet, criteria: Sequence[str], to_logits: ToOutputs
    ) -> None:
        super().__init__(net, criteria)
        self._to_logits = to_logits
        self.used: list[str] = []

    def forward(self, x: Inputs = None, /, **inputs: UserValue) -> UserValue:
        with torch.enable_grad():
            for parameter in self.parameters():
                parameter.requires_grad_(True)
            output = super().forward(x, **inputs)
            total = self._to_logits(output).sum()
            for name in self.criteria:
                own = list(getattr(self, name).parameters())
                gradients = torch.autograd.grad(total, own, retain_graph=True, allow_unused=True)
                if any(gradient is not None for gradient in gradients):
                    self.used.append(name)
        return output


def _infers_as_skorch(net: skorch.NeuralNet) -> bool:
    own = getattr(net.infer, "__func__", None)
    return own in (skorch.NeuralNet.infer, skorch.NeuralNetBinaryClassifier.infer)


def whole_net(net: skorch.NeuralNet) -> NetModule:
    """Return a module of all modules of a net, also of the criteria that prediction touches."""
    return NetModule(net, _criteria_of(net))


def _module_names(net: skorch.NeuralNet) -> list[str]:
    """Name the attributes of a net that are modules; skorch ends their names in "_"."""
    modules = [name for name, value in vars(net).items() if isinstance(value, nn.Module)]
    return [name for name in modules if name.endswith("_")]


def _modules_of(net: skorch.NeuralNet) -> list[str]:
    if _infers_as_skorch(net):
        return ["module_"]
    criteria = _criteria_of(net)
    return [name for name in _module_names(net) if name not in criteria]


def _criteria_of(net: skorch.NeuralNet) -> list[str]:
    names = criteria_of(net)
    return [name for name in _module_names(net) if name in names]


def net_module(net: skorch.NeuralNet, batch: Inputs, to_logits: ToOutputs) -> NetModule:
    """Make the module that a query reads, having tried the net on a batch: a sample will do.

    It is with those criteria that have parameters on which the logits depend, such as a margin loss
    with a weight for each class.
    """
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
