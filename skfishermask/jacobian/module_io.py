"""Calls of a user's network: batches in, checked outputs out, and its output layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from skfishermask.jacobian.graph import Graph
from skfishermask.jacobian.isolation import exact_mode, isolated
from skfishermask.jacobian.linear_head import LinearHead, linear_head

# What a user's module takes first: a tensor, a list of tensors, or a dict of keywords.
Inputs: TypeAlias = Any
# What a user's module returns.
Output: TypeAlias = Any
ToOutputs: TypeAlias = Callable[[Output], Tensor]


def _items(batch: Inputs) -> list[tuple[int | str, Inputs]]:
    if isinstance(batch, Mapping):
        return list(batch.items())
    if isinstance(batch, list | tuple):
        return list(enumerate(batch))
    raise TypeError(
        "A batch must be a tensor, a list of tensors or a dict of tensors, "
        f"found {type(batch).__name__}."
    )


def map_tensors(batch: Inputs, function: Callable[[Tensor], Tensor]) -> Inputs:
    """Apply a function to every tensor of a batch, keeping its structure."""
    if isinstance(batch, Tensor):
        return function(batch)
    mapped = {key: map_tensors(item, function) for key, item in _items(batch)}
    return mapped if isinstance(batch, Mapping) else list(mapped.values())


def slice_batch(batch: Inputs, rows: slice) -> Inputs:
    """Return a slice of the samples of a batch."""
    return map_tensors(batch, lambda t: t[rows])


def batch_length(batch: Inputs) -> int:
    """Return the number of samples of a batch; raise ValueError where its tensors disagree."""
    lengths: list[int] = []

    def count(t: Tensor) -> Tensor:
        lengths.append(len(t))
        return t

    map_tensors(batch, count)
    if not lengths:
        raise ValueError(f"A batch must hold at least one tensor, found {batch!r}.")
    if len(set(lengths)) > 1:
        raise ValueError(
            f"The tensors of a batch must have one row a sample, found the lengths {lengths}."
        )
    return lengths[0]


def first_output(output: Output) -> Output:
    """Return the tensor of outputs in what a module returns.

    It is its ``.logits`` where there are such (Hugging Face models), the first element of a tuple,
    or the object itself.
    """
    if not isinstance(output, Tensor) and hasattr(output, "logits"):
        return output.logits
    return output[0] if isinstance(output, tuple) else output


def move(batch: Inputs, module: nn.Module) -> Inputs:
    """Move a batch to the module's device; dtypes are the network's own affair."""
    device = next(module.parameters()).device

    def move(t: Tensor) -> Tensor:
        # An input that requires gradients itself is no parameter.
        # With channels last, PyTorch 2.14's backward passes of small images may abort on a CPU.
        t = t.detach().to(device).contiguous()
        # Autograd cannot save what was made in inference mode.
        return t.clone() if t.is_inference() else t

    return map_tensors(batch, move)


def call_module(module: nn.Module, batch: Inputs, to_outputs: ToOutputs | None) -> Tensor:
    """Call a module as skorch does (a mapping becomes keyword arguments); return its outputs.

    The module is handed a copy, which its forward pass may write to. RuntimeError is raised where
    it is in training mode afterwards, as when another thread trains it.
    """
    batch = map_tensors(batch, Tensor.clone)
    with _explaining_dtypes(module, batch):
        output = module(**batch) if isinstance(batch, Mapping) else module(batch)
    if any(m.training for m in module.modules()):
        raise RuntimeError(
            "The network was put into training mode while it was read. Either another thread "
            "trains it (then query a copy, as copy.deepcopy(net) gives one), or its forward pass "
            "calls train(), and its predictions would be random."
        )
    return (to_outputs or first_output)(output)


@contextmanager
def _explaining_dtypes(module: nn.Module, batch: Inputs) -> Iterator[None]:
    """Add the remedy to PyTorch's error where a batch has a dtype that no parameter has."""
    try:
        yield
    except RuntimeError as error:
        if "dtype" not in str(error) and "scalar type" not in str(error):
            raise
        dtypes: set[torch.dtype] = set()

        def note_dtype(t: Tensor) -> Tensor:
            dtypes.add(t.dtype)
            return t

        map_tensors(batch, note_dtype)
        own = {p.dtype for p in module.parameters()}
        floats = sorted(str(dtype) for dtype in dtypes - own if dtype.is_floating_point)
        if not floats:
            raise
        expected = " and ".join(sorted(map(str, own)))
        target = expected.removeprefix("torch.") if len(own) == 1 else "float32"
        raise RuntimeError(
            f"{error}. The samples are {' and '.join(floats)}, the network's parameters "
            f"{expected}: cast the samples to the dtype that the network takes, as by "
            f"X.astype({target!r}), or cast in its forward."
        ) from error


class _NonFiniteError(ValueError):
    """What a network computes is NaN or infinite; `row` counts the samples that were read."""

    subject: ClassVar[str]

    def __init__(self, row: int) -> None:
        super().__init__(f"The network's {self.subject} NaN or infinite for sample {row}.")
        self.row = row

    def __reduce__(self) -> tuple[object, ...]:
        # By row: an exception that comes back from a worker is made again from its arguments.
        return type(self), (self.row,)


class NonFiniteOutputError(_NonFiniteError):
    """The network's output is NaN or infinite."""

    subject = "output is"


class NonFiniteGradientError(_NonFiniteError):
    """Gradients are NaN or infinite."""

    subject = "gradients are"


# A single sample is tried before all others.
_SQUEEZED = (
    " One sample was tried alone: where forward squeezes, it must name the axis, as in squeeze(-1)."
)


def check_outputs(outputs: Output, n: int, first_row: int) -> None:
    """Raise TypeError or ValueError unless these are finite outputs (n, ...)."""
    if not isinstance(outputs, Tensor):
        raise TypeError(f"Expected outputs in a tensor, found {type(outputs).__name__}.")
    if outputs.dim() == 0 or len(outputs) != n:
        raise ValueError(
            f"Expected outputs of shape ({n}, ...) with one row a sample, found "
            f"{tuple(outputs.shape)}." + (_SQUEEZED if n == 1 else "")
        )
    bad = ~torch.isfinite(outputs).unsqueeze(-1).flatten(1).all(dim=1)
    if bad.any():
        raise NonFiniteOutputError(first_row + int(bad.nonzero()[0]))


def read_outputs(
    module: nn.Module, batch: Inputs, to_outputs: ToOutputs | None = None, first_row: int = 0
) -> Tensor:
    """Run a module on a batch, moved to its device; return checked outputs (n, ...).

    Raises ValueError, naming the first bad sample counted from `first_row`, unless they are
    finite, with a row a sample.
    """
    outputs = call_module(module, move(batch, module), to_outputs)
    check_outputs(outputs, batch_length(batch), first_row)
    return outputs


def output_layer(
    module: nn.Module, batch: Inputs, *, to_outputs: ToOutputs | None = None
) -> list[str]:
    """Name the parameters of a network's output layer.

    It is the last matrix product or convolution with parameters to run of those that the outputs
    depend on, with what is added to its result directly; in a network that has none, the last
    operation to run that a matrix enters.

    Parameters
    ----------
    module : nn.Module
        The network. It is read in evaluation mode and left as it was.
    batch : tensor, list of tensors or dict of tensors
        One batch; a single sample suffices.
    to_outputs : callable, optional
        Maps what the module returns to outputs (n, ...).

    Returns
    -------
    list of str
        Names as in ``module.named_parameters()``, in that order: weight and bias, as a rule.

    Raises
    ------
    ValueError
        If the outputs depend on no such layer.

    Examples
    --------
    >>> import torch
    >>> from skfishermask.jacobian.module_io import output_layer
    >>> nn = torch.nn
    >>> module = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3), nn.BatchNorm1d(3))
    >>> output_layer(module, torch.randn(2, 4))
    ['2.weight', '2.bias']
    """
    parameters = dict(module.named_parameters())
    with isolated(module, parameters.values()), exact_mode(next(iter(parameters.values())).device):
        # Kept, because older versions of PyTorch free a Python function with its outputs.
        outputs = read_outputs(module, batch, to_outputs)
        names = Graph(outputs, parameters).output_layer()
    if not names:
        raise ValueError("The network's outputs depend on no layer that holds a weight matrix.")
    return [name for name in parameters if name in names]


def find_linear_head(
    module: nn.Module,
    sample: Inputs,
    indices: Mapping[str, Tensor | None],
    to_outputs: ToOutputs | None = None,
) -> LinearHead | None:
    """Find the linear layer that makes a network's outputs for a sample, see `linear_head`."""
    own = dict(module.named_parameters())
    parameters = {name: own[name] for name in indices}
    with isolated(module, parameters.values()), exact_mode(next(iter(own.values())).device):
        return linear_head(read_outputs(module, sample, to_outputs), parameters, indices)
