"""The guest's manners: read a network in evaluation mode and leave no trace of the visit."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@contextmanager
def _random_states(devices: list[torch.device]) -> Iterator[None]:
    # NumPy's legacy generator is the one that users' code may draw from.
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


@contextmanager
def seeded(seed: int, devices: list[torch.device]) -> Iterator[None]:
    """Seed the global random states, for code that draws from them, and put them back.

    Parameters
    ----------
    seed : int
        For PyTorch, NumPy's legacy generator and Python's.
    devices : list of torch.device
        CUDA devices whose generators are seeded too.
    """
    with _random_states(devices):
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        random.seed(seed)
        yield


@contextmanager
def _buffers(module: nn.Module) -> Iterator[None]:
    saved = [
        (owner, name, buffer, buffer._version, buffer.detach().clone())
        for owner in module.modules()
        for name, buffer in owner._buffers.items()
        # Nothing outside inference mode can write to an inference tensor.
        if buffer is not None and not buffer.is_inference()
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for owner, name, buffer, version, value in saved:
                owner._buffers[name] = buffer
                if buffer._version != version:
                    buffer.copy_(value)


@contextmanager
def _flags(module: nn.Module) -> Iterator[None]:
    # Per submodule: a frozen BatchNorm inside a training network has a flag of its own.
    training = [(m, m.training) for m in module.modules()]
    trainable = [(p, p.requires_grad) for p in module.parameters()]
    try:
        module.eval()
        for parameter, _ in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for m, flag in training:
            m.training = flag
        for parameter, flag in trainable:
            parameter.requires_grad_(flag)


@contextmanager
def _set(holder: Any, name: str, value: object) -> Iterator[None]:
    before = getattr(holder, name)
    setattr(holder, name, value)
    try:
        yield
    finally:
        setattr(holder, name, before)


@contextmanager
def _exact_kernels(module: nn.Module) -> Iterator[None]:
    cudnn, mha = torch.backends.cudnn, torch.backends.mha
    fastpath = mha.get_fastpath_enabled()
    # cuDNN's recurrent kernels refuse a backward pass in evaluation mode.
    recurrent = any(isinstance(m, nn.RNNBase) for m in module.modules())
    with ExitStack() as stack:
        # The fused inference kernel of attention calls no submodule.
        mha.set_fastpath_enabled(False)
        stack.callback(mha.set_fastpath_enabled, fastpath)
        stack.enter_context(_set(cudnn, "enabled", cudnn.enabled and not recurrent))
        if hasattr(cudnn, "conv"):  # Since PyTorch 2.9 each operator has a precision.
            stack.enter_context(_set(cudnn.conv, "fp32_precision", "ieee"))
        else:
            stack.enter_context(_set(cudnn, "allow_tf32", False))
        yield


@contextmanager
def visiting(module: nn.Module) -> Iterator[None]:
    """Put a network into evaluation mode with no parameter trainable, then put all back.

    Afterwards, also after an exception, every submodule's ``training`` flag, every
    parameter's ``requires_grad``, every buffer and the global random states (Python, NumPy,
    PyTorch on the CPU and on the network's devices) are what they were. Inside,
    ``torch.compile``d code runs eagerly, because compiled code skips hooks, and TF32 is off
    in convolutions.

    Parameters
    ----------
    module : nn.Module
        The network to read.
    """
    tensors: list[Tensor] = [*module.parameters(), *module.buffers()]
    devices = sorted({t.device for t in tensors if t.device.type == "cuda"}, key=str)
    with ExitStack() as stack:
        stack.enter_context(_random_states(devices))
        stack.enter_context(_buffers(module))
        stack.enter_context(_flags(module))
        stack.enter_context(_exact_kernels(module))
        if not torch.compiler.is_compiling():
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        yield
