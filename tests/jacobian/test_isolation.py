"""A network is read in evaluation mode and full precision, without side effects."""

from __future__ import annotations

import copy
import itertools
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import partial
from operator import attrgetter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from skfishermask import ParameterMask, fisher_diagonal, fisher_embedding
from skfishermask.fisher import embedding_blocks
from skfishermask.jacobian.isolation import exact_mode, isolated, seeded
from skfishermask.jacobian.module_io import output_layer
from tests import forked, networks

SINCE_2_9 = pytest.mark.skipif(
    not hasattr(torch.backends, "fp32_precision"), reason="a precision per operation: PyTorch 2.9"
)


class Careless(nn.Module):
    """A network that keeps state of every kind, draws numbers, and fails when told to."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(5)
        self.frozen_norm = nn.BatchNorm1d(5)
        self.hidden = nn.Linear(5, 4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.output = nn.Linear(4, 3)
        self.register_buffer("n_calls", torch.zeros(()))
        self.register_buffer("average", torch.zeros(4))
        self.register_buffer("latest", torch.zeros(2, 2))
        self.register_buffer("first", None)
        self.features: Tensor | None = None
        self.error: BaseException | None = None
        self.writes = True

    def forward(self, x: Tensor) -> Tensor:
        self.n_calls += 1
        self.latest = torch.randn(2, 2)
        np.random.rand(), random.random()  # noqa: NPY002
        h = self.frozen(torch.tanh(self.hidden(self.frozen_norm(self.norm(x)))))
        self.average.data.add_(h.detach().mean(0))  # Unseen by the buffer's version.
        if self.writes:
            self.frozen.weight.data.mul_(1.000001)
            self.hidden.weight.data = self.hidden.weight.data + 1e-6
            with torch.no_grad():
                self.output.bias.mul_(1.000001)
        self.output.weight.register_hook(lambda g: 0 * g)
        self.features, self.new = h, h
        if self.first is None:
            self.first = h.detach()
        if not hasattr(self, "late"):
            self.register_buffer("late", torch.ones(1))
        if self.error is not None:
            raise self.error
        return self.output(torch.dropout(h, 0.5, self.training))


def careless(*, hooks: bool = True) -> Careless:
    module = Careless().train()
    module.frozen_norm.eval()
    module(torch.randn(6, 5)).sum().backward()
    module.features = module.first = None
    del module.new, module.late
    module.output.register_forward_hook(lambda *_: None)
    if not hooks:
        return module
    module.hidden.register_full_backward_hook(fail)
    for p in (module.hidden.weight, module.output.bias, module.norm.weight):
        p.register_hook(fail)
        p.register_post_accumulate_grad_hook(fail)
    return module


def fail(*_: object) -> None:
    raise AssertionError("a hook fired")


def recurrent() -> nn.Module:
    return nn.Sequential(networks.recurrent("LSTM"), nn.BatchNorm1d(3)).train()


def shown(read: Callable[[], object]) -> object:
    try:
        return read()
    except RuntimeError:
        return "the old and the new interface disagree"


@partial(torch.compile, backend="eager")
def compiled(x: Tensor) -> Tensor:
    return x + 1 if torch.compiler.is_compiling() else x


def compiles() -> bool:
    """Whether compiled functions run, or are held back."""
    for _ in range(2):
        if compiled(torch.zeros(1)) == 1:
            return True
        torch.compiler.reset()  # It gives up on a function that was compiled too often.
    return False


def switches() -> dict[str, object]:
    backends = torch.backends
    matmul, cudnn, onednn = backends.cuda.matmul, backends.cudnn, backends.mkldnn
    found: dict[str, object] = {
        "cudnn": cudnn.enabled,
        "onednn": onednn.enabled,
        "fast path": backends.mha.get_fastpath_enabled(),
        "compiles": compiles(),
        "hooks": (Tensor.register_hook, Tensor.register_post_accumulate_grad_hook),
        "hooks of nodes": torch.autograd.Function._register_hook,
        "old products": shown(torch.get_float32_matmul_precision),
        "old cublas": shown(lambda: matmul.allow_tf32),
        "old cudnn": shown(lambda: cudnn.allow_tf32),
        "fp16": matmul.allow_fp16_reduced_precision_reduction,
        "bf16": matmul.allow_bf16_reduced_precision_reduction,
    }
    if hasattr(backends, "fp32_precision"):
        for holder in (backends, matmul, cudnn, cudnn.conv, cudnn.rnn, onednn):
            found[f"precision {len(found)}"] = holder.fp32_precision
        for holder in (onednn.matmul, onednn.conv, onednn.rnn):
            found[f"precision {len(found)}"] = holder.fp32_precision
    return found


def random_states() -> dict[str, object]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {
        "torch": torch.get_rng_state(),
        "cuda": cuda,
        "numpy": np.random.get_state()[1:],  # noqa: NPY002
        "python": random.getstate(),
    }


def state(module: nn.Module) -> dict[str, object]:
    """Everything that must not change, by value and by identity."""
    return {
        "training": [m.training for m in module.modules()],
        "trainable": [p.requires_grad for p in module.parameters()],
        "parameters": [(id(p), p.data_ptr(), p.detach().clone()) for p in module.parameters()],
        "parameters' hooks": [
            [
                [*(getattr(p, name, None) or {}).items()]
                for name in ("_backward_hooks", "_post_accumulate_grad_hooks")
            ]
            for p in module.parameters()
        ],
        "grads": [
            None if p.grad is None else (id(p.grad), p.grad.clone()) for p in module.parameters()
        ],
        "buffers": [
            [(name, id(b), b if b is None else b.clone()) for name, b in m._buffers.items()]
            for m in module.modules()
        ],
        "tensors": [
            [(name, id(t)) for name, t in vars(m).items() if isinstance(t, Tensor)]
            for m in module.modules()
        ],
        "hooks": [
            [len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)]
            for m in module.modules()
        ],
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")),
        **random_states(),
        **switches(),
    }


def same(a: object, b: object) -> bool:
    if not isinstance(b, type(a)):
        return False
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def changed(before: dict[str, object], after: dict[str, object]) -> list[str]:
    return [key for key in before if not same(before[key], after[key])]


def gradients(module: nn.Module, x: object) -> dict[str, Tensor]:
    """The gradient of the sum of the outputs, read in isolation."""
    wanted = dict(module.named_parameters())
    with isolated(module, wanted.values()), exact_mode():
        output = module(**x) if isinstance(x, dict) else module(x)
        output = output[0] if isinstance(output, tuple) else output
        grads = torch.autograd.grad(output.sum(), list(wanted.values()), allow_unused=True)
    return dict(zip(wanted, grads, strict=True))


def mask_of(module: nn.Module) -> ParameterMask:
    zeros = {name: torch.zeros_like(p.detach()) for name, p in module.named_parameters()}
    return ParameterMask.from_diagonal(zeros, "all", 1.0, output_layer=[])


READS = {
    "gradients": gradients,
    "diagonal": lambda m, x: fisher_diagonal(m, [x[:4], x[4:]]),
    "embedding": lambda m, x: fisher_embedding(m, [x[:4], x[4:]], mask_of(m)),
    "output layer": lambda m, x: output_layer(m, x),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_no_trace_after_reading(read: Callable[..., object]) -> None:
    module, x = careless(), torch.randn(6, 5)
    before = state(module)
    read(module, x)
    assert changed(before, state(module)) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_no_trace_after_an_exception(
    read: Callable[..., object], error: type[BaseException]
) -> None:
    module, x = careless(), torch.randn(6, 5)
    module.error = error("told to")
    before = state(module)
    with pytest.raises(error, match="told to"):
        read(module, x)
    assert changed(before, state(module)) == []


@pytest.mark.parametrize("name", networks.NETWORKS)
def test_no_trace_on_any_network(name: str) -> None:
    make, sample = networks.NETWORKS[name]
    module, x = make().train(), sample(3)
    before = state(module)
    gradients(module, x)
    assert changed(before, state(module)) == []


def test_a_generator_that_is_dropped_leaves_no_trace() -> None:
    module, x = careless(), torch.randn(6, 5)
    before = state(module)
    blocks = embedding_blocks(module, [x[:3], x[3:]], mask_of(module))
    next(blocks)
    assert "training" in changed(before, state(module))  # It is isolated.
    blocks.close()
    assert changed(before, state(module)) == []


class TrainedMeanwhile(nn.Module):
    """It is put into training mode during its second forward pass."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.linear, self.dropout, self.n_calls = nn.Linear(5, 3), nn.Dropout(), 0
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        self.n_calls += 1
        if self.n_calls == 2:
            target = self.dropout.train if self.how == "a thread, in part" else self.train
            thread = threading.Thread(target=target)
            thread.run() if self.how == "itself" else thread.start()
            if self.how != "itself":
                thread.join()
        return self.dropout(self.linear(x))


@pytest.mark.parametrize("how", ["a thread", "a thread, in part", "itself"])
@pytest.mark.parametrize("read", [READS["diagonal"], READS["embedding"]])
def test_a_network_that_is_trained_meanwhile_is_refused(
    read: Callable[..., object], how: str
) -> None:
    module, x = TrainedMeanwhile(how).eval(), torch.randn(6, 5)
    with pytest.raises(RuntimeError, match="training mode while it was read"):
        read(module, x)


class WritesToItsInput(nn.Module):
    """In one of the ways that networks do."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.linear, self.how = nn.Linear(5, 3), how

    def forward(self, x: Tensor) -> Tensor:
        match self.how:
            case "in place":
                x.sub_(0.3)
            case "data":
                x.data.mul_(2)
            case "out":
                torch.tanh(x, out=x)
            case "view":
                x[:, :2] = 0
            case "fill":
                x.masked_fill_(x > 0, 0.1)
            case "NumPy":
                x.numpy()[:, 0] *= 3
            case "other memory":
                x.set_(x + 1)
        return self.linear(x)


@pytest.mark.parametrize(
    "how", ["in place", "data", "out", "view", "fill", "NumPy", "other memory"]
)
def test_the_users_tensors_are_not_written_to(how: str) -> None:
    torch.manual_seed(0)
    module, x = WritesToItsInput(how), torch.randn(6, 5)
    before = x.clone()
    found = fisher_diagonal(module, [x[:4], x[4:]])
    embedded = fisher_embedding(module, [x], mask_of(module))
    assert torch.equal(x, before)
    module(x)
    module.how = "not at all"
    torch.testing.assert_close(found, fisher_diagonal(module, [x[:4], x[4:]]))
    torch.testing.assert_close(embedded, fisher_embedding(module, [x], mask_of(module)))


class WritesToItself(nn.Module):
    """In ways that no version of a tensor counts, or that change its shape."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.linear, self.how = nn.Linear(5, 3), how
        self.register_buffer("total", torch.zeros(3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        match self.how:
            case "a weight, through NumPy":
                self.linear.weight.detach().numpy()[0] *= 1.000001
            case "a buffer, resized":
                self.total.resize_(len(self.total) + 2).fill_(1)
            case "a buffer, deleted":
                self._buffers.pop("total", None)
        return self.linear(x)


@pytest.mark.parametrize(
    "how", ["a weight, through NumPy", "a buffer, resized", "a buffer, deleted"]
)
@pytest.mark.parametrize("read", [READS["diagonal"], READS["embedding"]])
def test_what_a_forward_pass_writes_to_the_network_is_undone(
    read: Callable[..., object], how: str
) -> None:
    module, x = WritesToItself(how), torch.randn(6, 5)
    before = state(module)
    read(module, x)
    assert changed(before, state(module)) == []


def test_only_wanted_parameters_are_trainable() -> None:
    module = careless()
    wanted = [module.hidden.weight, module.frozen.weight]
    with isolated(module, wanted):
        assert not any(m.training for m in module.modules())
        trainable = [p for p in module.parameters() if p.requires_grad]
        assert list(map(id, trainable)) == list(map(id, wanted))
    with isolated(module):
        assert not any(p.requires_grad for p in module.parameters())


def test_a_backward_pass_of_the_networks_own_adds_to_no_gradient() -> None:
    class OwnBackward(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            super().forward(x).square().sum().backward()
            return super().forward(x)

    module, x = OwnBackward(4, 3), torch.randn(2, 4)
    module(x)
    before = state(module)
    gradients(module, x)
    assert changed(before, state(module)) == []


def test_graphs_made_before_stay_valid() -> None:
    module, x = careless(hooks=False).eval(), torch.randn(6, 5)
    module.frozen_norm.momentum, module.writes = None, False
    loss = module.output(torch.tanh(module.hidden(module.norm(x)))).sum()
    gradients(module, x)
    loss.backward()  # It would not be, had an unchanged buffer been written to.


def test_evaluation_mode_is_a_flag_alone() -> None:
    class Merging(nn.Linear):
        """As LoRA layers do: `eval` adds one weight to the other, `train` takes it off again."""

        def train(self, mode: bool = True) -> Merging:
            with torch.no_grad():
                self.weight.add_(-1.0 if mode else 1.0)
            return super().train(mode)

    module, x = Merging(4, 3), torch.randn(2, 4)
    before = state(module)
    gradients(module, x)
    assert changed(before, state(module)) == []


def test_evaluation_mode_reaches_scripted_networks() -> None:
    module = torch.jit.script(networks.mlp()).train()
    with isolated(module):
        assert not any(m.training for m in module.modules())
    assert all(m.training for m in module.modules())


@pytest.mark.parametrize(
    "decorate",
    [nn.utils.weight_norm, nn.utils.spectral_norm],
    ids=["weight_norm", "spectral_norm"],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_weights_computed_by_hooks(decorate: Callable[[nn.Module], nn.Module]) -> None:
    module, x = nn.Sequential(decorate(nn.Linear(4, 3))).train(), torch.randn(2, 4)
    with torch.no_grad():
        module(x)
    before = state(module)
    gradients(module, x)
    assert changed(before, state(module)) == []
    copy.deepcopy(module)  # Impossible while an attribute holds a part of a graph.


@pytest.mark.parametrize("name", ["weight_norm", "spectral_norm"])
def test_parametrised_weights(name: str) -> None:
    module = nn.Sequential(getattr(nn.utils.parametrizations, name)(nn.Linear(4, 3))).train()
    x = torch.randn(2, 4)
    before = state(module)
    found = gradients(module, x)
    assert all(g is not None for g in found.values())
    assert changed(before, state(module)) == []


def test_data_parallel() -> None:
    module, x = nn.DataParallel(careless()), torch.randn(6, 5)
    before = state(module)
    gradients(module, x)
    assert changed(before, state(module)) == []


# Several isolations at once.


def orders(n_isolations: int) -> list[tuple[int, ...]]:
    """Every order of n entries and n exits, each as the number of its isolation."""
    steps = [i for i in range(n_isolations) for _ in range(2)]
    return sorted(set(itertools.permutations(steps)))


@pytest.mark.parametrize("same_network", [True, False])
@pytest.mark.parametrize("order", orders(2), ids=str)
def test_two_isolations_overlap_in_any_order(order: tuple[int, ...], same_network: bool) -> None:
    torch.set_float32_matmul_precision("high")
    first = recurrent()
    modules = [first, first if same_network else recurrent()]
    wanted = [list(modules[0].parameters())[:2], list(modules[1].parameters())[1:3]]
    contexts = [isolated(m, w) for m, w in zip(modules, wanted, strict=True)]
    before = [state(m) for m in modules]
    inside: list[int] = []
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        threads = [one, other]
        for i in order:
            if i in inside:
                threads[i].submit(contexts[i].__exit__, None, None, None).result()
                inside.remove(i)
            else:
                threads[i].submit(contexts[i].__enter__).result()
                inside.append(i)
            for j in inside:
                assert not any(m.training for m in modules[j].modules())
                assert all(p.requires_grad for p in wanted[j])
                modules[j][1].running_mean += 1.0
                torch.rand(1)
            if inside:
                found = switches()
                assert not found["compiles"]
                assert not found["fast path"]
                assert not found["cudnn"]
                assert not found["onednn"]
                assert found["old products"] == "highest"
    after = [state(m) for m in modules]
    torch.set_float32_matmul_precision("highest")
    for a, b in zip(before, after, strict=True):
        assert changed(a, b) == []


def enter_or_leave(contexts: list[Any], inside: set[int], i: int) -> None:
    if i in inside:
        contexts[i].__exit__(None, None, None)
    else:
        contexts[i].__enter__()
    inside ^= {i}


def test_three_isolations_overlap_in_any_order() -> None:
    module = careless()
    before = state(module)
    for order in orders(3):
        contexts = [isolated(module), isolated(module, [module.hidden.weight]), isolated(module)]
        inside: set[int] = set()
        for i in order:
            enter_or_leave(contexts, inside, i)
            assert not any(m.training for m in module.modules()) or not inside
            assert module.hidden.weight.requires_grad or 1 not in inside
            module.n_calls += len(inside)
        assert (order, changed(before, state(module))) == (order, [])


def test_many_threads_isolate() -> None:
    modules = [careless(), recurrent(), careless()]
    before = [state(m) for m in modules]
    failures: list[str] = []

    def work(seed: int) -> None:
        draws = random.Random(seed)
        for _ in range(15):
            module = draws.choice(modules)
            with isolated(module, list(module.parameters())[:1]):
                time.sleep(draws.uniform(0, 0.003))
                if any(m.training for m in module.modules()):
                    failures.append("training")
                if torch.backends.mha.get_fastpath_enabled():
                    failures.append("fast path")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    for module, found in zip(modules, before, strict=True):
        assert changed(found, state(module)) == []


# Switches of the process.


def set_old(name: str) -> Callable[[], None]:
    return lambda: torch.set_float32_matmul_precision(name)


def set_new(path: str, value: str = "tf32") -> Callable[[], None]:
    return lambda: setattr(attrgetter(path)(torch), "fp32_precision", value)


@pytest.fixture
def precision() -> Iterator[Callable[[str], None]]:
    """Set the precision as a user would, here or in another test."""

    def set_to(name: str) -> None:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = True
        if hasattr(torch.backends, "fp32_precision"):
            for path in EACH:
                set_new(path, "none")()
        for change in PRECISIONS[name]:
            change()

    yield set_to
    set_to("default")
    if hasattr(torch.backends, "fp32_precision"):
        set_new("backends.cudnn.conv")()
        set_new("backends.cudnn.rnn")()


EACH = [
    "backends",
    "backends.cudnn",
    "backends.cuda.matmul",
    "backends.mkldnn.matmul",
    "backends.mkldnn.conv",
    "backends.mkldnn.rnn",
]
PRECISIONS = {
    "default": [],
    "high": [set_old("high")],
    "medium": [set_old("medium")],
    "cublas": [lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True)],
    "no cudnn": [lambda: setattr(torch.backends.cudnn, "allow_tf32", False)],
}
OLD = list(PRECISIONS)
PRECISIONS |= {
    "all": [set_new("backends")],
    "all ieee": [set_new("backends", "ieee")],
    "cuda products": [set_new("backends.cuda.matmul")],
    "cudnn": [set_new("backends.cudnn")],
    "convolutions": [set_new("backends.cudnn.conv", "ieee")],
    "recurrent": [set_new("backends.cudnn.rnn", "ieee")],
    "cpu products": [set_new("backends.mkldnn.matmul", "bf16")],
    "cpu convolutions": [set_new("backends.mkldnn.conv", "bf16")],
    "old and new": [set_old("high"), set_new("backends.cuda.matmul", "ieee")],
    "one and all": [set_new("backends"), set_new("backends.cuda.matmul", "ieee")],
}
EVERY = [name if name in OLD else pytest.param(name, marks=SINCE_2_9) for name in PRECISIONS]
# No weight of this one is on the CPU, which is all that counts here.
ELSEWHERE = nn.Linear(4, 3, device="meta")
PLACES = {"cpu": nn.Linear(4, 3), "elsewhere": ELSEWHERE}


def reduced() -> dict[str, object]:
    """The switches that admit less than full precision, on the CPU and elsewhere."""
    matmul, cudnn, onednn = (
        torch.backends.cuda.matmul,
        torch.backends.cudnn,
        torch.backends.mkldnn,
    )
    if not hasattr(torch.backends, "fp32_precision"):
        cpu = {"products": torch.get_float32_matmul_precision() != "highest"}
        elsewhere = {"convolutions": cudnn.allow_tf32}
    else:
        of = {"matmul": onednn.matmul, "conv": onednn.conv, "rnn": onednn.rnn, "cublas": matmul}
        cpu = {k: v.fp32_precision not in ("none", "ieee") for k, v in of.items()}
        of = {"cudnn conv": cudnn.conv, "cudnn rnn": cudnn.rnn}
        elsewhere = {k: v.fp32_precision not in ("none", "ieee") for k, v in of.items()}
    elsewhere["fp16"] = matmul.allow_fp16_reduced_precision_reduction
    elsewhere["bf16"] = matmul.allow_bf16_reduced_precision_reduction
    return {
        "cpu": [k for k, v in cpu.items() if v],
        "elsewhere": [k for k, v in {**cpu, **elsewhere}.items() if v],
    }


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("place", PLACES)
def test_full_precision_inside_and_the_users_outside(
    precision: Callable[[str], None], name: str, place: str
) -> None:
    def later() -> list[dict[str, object]]:
        """What the switches say, now and when that of all operations changes."""
        found = [switches()]
        for value in ("bf16", "none") if hasattr(torch.backends, "fp32_precision") else ():
            torch.backends.fp32_precision = value
            found.append(switches())
        return found

    precision(name)
    expected = later()
    precision(name)
    with isolated(PLACES[place]), isolated(PLACES[place]):
        assert reduced()[place] == []
    assert same(later(), expected)


@pytest.mark.parametrize("name", OLD)
@pytest.mark.parametrize("place", PLACES)
def test_cudnn_flags_inside(precision: Callable[[str], None], name: str, place: str) -> None:
    precision(name)
    before = switches()
    with isolated(PLACES[place]):
        with torch.backends.cudnn.flags(enabled=False):
            assert not torch.backends.cudnn.enabled
        torch.get_float32_matmul_precision()
        assert reduced()[place] == []
    assert changed(before, switches()) == []


def test_reductions_without_split_k(precision: Callable[[str], None]) -> None:
    matmul = torch.backends.cuda.matmul
    if not hasattr(matmul, "allow_fp16_reduced_precision_reduction_split_k"):
        pytest.skip("PyTorch has no such switch yet")
    try:
        matmul.allow_fp16_reduced_precision_reduction = (False, False)
        with isolated(ELSEWHERE):
            assert not matmul.allow_fp16_reduced_precision_reduction
        assert not matmul.allow_fp16_reduced_precision_reduction_split_k
    finally:
        matmul.allow_fp16_reduced_precision_reduction = True


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layer", [nn.RNN, nn.GRU, nn.LSTM])
def test_recurrent_layers_run_as_products(layer: type[nn.RNNBase], dtype: torch.dtype) -> None:
    module, x = layer(3, 4).to(dtype), torch.randn(5, 2, 3, dtype=dtype)
    with isolated(module, module.parameters()), exact_mode():
        todo = [module(x)[0].grad_fn]
        names = set()
        while todo:
            node = todo.pop()
            names.add(node.name())
            todo += [parent for parent, _ in node.next_functions if parent is not None]
    assert "AddmmBackward0" in names
    assert not any("Rnn" in name or "Lstm" in name for name in names)


def test_attention_runs_its_layers() -> None:
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    module, calls = nn.TransformerEncoder(layer, 1).train(), []
    module.layers[0].linear1.register_forward_hook(lambda *_: calls.append(1))
    with isolated(module), torch.no_grad():
        module(torch.randn(2, 3, 4))
    assert calls == [1]


def test_compiled_networks_run_eagerly() -> None:
    compiled: list[object] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        compiled.append(graph)
        return graph.forward

    module, x = torch.compile(networks.mlp(), backend=backend).train(), torch.randn(4, 5)
    before = state(module)
    gradients(module, x)
    assert compiled == []
    assert changed(before, state(module)) == []
    module(x)
    assert len(compiled) == 1


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace")
def test_isolation_in_compiled_code() -> None:
    module, x = networks.mlp().train(), torch.randn(4, 5)
    expected, before = gradients(module, x), state(module)
    found = torch.compile(lambda: gradients(module, x), backend="eager")()
    assert same(found, expected)
    assert changed(before, state(module)) == []


# Modes of one thread.


AROUND: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "autocast on CUDA": lambda: torch.autocast("cuda", dtype=torch.bfloat16, enabled=False),
}


@pytest.mark.parametrize("mode", AROUND)
def test_modes_of_the_caller_do_not_count(mode: str) -> None:
    module, x = careless(), torch.randn(6, 5)
    expected = gradients(module, x)
    with AROUND[mode]():
        before = state(module)
        found = gradients(module, x)
        assert changed(before, state(module)) == []
    assert same(found, expected)


def test_modes_of_the_caller_hold_in_isolation() -> None:
    module = careless()
    with torch.inference_mode(), torch.autocast("cpu"), isolated(module):
        assert torch.is_inference_mode_enabled()
        assert torch.is_autocast_enabled("cpu")
    with isolated(module), torch.no_grad():
        assert not torch.is_grad_enabled()


def test_autocast_of_the_networks_own_works() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16), exact_mode():
        a = torch.ones(2, 2)
        assert (a @ a).dtype == torch.float32
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert (a @ a).dtype == torch.bfloat16


def test_exact_mode_on_any_kind_of_device() -> None:
    for kind in ("cpu", "cuda", "meta"):
        with torch.autocast("cuda", enabled=False), exact_mode(torch.device(kind)):
            assert torch.is_grad_enabled()


# Random states.


def draws() -> tuple[float, ...]:
    return torch.rand(()).item(), np.random.rand(), random.random()  # noqa: NPY002


def test_seeds_nest() -> None:
    module = careless()
    with seeded(1):
        alone = [draws(), draws()]
    before = random_states()
    with seeded(1):
        found = [draws()]
        with seeded(2):
            draws()
        with isolated(module):
            draws()
        found.append(draws())
    assert found == alone
    assert changed(before, random_states()) == []


@pytest.mark.parametrize("order", orders(2), ids=str)
def test_seeds_overlap_in_any_order(order: tuple[int, ...]) -> None:
    before, inside = random_states(), set[int]()
    contexts = [seeded(1), seeded(2)]
    for i in order:
        enter_or_leave(contexts, inside, i)
        if inside:
            draws()
    assert changed(before, random_states()) == []


@pytest.mark.cuda
def test_seeds_on_cuda() -> None:
    torch.rand(3, device="cuda")
    before = random_states()
    with seeded(1):
        found = torch.rand(3, device="cuda")
    assert changed(before, random_states()) == []
    with seeded(1):
        assert torch.equal(torch.rand(3, device="cuda"), found)
    assert changed(before, random_states()) == []


COLD_CUDA = """
import torch
from skfishermask.jacobian.isolation import seeded

torch.manual_seed(5)
with seeded(1):
    {inside}
found = torch.rand(3, device="cuda")
torch.manual_seed(5)
assert torch.equal(found, torch.rand(3, device="cuda"))
"""


@pytest.mark.cuda
@pytest.mark.parametrize("inside", ["pass", 'torch.rand(3, device="cuda")'])
def test_seeds_where_cuda_has_not_begun(inside: str) -> None:
    subprocess.run([sys.executable, "-c", COLD_CUDA.format(inside=inside)], check=True)


def begins_cuda() -> bool:
    with seeded(1), isolated(nn.Linear(1, 1)):
        pass
    return torch.cuda.is_initialized()


@pytest.mark.xdist_group("processes")
def test_a_seed_does_not_begin_cuda() -> None:
    assert forked.run(begins_cuda) == (0, False)


@pytest.mark.cuda
@pytest.mark.parametrize("make", [careless, recurrent])
def test_no_trace_on_cuda(make: Callable[[], nn.Module]) -> None:
    module = make().cuda()
    x = torch.randn(6, 5, device="cuda") if make is careless else torch.randn(2, 4, 3).cuda()
    before = state(module)
    gradients(module, x)
    assert changed(before, state(module)) == []
