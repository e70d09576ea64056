"""Isolation of a network while it is read: evaluation mode, full precision, no side effects.

What this changes is shared: flags of the network, and switches of the whole process. Isolations may
overlap, in a second thread or in a generator that was left open, and end in any order. So each
change is registered, with a function that restores what was there before it. The last change
registered calls its function as it ends; an earlier one hands it on to the next. Thus nothing is
restored during another isolation, and the last to end restores what was there before the first.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from operator import attrgetter
from typing import Protocol, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from skfishermask.jacobian.interrupts import reversible
from skfishermask.jacobian.restoring import (
    GRADIENT_HOOKS,
    Restore,
    do_nothing,
    ignore_new_hooks,
    registering_functions,
    restore_value,
    without_hooks,
    without_hooks_of_node,
)

_T = TypeVar("_T")


class _HasPrecision(Protocol):
    """An operation, or all of a backend, with a precision of its own."""

    fp32_precision: str


class _Change:
    """A registered change."""

    def __init__(self, restore: Restore) -> None:
        self.restore = restore


class _Thread(threading.local):
    """What a thread has open: its reads of a batch."""

    def __init__(self) -> None:
        self.reads: set[object] = set()


_this_thread = _Thread()
# What was changed -> the changes of it that have not ended, the first one first.
_changes: dict[Hashable, list[_Change]] = {}
# Reentrant, because the garbage collector may end an isolation while another one begins.
_lock = threading.RLock()


def _register(stack: ExitStack, key: Hashable, restore: Restore) -> bool:
    """Register a change until `stack` closes; return whether it is the only one."""
    change = _Change(restore)
    changes = _changes.setdefault(key, [])
    stack.callback(_end, key, change)
    changes.append(change)
    return len(changes) == 1


def _end(key: Hashable, change: _Change) -> None:
    try:
        _restore(key, change)
    finally:
        # An impatient second Ctrl-C must not leave it half done. Twice is as good as once.
        _restore(key, change)


def _restore(key: Hashable, change: _Change) -> None:
    with _lock:
        changes = _changes.get(key, [])
        if change not in changes:
            return
        if change is changes[-1]:
            change.restore()
        else:
            changes[changes.index(change) + 1].restore = change.restore
        changes.remove(change)
        if not changes:
            del _changes[key]


def _restore_module(module: nn.Module) -> Restore:
    # Per submodule: a frozen BatchNorm inside a training network has a flag of its own.
    training = module.training
    # Beside parameters and buffers, tensors in plain attributes: the weight that weight_norm's hook
    # computes is one, and would hold on to a graph and keep the network from being copied.
    own = module._parameters, module._buffers, module.__dict__
    tables = [cast(dict[str, object], table) for table in own]
    before = [dict(table.items()) for table in tables]
    values = [restore_value(buffer) for buffer in module._buffers.values() if buffer is not None]
    hooks = [without_hooks(module, name) for name in ("_backward_hooks", "_backward_pre_hooks")]

    def restore() -> None:
        if module.training != training:
            module.training = training
        for table, old in zip(tables, before, strict=True):
            new = dict(table.items())
            for name in {**old, **new}:
                pair = old.get(name), new.get(name)
                if pair[0] is pair[1] or not any(isinstance(x, Tensor) for x in pair):
                    continue
                if name in old:
                    table[name] = old[name]
                else:
                    del table[name]
        for undo in (*values, *hooks):
            undo()

    return restore


class _RestoreParameter:
    """Assigns a parameter the value, flag, gradient and gradient hooks that it has now."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self.parameter = parameter
        self.requires_grad, self.grad = parameter.requires_grad, parameter.grad
        self._restore_value = restore_value(parameter)
        self._restore_hooks = [without_hooks(parameter, name) for name in GRADIENT_HOOKS]

    def __call__(self) -> None:
        self._restore_value()
        if self.parameter.requires_grad != self.requires_grad:
            self.parameter.requires_grad_(self.requires_grad)
        if self.parameter.grad is not self.grad:
            self.parameter.grad = self.grad
        for undo in self._restore_hooks:
            undo()


def trainable_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that training changes, by name in order; where all are frozen, all.

    What another isolation has changed meanwhile does not count.
    """

    def is_trainable(parameter: nn.Parameter) -> bool:
        changes = _changes.get(("parameter", id(parameter)))
        restore = changes[0].restore if changes else None
        holder = restore if isinstance(restore, _RestoreParameter) else parameter
        return holder.requires_grad

    parameters = dict(module.named_parameters())
    with _lock:
        trainable = {name: p for name, p in parameters.items() if is_trainable(p)}
    return trainable or {name: p for name, p in parameters.items() if p.is_floating_point()}


def _restore_random_states(*, was_seeded: bool) -> Restore:
    # NumPy's legacy generator is the one that users' code may draw from.
    python, numpy = random.getstate(), np.random.get_state()
    cpu, seed = torch.get_rng_state(), torch.initial_seed()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None

    def restore() -> None:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        elif was_seeded or torch.cuda.is_initialized():
            # CUDA had not begun; the seed it would have begun with is the CPU's.
            torch.cuda.manual_seed_all(seed)

    return restore


def _evaluation_mode(stack: ExitStack, module: nn.Module) -> None:
    for m in module.modules():
        _register(stack, ("module", id(m)), _restore_module(m))
    for m in module.modules():
        # Not by `eval()`, which some networks override to merge weights or to keep dropout.
        if m.training:
            m.training = False


def _trainable(stack: ExitStack, module: nn.Module, trainable: Sequence[nn.Parameter]) -> None:
    ids = {id(p) for p in trainable}
    for p in {id(p): p for p in (*module.parameters(), *trainable)}.values():
        alone = _register(stack, ("parameter", id(p)), _RestoreParameter(p))
        # A backward pass inside the network's own forward pass adds to a gradient of its own.
        if p.grad is not None:
            p.grad = None
        if id(p) in ids:
            if not p.requires_grad:
                p.requires_grad_(True)
            for i, restore in enumerate(without_hooks_of_node(p)):
                _register(stack, ("node", id(p), i), restore)
        elif alone and p.requires_grad:
            p.requires_grad_(False)


def _no_new_hooks(stack: ExitStack) -> None:
    if _register(stack, "new hooks", registering_functions()):
        ignore_new_hooks(lambda: bool(_this_thread.reads))


def _switch(stack: ExitStack, holder: object, name: str, value: object) -> None:
    before = getattr(holder, name)
    # No switch is written without need: some hold more than what they show.
    restore = do_nothing if before == value else partial(setattr, holder, name, before)
    _register(stack, (id(holder), name), restore)
    if before != value:
        setattr(holder, name, value)


def _decomposed_kernels(stack: ExitStack, module: nn.Module) -> None:
    # The fused inference kernel of attention calls no submodule.
    mha = torch.backends.mha
    _register(stack, "fast path", partial(mha.set_fastpath_enabled, mha.get_fastpath_enabled()))
    mha.set_fastpath_enabled(False)
    if any(isinstance(m, nn.RNNBase) for m in module.modules()):
        # cuDNN's recurrent kernels refuse a backward pass in evaluation mode, and both hide
        # the products that the weights take part in.
        _switch(stack, torch.backends.cudnn, "enabled", False)
        _switch(stack, torch.backends.mkldnn, "enabled", False)


def _eager_code(stack: ExitStack) -> None:
    # Compiled code skips hooks. `disable`: inside compiled code no stance may be set.
    if not torch.compiler.is_compiling():
        stance = torch.compiler.disable(torch.compiler.set_stance)("force_eager")
        leave = torch.compiler.disable(stance.__exit__)
        _register(stack, "stance", partial(leave, None, None, None))


def _full_precision(stack: ExitStack, *, on_cpu: bool) -> None:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    # Since PyTorch 2.9 each operation has a precision of its own, beside the old switches.
    each = hasattr(torch.backends, "fp32_precision")
    _precision(
        stack,
        "products",
        _operations("cuda.matmul", "mkldnn.matmul") if each else [],
        torch.get_float32_matmul_precision,
        torch.set_float32_matmul_precision,
        "highest",
    )
    if each:
        _precision(stack, "oneDNN", _operations("mkldnn.conv", "mkldnn.rnn"))
    if not on_cpu:
        _precision(
            stack,
            "cuDNN",
            _operations("cudnn.conv", "cudnn.rnn") if each else [],
            lambda: cudnn.allow_tf32,
            lambda value: setattr(cudnn, "allow_tf32", value),
            False,
        )
        for name in (
            "allow_fp16_accumulation",
            "allow_fp16_reduced_precision_reduction",
            "allow_bf16_reduced_precision_reduction",
        ):
            if hasattr(matmul, name):
                _switch(stack, matmul, name, False)


def _operations(*names: str) -> list[_HasPrecision]:
    # Not all of them are in PyTorch's types.
    return [attrgetter(name)(torch.backends) for name in names]


def _precision(
    stack: ExitStack,
    key: str,
    operations: Sequence[_HasPrecision],
    get_old: Callable[[], _T | None] = lambda: None,
    set_old: Callable[[_T], None] = lambda _: None,
    exact: _T | None = None,
) -> None:
    # The old switch, too: where the two disagree, PyTorch's own functions that read it, like
    # torch.backends.cudnn.flags, raise an error.
    if operations and all(op.fp32_precision in ("none", "ieee") for op in operations):
        _register(stack, key, do_nothing)
        return
    try:
        old = get_old()
    except RuntimeError:  # They disagree as it is: the user has set the new one alone.
        old = None
    own: list[str] = [op.fp32_precision for op in operations]

    def restore() -> None:
        if old is not None:
            set_old(old)
        for op, precision in zip(operations, own, strict=True):
            op.fp32_precision = precision

    _register(stack, key, restore)
    if operations:
        own[:] = _own_precisions(operations)
    if old is not None and exact is not None:
        set_old(exact)
    for op in operations:
        op.fp32_precision = "ieee"


def _own_precisions(operations: Sequence[_HasPrecision]) -> list[str]:
    """Find the precision that was set for each operation itself; "none": it inherits."""
    # What an operation shows may be inherited from these, unless they have none.
    wholes = [cast(_HasPrecision, torch.backends), *_operations("cudnn")]
    own: list[str] = []
    try:
        for holder in (*wholes, *operations):
            own.append(holder.fp32_precision)
            holder.fp32_precision = "none"
            # oneDNN's as a whole cannot be set, so it may be inherited still.
            if holder.fp32_precision == own[-1]:
                own[-1] = "none"
    finally:
        for whole, precision in zip(wholes, own, strict=False):
            whole.fp32_precision = precision
    return own[len(wholes) :]


@reversible
def isolated(stack: ExitStack, module: nn.Module, trainable: Iterable[nn.Parameter] = ()) -> None:
    """Isolate a network, in evaluation mode with only some parameters trainable.

    Afterwards, also after an exception or an interrupt, all of this is what it was: every
    submodule's ``training`` flag, buffers and tensors in plain attributes, every parameter's value,
    ``requires_grad``, ``grad`` and gradient hooks, the global random states (Python, NumPy, PyTorch
    on the CPU and on every CUDA device) and PyTorch's process-wide switches. Inside,

    - gradient hooks of parameters and backward hooks of modules neither fire nor count, and the
      hooks that a network's own code registers in :func:`exact_mode` are ignored;
    - ``torch.compile``d code runs eagerly, because compiled code skips hooks;
    - attention and recurrent layers run as the operations they consist of, not as one kernel;
    - float32 products and convolutions have full precision: no TF32, no bfloat16.

    Isolations may overlap, of one network or of several, in threads or nested, and end in any
    order. A parameter that one of them makes trainable is so for all.

    Nothing that is set here belongs to one thread, so a generator may yield inside. What belongs
    to one is in :func:`exact_mode`.
    """
    parameters = list(trainable)
    tensors: list[Tensor] = [*module.parameters(), *module.buffers(), *parameters]
    with _lock:
        _register(stack, "random", _restore_random_states(was_seeded=False))
        _evaluation_mode(stack, module)
        _trainable(stack, module, parameters)
        _decomposed_kernels(stack, module)
        _eager_code(stack)
        _no_new_hooks(stack)
        _full_precision(stack, on_cpu=all(t.device.type == "cpu" for t in tensors))


@reversible
def exact_mode(stack: ExitStack, device: torch.device | None = None) -> None:
    """Compute with gradients and without autocast, in any modes of the caller.

    For the computation of one batch in one thread; no generator may yield inside, because its
    consumer would be in these modes too. Autocast inside the network's own forward pass works
    as ever. Autocast is off on the CPU and on the type of `device`, where the network is. Inside
    an isolation, gradient hooks that this thread registers meanwhile are ignored.
    """
    read = object()
    stack.callback(_this_thread.reads.discard, read)
    _this_thread.reads.add(read)
    # A backward pass in other threads might register hooks there, where it computes again.
    stack.enter_context(torch.autograd.set_multithreading_enabled(False))
    stack.enter_context(torch.inference_mode(False))
    stack.enter_context(torch.enable_grad())
    for kind in sorted({"cpu"} if device is None else {"cpu", device.type}):
        if torch.amp.is_autocast_available(kind):
            stack.enter_context(torch.autocast(kind, enabled=False))


@reversible
def same_grad_mode(stack: ExitStack) -> None:
    """Restore whether this thread computes gradients.

    PyTorch's own contexts may be left by an interrupt without that.
    """
    stack.callback(torch.set_grad_enabled, torch.is_grad_enabled())


@reversible
def seeded(stack: ExitStack, seed: int) -> None:
    """Seed the global random states, and restore them.

    They are PyTorch's on every device, that of NumPy's legacy generator and Python's.
    """
    with _lock:
        _register(stack, "random", _restore_random_states(was_seeded=True))
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
