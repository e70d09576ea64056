"""A second device made of host memory: device code runs where there is no GPU.

A tensor that says it is on the device ``pretend:0`` holds its numbers on the CPU. As on a GPU, an
operation that mixes devices raises, and what would make the host wait for the device is counted,
with the line of the package that asked for it; so are operations, but for views, which launch
nothing. PyTorch's hook for backends written in Python is experimental. Neither time nor memory is
modelled.

    with pretending() as counts:
        select_batch(Pretended(V), 10, Pretended(fisher))
    print(counts.waits, counts.operations)
"""

from __future__ import annotations

import linecache
import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

import skfishermask

_NAME = "pretend"
_PACKAGE = os.path.dirname(skfishermask.__file__)
_setup_privateuseone_for_python_backend(_NAME)
# What autocast asks the device for, also where it is switched off.
getattr(torch, _NAME).get_amp_supported_dtype = lambda: [torch.float16, torch.bfloat16]
DEVICE = torch.device(_NAME, 0)
# The size or the value of their results must be known on the host.
_READING = {
    *("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "bincount"),
    *("_unique", "_unique2", "unique_dim", "unique_consecutive"),
    *("_linalg_check_errors", "_linalg_eigh", "linalg_lstsq", "repeat_interleave"),
}
_CROSSING = ("_to_copy", "copy_", "_copy_from", "to")
_INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_")
# They launch nothing, though their schema does not say so.
_FREE = ("_unsafe_view", "_reshape_alias", "new_empty", "empty_like", "empty", "empty_strided")


class Counts:
    """What was asked of the device."""

    def __init__(self) -> None:
        self.waits: Counter[str] = Counter()
        self.operations: Counter[str] = Counter()
        self.lines: Counter[str] = Counter()

    def wait(self, kind: str) -> None:
        self.waits[kind] += 1
        frame: FrameType | None = sys._getframe(1)
        while frame and not frame.f_code.co_filename.startswith(_PACKAGE):
            frame = frame.f_back
        if frame:
            file, line = frame.f_code.co_filename, frame.f_lineno
            code = linecache.getline(file, line).strip()
            self.lines[f"{os.path.basename(file)}:{line} {code}"] += 1


_counts = Counts()


class Pretended(torch.Tensor):
    """A tensor on the pretended device."""

    value: torch.Tensor

    @staticmethod
    def __new__(cls, value: torch.Tensor) -> Pretended:
        self = torch.Tensor._make_wrapper_subclass(
            cls,
            value.size(),
            strides=value.stride(),
            storage_offset=value.storage_offset(),
            dtype=value.dtype,
            device=DEVICE,
        )
        self.value = value
        return self

    def tolist(self) -> Any:
        _counts.wait("tolist")
        return self.value.tolist()

    def untyped_storage(self) -> Any:
        return self.value.untyped_storage()

    def __repr__(self) -> str:
        return f"Pretended({self.value})"

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(
        cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _run(operation, args, kwargs or {})


class _Mode(TorchDispatchMode):
    """Makes it possible to create tensors on the device."""

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _run(operation, args, kwargs or {})


@contextmanager
def pretending() -> Iterator[Counts]:
    """Make tensors on the device in this context, and count from zero what it does."""
    global _counts
    _counts = Counts()
    with _Mode():
        yield _counts


def on_host(x: Any) -> Any:
    return x.value if isinstance(x, Pretended) else x


def _for_host(x: Any) -> Any:
    is_device = isinstance(x, torch.device) and x.type == _NAME
    return torch.device("cpu") if is_device else on_host(x)


def _is_view(schema: Any) -> bool:
    returns = [r.alias_info for r in schema.returns]
    return any(alias is not None and not alias.is_write for alias in returns)


def _run(operation: Any, args: Any, kwargs: Any) -> Any:
    schema = operation._schema
    name = schema.name.split("::")[1]
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    here = [x for x in tensors if isinstance(x, Pretended)]
    # A number from the host may be in any operation.
    elsewhere = [x for x in tensors if not isinstance(x, Pretended) and x.dim() > 0]
    asked = kwargs.get("device")
    stays = bool(here) if asked is None else torch.device(asked).type == _NAME
    if here or stays:
        launches = not _is_view(schema) and name not in _FREE
        if launches and not (name == "_to_copy" and not stays):
            _counts.operations[name] += 1
        if here and elsewhere and name not in _CROSSING:
            if name not in _INDEXING or not isinstance(args[0], Pretended):
                shapes = [tuple(x.shape) for x in elsewhere]
                raise RuntimeError(f"{name} mixes devices: {shapes} are on the host")
            _counts.wait("index on the host")
        # A mask is first turned into the places where it is true.
        masked = name in _INDEXING and any(
            x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]
        )
        if here and (name in _READING or masked):
            _counts.wait(name)
        if (here and not stays) or (
            name == "copy_" and here and not isinstance(args[0], Pretended)
        ):
            _counts.wait("copy to the host")
    result = operation(*tree_map(_for_host, args), **tree_map(_for_host, kwargs))
    names = [argument.name for argument in schema.arguments]
    written = [
        a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write
    ]
    if written and schema.returns:
        given = [args[names.index(n)] if names.index(n) < len(args) else kwargs[n] for n in written]
        return given[0] if len(schema.returns) == 1 else tuple(given)
    if written:
        return None
    return tree_map(lambda x: Pretended(x) if stays and type(x) is torch.Tensor else x, result)


def moved(module: torch.nn.Module) -> torch.nn.Module:
    """Move a module's parameters and buffers to the device, in place; Module.to cannot."""
    for part in module.modules():
        for key, parameter in part._parameters.items():
            if parameter is not None:
                there = Pretended(parameter.detach())
                part._parameters[key] = torch.nn.Parameter(there, parameter.requires_grad)
        for key, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[key] = Pretended(buffer)
    return module


_library = torch.library.Library("aten", "IMPL")


def _empty_strided(size: Any, stride: Any, dtype: Any = None, **_: Any) -> Pretended:
    return Pretended(torch.empty_strided(size, stride, dtype=dtype))


def _empty(size: Any, dtype: Any = None, **_: Any) -> Pretended:
    return Pretended(torch.empty(size, dtype=dtype))


def _copy_from(source: Any, target: Any, non_blocking: bool = False) -> Any:
    on_host(target).copy_(on_host(source))
    return target


for _operation, _function in (
    ("empty_strided", _empty_strided),
    ("empty.memory_format", _empty),
    ("_copy_from", _copy_from),
):
    _library.impl(_operation, _function, "PrivateUse1")
