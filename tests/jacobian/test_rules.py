"""Every operation that a parameter may enter, by itself, in every layout of the samples."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from skfishermask import ParameterMask, fisher_diagonal, fisher_embedding
from skfishermask.fisher.likelihood import categorical_factor
from skfishermask.jacobian.gradient_forms import BroadcastGrad
from skfishermask.jacobian.rules import RULES
from tests import oracles
from tests.networks import Net, randomised, weight

Make = Callable[[], nn.Module]
# As many samples as positions: shapes alone cannot tell them apart.
N = T = 4


def on(run: Callable[..., Tensor], *shapes: tuple[int, ...]) -> Make:
    """Return a network `run(x, *parameters)` with random parameters of these shapes."""

    def make() -> nn.Module:
        parts = {f"p{i}": weight(*shape) for i, shape in enumerate(shapes)}
        return Net(lambda net, x: run(x, *(getattr(net, name) for name in parts)), **parts)

    return make


# --------------------------------------------------------------------------------------
# Operations on rows of five numbers, with any axes before them
# --------------------------------------------------------------------------------------

ROWS: dict[str, Make] = {
    # Products
    "linear": lambda: nn.Linear(5, 3),
    "linear without bias": lambda: nn.Linear(5, 3, bias=False),
    "x W": on(lambda x, w: x @ w, (5, 3)),
    "x W^T + b": on(lambda x, w, b: x @ w.T + b, (3, 5), (3,)),
    "W x": on(lambda x, w: (w @ x[..., None])[..., 0], (3, 5)),
    "W x, batched": on(lambda x, w: torch.matmul(w.expand(2, 3, 5), x[..., None, :, None]), (3, 5)),
    "product with a vector": on(lambda x, w: (x @ w)[..., None], (5,)),
    "product with one column": on(lambda x, w: x @ w, (5, 1)),
    "einsum": on(lambda x, w: torch.einsum("...i,ijk->...jk", x, w), (5, 2, 3)),
    "einsum of two": on(lambda x, v, w: torch.einsum("...i,ij,jk->...k", x, v, w), (5, 2), (2, 3)),
    "tensordot": on(lambda x, w: torch.tensordot(x, w, dims=([-1], [1])), (3, 5)),
    "the same weight twice": on(lambda x, w: torch.tanh(x @ w) @ w, (5, 5)),
    "weight times itself, in steps": on(lambda x, w: (x @ w) @ w.T, (5, 3)),
    "quadratic": on(lambda x, w: ((x @ w) * x).sum(-1, keepdim=True), (5, 5)),
    # Broadcast sums and products
    "shift": on(lambda x, b: x + b, (5,)),
    "shift, scaled": on(lambda x, b: torch.add(x, b, alpha=3), (5,)),
    "shift by one number": on(lambda x, b: x + b, (1,)),
    "shift by a scalar": on(lambda x, b: x + b, ()),
    "taken away": on(lambda x, b: x - b, (5,)),
    "taken from": on(lambda x, b: b - x, (5,)),
    "scale": on(lambda x, w: w * x, (5,)),
    "scale by one number": on(lambda x, w: x * w, (1,)),
    "scale by a scalar": on(lambda x, w: x * w, ()),
    "scale and shift": on(lambda x, w, b: x * w + b, (5,), (5,)),
    "addcmul": on(lambda x, v, w: torch.addcmul(v, x, w, value=2), (5,), (5,)),
    "addcmul from the left": on(lambda x, w: torch.addcmul(x, w, torch.sin(x), value=3), (5,)),
    "outer product": on(lambda x, w: x[..., None] * w, (5, 3)),
    "outer product, summed": on(lambda x, w: (x[..., None] * w).sum(-2), (5, 3)),
    "parameter seen by no input": on(lambda x, b: x + b + b.expand_as(x), (5,)),
    "joined to every row": on(lambda x, b: torch.cat([x, b.expand_as(x)], -1), (5,)),
    # Views
    "transposed": on(lambda x, w: F.linear(x, w.t()), (5, 3)),
    "reshaped": on(lambda x, w: x @ w.view(5, 3), (15,)),
    "permuted": on(lambda x, w: x @ w.permute(2, 0, 1).flatten(1), (3, 2, 5)),
    "sliced": on(lambda x, w: x @ w[1:6, ::2], (7, 6)),
    "row of a table": on(lambda x, w: x * w[2], (3, 5)),
    "column of a table": on(lambda x, w: x * w[:, -1], (5, 3)),
    "split": on(lambda x, w: x @ w.split([2, 3])[1].mT, (5, 5)),
    "unbound": on(lambda x, w: torch.cat([x @ one for one in w.unbind()], -1), (2, 5, 3)),
    "stretched": on(lambda x, w: x @ w.expand(5, 3), (1, 3)),
    "new axes": on(lambda x, w: x[..., None, :] @ w.unsqueeze(0).squeeze(0), (5, 3)),
    "other strides": on(lambda x, w: x @ w.mT.contiguous(), (3, 5)),
    "copied": on(lambda x, w: x @ w.clone(), (5, 3)),
    "joined": on(lambda x, v, w: F.linear(x, torch.cat([v, w])), (2, 5), (3, 5)),
    "stacked": on(lambda x, v, w: x @ torch.stack([v, w], 1), (5,), (5,)),
    "half a use": on(lambda x, w: torch.cat([x @ w[:, :2], torch.tanh(x) @ w[:, 1:]], -1), (5, 3)),
    # Norms
    "layer_norm": lambda: nn.LayerNorm(5),
    "layer_norm without bias": lambda: nn.LayerNorm(5, bias=False),
    "rms_norm": lambda: nn.RMSNorm(5),
    "rms_norm, written": on(
        lambda x, w: w * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6), (5,)
    ),
}

# --------------------------------------------------------------------------------------
# Operations with one axis before the sample's own
# --------------------------------------------------------------------------------------

CONV = [
    {"kernel_size": 3},
    {"kernel_size": 2, "stride": 2},
    {"kernel_size": 3, "padding": 2, "dilation": 2},
    {"kernel_size": 3, "padding": "same", "groups": 2},
    {"kernel_size": 3, "padding": "valid", "groups": 4, "bias": False},
    {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
    {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    {"kernel_size": 3, "padding": 1, "padding_mode": "replicate"},
    {"kernel_size": 1},
]
CONV_TRANSPOSE = [
    {"kernel_size": 3},
    {"kernel_size": 2, "stride": 2, "bias": False},
    {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1},
    {"kernel_size": 2, "dilation": 2, "groups": 2},
    {"kernel_size": 3, "padding": 2, "groups": 4},
]


def patches(x: Tensor, w: Tensor) -> Tensor:
    """Convolve, as a product with unfolded windows."""
    return w @ F.unfold(x, 2)


# name -> (operation, shape of one sample)
FLAT: dict[str, tuple[Make, tuple[int, ...]]] = {
    "addmm": (on(lambda x, b, w: torch.addmm(b, x, w), (3,), (5, 3)), (5,)),
    "addmm, scaled": (
        on(lambda x, b, w: torch.addmm(b, x, w, beta=0.5, alpha=2), (3,), (5, 3)),
        (5,),
    ),
    "addmm from the left": (
        on(lambda x, b, w: torch.addmm(b, w, x.T, alpha=2).T, (3, 1), (3, 5)),
        (5,),
    ),
    "W x^T": (on(lambda x, w: (w @ x.T).T, (3, 5)), (5,)),
    "mv": (on(lambda x, w: torch.mv(x, w)[:, None], (5,)), (5,)),
    "bmm": (on(lambda x, w: torch.bmm(x, w.expand(len(x), 5, 3)), (5, 3)), (2, 5)),
    "bmm from the left": (on(lambda x, w: torch.bmm(w.expand(len(x), 3, 2), x), (3, 2)), (2, 5)),
    "baddbmm": (
        on(
            lambda x, b, w: torch.baddbmm(b, x, w.expand(len(x), 5, 3), beta=0.5, alpha=2),
            (1, 1, 3),
            (5, 3),
        ),
        (2, 5),
    ),
    "one product a head": (
        on(lambda x, w: torch.bmm(x.transpose(0, 1), w).transpose(0, 1), (2, 5, 3)),
        (2, 5),
    ),
    "sum over a stretched weight": (
        on(lambda x, w: (w.expand(len(x), 3, 5) * x[:, None]).sum(2), (3, 5)),
        (5,),
    ),
    "token in front": (
        on(lambda x, w: torch.cat([w.expand(len(x), 1, 5), x], 1), (1, 1, 5)),
        (2, 5),
    ),
    "position table": (on(lambda x, w: x + w, (2, 5)), (2, 5)),
    "position table, sliced": (on(lambda x, w: x + w[:, : x.shape[1]], (1, 7, 5)), (2, 5)),
    "scale of channels": (on(lambda x, w: x * w[:, None, None], (3,)), (3, 2, 2)),
    "unfolded": (on(patches, (3, 8)), (2, 3, 3)),
    "batch_norm1d": (lambda: nn.BatchNorm1d(4), (4,)),
    "batch_norm1d over positions": (lambda: nn.BatchNorm1d(4), (4, 5)),
    "batch_norm2d": (lambda: nn.BatchNorm2d(4), (4, 3, 2)),
    "batch_norm3d": (lambda: nn.BatchNorm3d(4), (4, 3, 2, 2)),
    "instance_norm1d": (lambda: nn.InstanceNorm1d(3, affine=True), (3, 5)),
    "instance_norm2d": (lambda: nn.InstanceNorm2d(3, affine=True), (3, 2, 3)),
    "instance_norm of known moments": (
        lambda: nn.InstanceNorm1d(3, affine=True, track_running_stats=True),
        (3, 5),
    ),
    "layer_norm of two axes": (lambda: nn.LayerNorm([3, 4]), (2, 3, 4)),
    "group_norm": (lambda: nn.GroupNorm(2, 4), (4, 3, 3)),
    "group_norm of vectors": (lambda: nn.GroupNorm(2, 4), (4,)),
    "rms_norm of two axes": (lambda: nn.RMSNorm([3, 4]), (2, 3, 4)),
    "bilinear": (
        lambda: Net(lambda net, x: net.pair(x, torch.sin(x)), pair=nn.Bilinear(5, 5, 3)),
        (5,),
    ),
    "rnn_cell": (lambda: nn.RNNCell(5, 3), (5,)),
    "gru_cell": (lambda: nn.GRUCell(5, 3), (5,)),
    "lstm_cell": (lambda: Net(lambda net, x: net.cell(x)[1], cell=nn.LSTMCell(5, 3)), (5,)),
    "gru": (lambda: Net(lambda net, x: net.gru(x)[0], gru=nn.GRU(2, 3, batch_first=True)), (4, 2)),
    "lstm with a projection": (
        lambda: Net(
            lambda net, x: net.cells(x)[0], cells=nn.LSTM(2, 4, 2, True, True, proj_size=2)
        ),
        (3, 2),
    ),
}
FLAT |= {
    f"{kind}{d}d {options}": (
        lambda d=d, o=options, kind=kind: getattr(nn, f"{kind}{d}d")(4, 4, **o),
        (4, *[5 if d < 3 else 3] * d),
    )
    for kind, all_options in (("Conv", CONV), ("ConvTranspose", CONV_TRANSPOSE))
    for d in (1, 2, 3)
    for options in all_options
}

# Operations on whole numbers, with any axes before.
LOOKUPS: dict[str, Make] = {
    "embedding": lambda: nn.Embedding(7, 3),
    "embedding with padding": lambda: nn.Embedding(7, 3, padding_idx=2),
    "embedding, sparse": lambda: nn.Embedding(7, 3, sparse=True),
    "embedding by index": on(lambda x, w: w[x], (7, 3)),
    "embedding by selection": on(
        lambda x, w: w.index_select(0, x.flatten()).unflatten(0, x.shape), (7, 3)
    ),
    "embedding by selection, counted from the end": on(
        lambda x, w: w.index_select(-2, x.flatten()).unflatten(0, x.shape), (7, 3)
    ),
    "embedding by product": on(lambda x, w: F.one_hot(x, 7).to(w.dtype) @ w, (7, 3)),
    "one number for each": on(lambda x, w: w[x][..., None], (7,)),
    "embedding of two": on(lambda x, v, w: v[x] + F.embedding(x // 2, w), (7, 3), (4, 3)),
}
BAGS = {
    f"{mode}, {options}": lambda mode=mode, o=options: nn.EmbeddingBag(7, 3, mode=mode, **o)
    for mode in ("sum", "mean")
    for options in ({}, {"padding_idx": 2})
}

# Read right, whether by a rule or one sample at a time.
OTHERS: dict[str, Make] = {
    "doubled": on(lambda x, w: F.linear(x, 2 * w), (3, 5)),
    "exponential": on(lambda x, w: x * w.exp(), (5,)),
    "summed up": on(lambda x, w: x * w.cumsum(0), (5,)),
    "symmetric": on(lambda x, w: x @ (w + w.T), (5, 5)),
    "product of weights": on(lambda x, v, w: x @ (v @ w), (5, 2), (2, 3)),
    "softmax": on(lambda x, w: x @ w.softmax(1), (5, 3)),
    "sum of a weight": on(lambda x, w: x * w.sum(), (5, 3)),
    "repeated": on(lambda x, w: x * w.repeat(5), (1,)),
    "flipped": on(lambda x, w: x @ w.flip(0), (5, 3)),
    "rolled": on(lambda x, w: x @ w.roll(1, 0), (5, 3)),
    "diagonal": on(lambda x, w: x * w.diagonal(), (5, 5)),
    "lower triangle": on(lambda x, w: x @ w.tril(), (5, 5)),
    "rows by index": on(lambda x, w: x @ w[[0, 2, 2, 1, 0]], (3, 3)),
    "divisor": on(lambda x, w: x / (w * w + 1), (5,)),
    "numerator": on(lambda x, w: w / (x * x + 1), (5,)),
    "power": on(lambda x, w: (x * x + 1) ** w, (5,)),
    "larger of two": on(lambda x, w: torch.maximum(x, w), (5,)),
    "where": on(lambda x, w: torch.where(x > 0, x, w), (5,)),
    "lerp": on(lambda x, w: torch.lerp(x, w, 0.3), (5,)),
    "prelu of one number": lambda: nn.PReLU(),
    "distance": on(lambda x, w: (x[..., None, :] - w).square().sum(-1), (3, 5)),
    "cdist": on(lambda x, w: torch.cdist(x, w), (3, 5)),
    "cosine": on(lambda x, w: F.cosine_similarity(x[..., None, :], w, dim=-1), (3, 5)),
    "cast and back": on(lambda x, w: x @ w.to(torch.complex128).real, (5, 3)),
    "by hand, in place": on(lambda x, w: torch.zeros_like(x).add_(w).mul_(x), (5,)),
    "written into": on(
        lambda x, w: torch.zeros_like(x).index_copy_(-1, torch.arange(5, device=x.device), x * w),
        (5,),
    ),
}

# --------------------------------------------------------------------------------------
# Layouts
# --------------------------------------------------------------------------------------


def scattered(op: nn.Module, x: Tensor) -> Tensor:
    order = torch.tensor([5, 2, 13, 8, 0, 15, 11, 3, 6, 9, 1, 14, 4, 12, 7, 10])
    order = order[order < x.shape[0] * x.shape[1]]
    rows = op(x.flatten(0, 1)[order])
    return rows[order.argsort()].unflatten(0, x.shape[:2])


# From x (n, T, ...), with rows that are given to the operation in some way, back to (n, ...).
ONE_AXIS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "samples": lambda op, x: op(x[:, 0]),
    "positions of a sample together": lambda op, x: op(x.flatten(0, 1)).unflatten(0, x.shape[:2]),
    "samples of a position together": lambda op, x: (
        op(x.transpose(0, 1).flatten(0, 1)).unflatten(0, (T, len(x))).transpose(0, 1)
    ),
    "scattered": scattered,
    "position by position": lambda op, x: torch.stack([op(one) for one in x.unbind(1)], 1),
}
SEVERAL_AXES = ONE_AXIS | {
    "samples, positions": lambda op, x: op(x),
    "positions, samples": lambda op, x: op(x.transpose(0, 1)).transpose(0, 1),
    "positions, samples, one": lambda op, x: op(x.transpose(0, 1)[:, :, None]).transpose(0, 1),
}


# name -> (operation, shape of one sample's input)
Cases = dict[str, tuple[Make, tuple[int, ...]]]


def headed(cases: Cases, layout: Callable[[nn.Module, Tensor], Tensor], dead: bool) -> nn.Module:
    """Return operations side by side, before a nonlinearity and a fixed projection to three logits.

    `dead` rows have no gradient: those of a negative number, and all of a marked sample.
    """
    ops = nn.ModuleDict({name: make() for name, (make, _) in cases.items()})
    shapes = [shape for _, shape in cases.values()]

    def run(net: Net, x: Tensor) -> Tensor:
        inputs = x.split([math.prod(shape) for shape in shapes], 2)
        h = torch.cat(
            [
                layout(op, one.unflatten(2, shape)).flatten(1)
                for op, one, shape in zip(net.ops.values(), inputs, shapes, strict=True)
            ],
            1,
        )
        marked = x[:, 0, :1] == -1
        h = torch.relu(h) * ~marked if dead else torch.tanh(h)
        fixed = torch.linspace(-1, 1, h.shape[1] * 3, dtype=h.dtype, device=h.device)
        return h @ torch.sin(40 * fixed).view(-1, 3) / len(shapes) ** 0.5

    for name, buffer in ops.named_buffers():
        if name.endswith("running_var"):
            nn.init.uniform_(buffer, 0.5, 2)
        elif name.endswith("running_mean"):
            nn.init.normal_(buffer)
    return Net(run, ops=randomised(ops)).double()


def check(cases: Cases, layout: Callable, x: Tensor, device: str, *, quiet: bool = True) -> None:
    """Compare the diagonal, and the embedding of all entries or of few, with the oracle."""
    for dead, share in ((False, 1), (True, 0.1)):
        module = headed(cases, layout, dead)
        g, p = oracles.scores(module, x)
        # Or there would be little to compare.
        assert p.min() > 1e-6
        module = copy.deepcopy(module).to(device)
        shapes = {name: q.shape for name, q in module.named_parameters()}
        whole = {name: torch.arange(shape.numel()) for name, shape in shapes.items()}
        entries = {
            name: index[torch.randperm(len(index))[: max(1, int(share * len(index)))]].sort().values
            for name, index in whole.items()
        }
        mask = ParameterMask(entries, shapes)
        batches = [x[:3].to(device), x[3:].to(device)]
        with warnings.catch_warnings():
            warnings.filterwarnings("error" if quiet else "ignore", message="Reading")
            diagonal = fisher_diagonal(module, batches)
            V = fisher_embedding(module, [x[:N].to(device)], mask, dtype=torch.float64)
        found = torch.cat([values.flatten() for values in diagonal.values()])
        assert_same(found, oracles.diagonal(g, p), whole)
        columns = oracles.columns(module, entries)
        assert_same(V, categorical_factor(p[:N]) @ g[:N, :, columns], entries)


def assert_same(found: Tensor, expected: Tensor, entries: dict[str, Tensor]) -> None:
    """Compare the last axis, parameter by parameter, so that the operation is named."""
    sizes = [len(index) for index in entries.values()]
    for name, some, right in zip(
        entries, found.cpu().split(sizes, -1), expected.split(sizes, -1), strict=True
    ):
        torch.testing.assert_close(
            some, right, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
        )


def numbers(n_columns: int) -> Tensor:
    """Return samples (n, T, columns): one is marked as dead, one is all zeros."""
    x = torch.randn(N + 1, T, n_columns, dtype=torch.float64)
    x[1, 0, 0] = -1
    x[2] = 0
    x[3, 1] = 0
    return x


def indices(n_columns: int) -> Tensor:
    x = torch.randint(0, 7, (N + 1, T, n_columns))
    x[2] = 2  # Padding alone.
    return x


def together(cases: Cases) -> list[Any]:
    """Ten cases a test: operations side by side are read in one go."""
    names = [*cases]
    tens = [names[start : start + 10] for start in range(0, len(names), 10)]
    return [
        pytest.param({name: cases[name] for name in ten}, id=f"{ten[0]} to {ten[-1]}")
        for ten in tens
    ]


def in_layouts(layouts: dict[str, Callable], cases: Cases) -> list[Any]:
    """Pair each ten cases with every other layout, a layout with every other ten; rest is slow."""
    return [
        pytest.param(
            *ten.values,
            layout,
            id=f"{ten.id}-{name}",
            marks=pytest.mark.slow if (i + j) % 2 else (),
        )
        for i, ten in enumerate(together(cases))
        for j, (name, layout) in enumerate(layouts.items())
    ]


def with_inputs(makes: dict[str, Make], *shape: int) -> Cases:
    return {name: (make, shape) for name, make in makes.items()}


def n_columns(cases: Cases) -> int:
    return sum(math.prod(shape) for _, shape in cases.values())


@pytest.mark.parametrize(("cases", "layout"), in_layouts(SEVERAL_AXES, with_inputs(ROWS, 5)))
def test_rows(cases: Cases, layout: Callable, device: str) -> None:
    check(cases, layout, numbers(n_columns(cases)), device)


@pytest.mark.parametrize(("cases", "layout"), in_layouts(ONE_AXIS, FLAT))
def test_one_axis_of_rows(cases: Cases, layout: Callable, device: str) -> None:
    check(cases, layout, numbers(n_columns(cases)), device)


@pytest.mark.parametrize("layout", SEVERAL_AXES.values(), ids=SEVERAL_AXES)
@pytest.mark.parametrize("cases", together(with_inputs(LOOKUPS, 2)))
def test_lookups(cases: Cases, layout: Callable, device: str) -> None:
    check(cases, layout, indices(n_columns(cases)), device)


@pytest.mark.parametrize("layout", ONE_AXIS.values(), ids=ONE_AXIS)
@pytest.mark.parametrize("cases", together(with_inputs(BAGS, 3)))
def test_bags(cases: Cases, layout: Callable, device: str) -> None:
    check(cases, layout, indices(n_columns(cases)), device)


@pytest.mark.parametrize(("cases", "layout"), in_layouts(SEVERAL_AXES, with_inputs(OTHERS, 5)))
def test_other_operations(cases: Cases, layout: Callable, device: str) -> None:
    check(cases, layout, numbers(n_columns(cases)), device, quiet=False)


def test_rms_norm_in_one_operation() -> None:
    """As on CUDA: on a CPU it is several, so its saved tensors are made up here."""
    x = torch.randn(3, 4, 5).double()
    node = SimpleNamespace(
        _saved_input=x,
        _saved_result1=(x.square().mean(2, keepdim=True) + 1e-6).rsqrt(),
        _input_metadata=[SimpleNamespace(shape=x.shape)],
    )
    form = RULES["FusedRmsNormBackward0", 1](node, torch.Size([5]))
    assert isinstance(form, BroadcastGrad)
    assert form.factor is not None
    torch.testing.assert_close(form.factor(), F.rms_norm(x, (5,), eps=1e-6))
    assert form.shape == (1, 1, 1, 5)
