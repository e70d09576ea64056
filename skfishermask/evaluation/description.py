"""Descriptions of estimators, functions and data by code and values, to tell them apart later."""

from __future__ import annotations

import copyreg
import dis
import functools
import hashlib
import inspect
import json
import math
import sys
import sysconfig
import types
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from skfishermask.data import Data, UserValue, input_arrays, n_rows, take_rows

# Rows that are looked at to tell data from others, where they are too large to be read whole.
_ROWS_READ = 64
_WHOLE_BYTES = 1 << 28
_STANDARD = tuple(sysconfig.get_path(name) for name in ("stdlib", "platstdlib"))
# Of any environment: one can be stacked upon another.
_INSTALLED = {"site-packages", "dist-packages"}
_OWN_PACKAGE = __name__.partition(".")[0]


def fingerprint(data: Data) -> str:
    """Compute a digest of data: their type, shape and content.

    Arrays in memory are read whole up to 256 MB; of what is larger, or not in memory, 64 rows are
    read. Of a Dataset only the length is looked at: reading its samples may be slow or random.
    """
    digest = hashlib.sha256()
    for array in input_arrays(data):
        n = n_rows(array)
        digest.update(f"{type(array).__qualname__} {getattr(array, 'shape', n)}".encode())
        if isinstance(array, Dataset):
            continue
        in_memory = isinstance(array, np.ndarray | torch.Tensor)
        in_memory = in_memory and not isinstance(array, np.memmap)
        if not in_memory or array.nbytes > _WHOLE_BYTES:
            is_short = getattr(array, "ndim", 2) == 1 or n <= _ROWS_READ
            rows = np.arange(n) if is_short else np.linspace(0, n - 1, _ROWS_READ).astype(int)
            array = take_rows(array, rows)
        digest.update(_content(array))
    return digest.hexdigest()[:16]


def _content(values: Data) -> bytes:
    if isinstance(values, torch.Tensor):
        values = values.detach().to_dense() if values.layout != torch.strided else values.detach()
        # As bytes: NumPy has no bfloat16.
        values = values.cpu().contiguous().flatten().view(torch.uint8).numpy()
    elif hasattr(values, "toarray"):
        values = values.toarray()
    array = np.asarray(values)
    if array.dtype.kind in "biufc":
        return array.dtype.str.encode() + array.tobytes()
    return json.dumps(describe(array.tolist()), sort_keys=True).encode()


def describe(obj: UserValue, name: str = "it") -> object:
    """Describe an estimator, a function or a value, without addresses, as JSON.

    Two descriptions are equal only if what they describe does the same: parameters of an estimator
    are listed with their values; a function counts by its code, its defaults, the values it closes
    over and the globals it reads; another object by its class and by what pickle would store of it.
    Functions and classes of installed packages count by name. Raises TypeError, which calls the
    object `name`, if something in it, such as a lock or an open file, has no value to be told by.
    """
    try:
        return _Describer().parameter(obj)
    except _NoDescriptionError as error:
        raise TypeError(
            f"A checkpoint must tell {name} from any other, but {error} has no value that could be "
            "compared later. Keep it out of what the checkpoint sees, for example by a __reduce__ "
            "without it, or run without a checkpoint."
        ) from error


class _NoDescriptionError(Exception):
    pass


class _Describer:
    """Describes one object; objects that contain themselves are named by their distance."""

    def __init__(self) -> None:
        self._open: list[object] = []

    def parameter(self, obj: UserValue) -> object:
        """Describe what is cloned before use: parameters alone count, readable in messages."""
        if isinstance(obj, list | tuple):
            return [self.parameter(value) for value in obj]
        if hasattr(obj, "get_params") and not isinstance(obj, type):
            values = obj.get_params(deep=False)
            return [self.type(type(obj)), {k: self.parameter(v) for k, v in values.items()}]
        return self.value(obj)

    def value(self, obj: UserValue) -> object:
        """Describe what is used as it is."""
        if obj is None or isinstance(obj, bool | int | str):
            return obj if type(obj).__module__ == "builtins" else [_name(type(obj)), obj]
        if isinstance(obj, float):
            return obj if math.isfinite(obj) else ["float", repr(obj)]
        if isinstance(obj, np.generic):
            return [str(obj.dtype), self.value(obj.item())]
        if isinstance(obj, bytes | bytearray | complex | types.ModuleType | range):
            text = obj.__name__ if isinstance(obj, types.ModuleType) else repr(obj)
            return [type(obj).__name__, _digest(text)]
        if any(obj is one for one in self._open):
            return ["itself", len(self._open) - [obj is one for one in self._open].index(True)]
        self._open.append(obj)
        try:
            return self._object(obj)
        finally:
            self._open.pop()

    def _object(self, obj: UserValue) -> object:
        kind = type(obj)
        if isinstance(obj, np.ndarray | torch.Tensor):
            if isinstance(obj, torch.Tensor) and torch.nn.parameter.is_lazy(obj):
                return [_name(kind), "not initialized"]
            shape = list(obj.shape)
            return [_name(kind), shape, str(obj.dtype), _digest(_content(obj))]
        if isinstance(obj, Mapping) and kind.__module__ in ("builtins", "collections"):
            return [_name(kind), [[self.value(k), self.value(v)] for k, v in obj.items()]]
        if isinstance(obj, Set):
            return [_name(kind), sorted(json.dumps(self.value(value)) for value in obj)]
        if isinstance(obj, Sequence) and kind.__module__ == "builtins":
            return [_name(kind), [self.value(value) for value in obj]]
        if isinstance(obj, functools.partial):
            return [_name(kind), *map(self.value, (obj.func, obj.args, obj.keywords))]
        if isinstance(obj, types.FunctionType):
            return self._function(obj)
        if isinstance(obj, types.MethodType):
            return ["method", self.value(obj.__func__), self.value(obj.__self__)]
        if isinstance(obj, types.CodeType):
            return self._code(obj)
        if isinstance(obj, type):
            return self.type(obj)
        return self._reduced(obj)

    def type(self, kind: type) -> object:
        """Describe a class: by name where it is installed, else by bases and attributes."""
        if _is_installed(kind):
            return _name(kind)
        self._open.append(kind)
        try:
            own = {
                name: [self.value(one) for one in _values_of(name, value)]
                for name, value in sorted(vars(kind).items())
            }
            bases = [self.value(base) for base in kind.__bases__]
        finally:
            self._open.pop()
        return f"{_name(kind)} {_digest(json.dumps([bases, own], sort_keys=True))}"

    def _function(self, function: types.FunctionType) -> object:
        cells = [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
        values: list[UserValue] = [
            cells,
            function.__defaults__,
            function.__kwdefaults__,
            vars(function),
        ]
        if not _is_installed(function):
            used = sorted({*_globals(function.__code__)} & function.__globals__.keys())
            values += [function.__code__, [[x, function.__globals__[x]] for x in used]]
        content = json.dumps([self.value(value) for value in values], sort_keys=True)
        return f"{_name(function)} {_digest(content)}"

    def _code(self, code: types.CodeType) -> object:
        constants = [self.value(value) for value in code.co_consts]
        names = [code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars]
        return [_digest(code.co_code), constants, list(map(list, names)), code.co_argcount]

    def _reduced(self, obj: UserValue) -> object:
        try:
            reducer = copyreg.dispatch_table.get(type(obj))
            reduced = reducer(obj) if reducer else obj.__reduce_ex__(4)
        except Exception as error:  # a class that cannot be pickled raises any exception
            raise _NoDescriptionError(f"{_name(type(obj))}") from error
        if isinstance(reduced, str):
            return [_name(type(obj)), reduced]
        whole = [list(x) if isinstance(x, Iterator) else x for x in reduced]
        return [self.type(type(obj)), *map(self.value, whole)]


def _name(obj: UserValue) -> str:
    return f"{obj.__module__}.{obj.__qualname__}"


def _digest(content: str | bytes) -> str:
    content = content.encode() if isinstance(content, str) else content
    return hashlib.sha256(content).hexdigest()[:16]


def _is_filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


def _is_installed(obj: UserValue) -> bool:
    """Return whether this comes from the standard library or an installed package."""
    first = obj.__module__.partition(".")[0] if obj.__module__ else ""
    if first in (*sys.stdlib_module_names, _OWN_PACKAGE):
        return True
    file = getattr(sys.modules.get(obj.__module__), "__file__", None)
    if file is None:
        return False
    return file.startswith(_STANDARD) or not _INSTALLED.isdisjoint(Path(file).parts)


def _globals(code: types.CodeType) -> Iterator[str]:
    """Name the globals that a function and those defined in it read."""
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            yield instruction.argval
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _globals(constant)


def _values_of(name: str, attribute: UserValue) -> list[UserValue]:
    """List what a class's attribute does: functions, or data that its author has set."""
    if isinstance(attribute, staticmethod | classmethod):
        return [attribute.__func__]
    if isinstance(attribute, property):
        return [attribute.fget, attribute.fset, attribute.fdel]
    if isinstance(attribute, functools.cached_property):
        return [attribute.func]
    if isinstance(attribute, types.FunctionType):
        return [attribute]
    is_special = name.startswith(("__", "_abc_")) or inspect.isdatadescriptor(attribute)
    return [] if is_special else [attribute]
