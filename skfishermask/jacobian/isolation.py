"""Read a network in evaluation mode and full precision, and leave no trace of the visit.

A visit changes what everybody can see: flags of the network, and switches of the whole
process. Another visit may be under way meanwhile, in a second thread or in a generator that
was left open, and they may end in any order. So whoever changes a thing joins the line of
those who have, with a function that puts back what it found. If it is the last in line when
it ends, it puts that back; if not, the next in line inherits the function. Thus nothing is
put back under a visit that goes on, and the last one puts back what the first one found.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from operator import attrgetter
from typing import Protocol, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from skfishermask.jacobian.interrupts import Reversible
from skfishermask.jacobian.restoring import GRADIENT_HOOKS, restore_value, without_hooks

Restore = Callable[[], None]
_T = TypeVar("_T")


class _Precise(Protocol):
    """An operation, or all of a backend, with a precision of its own."""

    fp32_precision: str


class _Place:
    """A place in the line of those who have changed one thing."""

    def __init__(self, restore: Restore) -> None:
        self.restore = restore


_lines: dict[Hashable, list[_Place]] = {}
# Reentrant, because the garbage collector may end a visit while another one begins.
_lock = threading.RLock()


def _join(stack: ExitStack, thing: Hashable, restore: Restore) -> bool:
    """Join a line until `stack` closes. True if it was empty."""
    place = _Place(restore)
    line = _lines.setdefault(thing, [])
    stack.callback(_leave, thing, place)
    line.append(place)
    return len(line) == 1


def _leave(thing: Hashable, place: _Place) -> None:
    try:
        _put_back(thing, place)
    except BaseException:
        # An impatient second Ctrl-C must not leave it half done.
        _put_back(thing, place)
        raise


def _put_back(thing: Hashable, place: _Place) -> None:
    with _lock:
        line = _lines.get(thing, [])
        if place not in line:
            return
        if place is line[-1]:
            place.restore()
        else:
            line[line.index(place) + 1].restore = place.restore
        line.remove(place)
        if not line:
            del _lines[thing]


def _nothing() -> None:
    pass


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
    """Return the parameters that training changes, by name; where all are frozen, all.

    Another visit that is under way does not count: what it changes is the user's afterwards.

    Parameters
    ----------
    module : nn.Module
        The network.

    Returns
    -------
    dict of str to Parameter
        In the order of ``module.named_parameters()``.
    """

    def is_trainable(parameter: nn.Parameter) -> bool:
        line = _lines.get(("parameter", id(parameter)))
        restore = line[0].restore if line else None
        if isinstance(restore, _RestoreParameter):
            return restore.requires_grad
        return parameter.requires_grad

    parameters = dict(module.named_parameters())
    with _lock:
        found = {name: p for name, p in parameters.items() if is_trainable(p)}
    return found or {name: p for name, p in parameters.items() if p.is_floating_point()}


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
        _join(stack, ("module", id(m)), _restore_module(m))
    for m in module.modules():
        # Not by `eval()`, which some networks override to merge weights or to keep dropout.
        if m.training:
            m.training = False


def _trainable(stack: ExitStack, module: nn.Module, wanted: Sequence[nn.Parameter]) -> None:
    wanted_ids = {id(p) for p in wanted}
    for p in {id(p): p for p in (*module.parameters(), *wanted)}.values():
        alone = _join(stack, ("parameter", id(p)), _RestoreParameter(p))
        # A backward pass inside the network's own forward pass adds to a gradient of its own.
        if p.grad is not None:
            p.grad = None
        if id(p) in wanted_ids:
            if not p.requires_grad:
                p.requires_grad_(True)
        elif alone and p.requires_grad:
            p.requires_grad_(False)


def _switch(stack: ExitStack, holder: object, name: str, value: object) -> None:
    found = getattr(holder, name)
    # No switch is written without need: some hold more than what they show.
    restore = _nothing if found == value else partial(setattr, holder, name, found)
    _join(stack, (id(holder), name), restore)
    if found != value:
        setattr(holder, name, value)


def _decomposed_kernels(stack: ExitStack, module: nn.Module) -> None:
    # The fused inference kernel of attention calls no submodule.
    mha = torch.backends.mha
    _join(stack, "fast path", partial(mha.set_fastpath_enabled, mha.get_fastpath_enabled()))
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
        _join(stack, "stance", partial(torch.compiler.disable(stance.__exit__), None, None, None))


def _full_precision(stack: ExitStack, *, on_cpu: bool) -> None:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    # Since PyTorch 2.9 each operation has a precision of its own, beside the old switches.
    each = hasattr(torch.backends, "fp32_precision")
    _precision(
        stack,
        "products",
        _precise("cuda.matmul", "mkldnn.matmul") if each else [],
        torch.get_float32_matmul_precision,
        torch.set_float32_matmul_precision,
        "highest",
    )
    if each:
        _precision(stack, "oneDNN", _precise("mkldnn.conv", "mkldnn.rnn"))
    if not on_cpu:
        _precision(
            stack,
            "cuDNN",
            _precise("cudnn.conv", "cudnn.rnn") if each else [],
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


def _precise(*names: str) -> list[_Precise]:
    # Not all of them are in PyTorch's types.
    return [attrgetter(name)(torch.backends) for name in names]


def _precision(
    stack: ExitStack,
    thing: str,
    operations: Sequence[_Precise],
    get_old: Callable[[], _T | None] = lambda: None,
    set_old: Callable[[_T], None] = lambda _: None,
    exact: _T | None = None,
) -> None:
    # The old switch, too: where the two disagree, PyTorch's own functions that read it, like
    # torch.backends.cudnn.flags, raise an error.
    if operations and all(op.fp32_precision in ("none", "ieee") for op in operations):
        _join(stack, thing, _nothing)
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

    _join(stack, thing, restore)
    if operations:
        own[:] = _own_precisions(operations)
    if old is not None and exact is not None:
        set_old(exact)
    for op in operations:
        op.fp32_precision = "ieee"


def _own_precisions(operations: Sequence[_Precise]) -> list[str]:
    """Find the precision that was set for each operation itself; "none": it inherits."""
    # What an operation shows may be inherited from these, unless they have none.
    wholes = [cast(_Precise, torch.backends), *_precise("cudnn")]
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


def isolated(module: nn.Module, wanted: Iterable[nn.Parameter] = ()) -> Reversible:
    """Put a network into evaluation mode with only some parameters trainable, then put all back.

    Afterwards, also after an exception or an interrupt, all of this is what it was: every
    submodule's ``training`` flag, buffers and tensors in plain attributes, every parameter's value,
    ``requires_grad``, ``grad`` and gradient hooks, the global random states (Python, NumPy, PyTorch
    on the CPU and on every CUDA device) and PyTorch's process-wide switches. Inside,

    - gradient hooks of parameters and backward hooks of modules neither fire nor count;
    - ``torch.compile``d code runs eagerly, because compiled code skips hooks;
    - attention and recurrent layers run as the operations they consist of, not as one kernel;
    - float32 products and convolutions have full precision: no TF32, no bfloat16.

    Visits may overlap, of one network or of several, in threads or nested, and end in any
    order. A parameter that any of them wants is trainable.

    Nothing that is set here belongs to one thread, so a generator may yield inside a visit.
    What belongs to one is in :func:`exact_mode`.

    Parameters
    ----------
    module : nn.Module
        The network to read.
    wanted : iterable of nn.Parameter, default=()
        Parameters to differentiate with regard to, also those that are frozen otherwise.
    """
    return Reversible(partial(_isolate, module, list(wanted)))


def _isolate(module: nn.Module, wanted: Sequence[nn.Parameter], stack: ExitStack) -> None:
    tensors: list[Tensor] = [*module.parameters(), *module.buffers(), *wanted]
    with _lock:
        _join(stack, "random", _restore_random_states(was_seeded=False))
        _evaluation_mode(stack, module)
        _trainable(stack, module, wanted)
        _decomposed_kernels(stack, module)
        _eager_code(stack)
        _full_precision(stack, on_cpu=all(t.device.type == "cpu" for t in tensors))


def exact_mode(device: torch.device | None = None) -> Reversible:
    """Compute with gradients and without autocast, in any modes of the caller.

    For the computation of one batch in one thread; no generator may yield inside, because its
    consumer would be in these modes too. Autocast inside the network's own forward pass works
    as ever.

    Parameters
    ----------
    device : torch.device, optional
        Where the network is, if not on the CPU: autocast is off for devices of that type too.
    """
    return Reversible(partial(_exact_mode, {"cpu"} if device is None else {"cpu", device.type}))


def _exact_mode(kinds: Collection[str], stack: ExitStack) -> None:
    stack.enter_context(torch.inference_mode(False))
    stack.enter_context(torch.enable_grad())
    for kind in sorted(kinds):
        if torch.amp.is_autocast_available(kind):
            stack.enter_context(torch.autocast(kind, enabled=False))


def same_grad_mode() -> Reversible:
    """Have this thread's gradients switched on or off in the end as they were.

    PyTorch's own contexts may be left by an interrupt without that.
    """
    before = torch.is_grad_enabled()

    def change(stack: ExitStack) -> None:
        stack.callback(torch.set_grad_enabled, before)

    return Reversible(change)


def seeded(seed: int) -> Reversible:
    """Seed the global random states, for code that draws from them, and put them back.

    Parameters
    ----------
    seed : int
        For PyTorch on every device, NumPy's legacy generator and Python's.
    """
    return Reversible(partial(_seeded, seed))


def _seeded(seed: int, stack: ExitStack) -> None:
    with _lock:
        _join(stack, "random", _restore_random_states(was_seeded=True))
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
