from __future__ import annotations

import oracles
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from skfishermask.fisher.directions import directions
from skfishermask.fisher.jacobian import JacobianReader
from skfishermask.fisher.layers import rule_for

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
# name -> (layer, shape of one sample)
LAYERS = {
    "linear": (lambda: nn.Linear(5, 4), (5,)),
    "linear without bias": (lambda: nn.Linear(5, 4, bias=False), (5,)),
    "linear over tokens": (lambda: nn.Linear(5, 4), (6, 5)),
    "linear over a grid": (lambda: nn.Linear(5, 4), (2, 3, 5)),
    "batch_norm1d": (lambda: nn.BatchNorm1d(4), (4,)),
    "batch_norm1d over positions": (lambda: nn.BatchNorm1d(4), (4, 5)),
    "batch_norm2d": (lambda: nn.BatchNorm2d(4), (4, 3, 2)),
    "batch_norm3d": (lambda: nn.BatchNorm3d(4), (4, 3, 2, 2)),
    "layer_norm": (lambda: nn.LayerNorm(6), (6,)),
    "layer_norm over tokens": (lambda: nn.LayerNorm(6), (3, 6)),
    "layer_norm of two axes": (lambda: nn.LayerNorm([3, 4]), (2, 3, 4)),
    "layer_norm without bias": (lambda: nn.LayerNorm(6, bias=False), (6,)),
    "group_norm": (lambda: nn.GroupNorm(2, 4), (4, 3, 3)),
    "group_norm of vectors": (lambda: nn.GroupNorm(2, 4), (4,)),
} | {
    f"conv{d}d {options}": (
        lambda d=d, o=options: getattr(nn, f"Conv{d}d")(4, 8, **o),
        (4, *[5] * d),
    )
    for d in (1, 2, 3)
    for options in CONV
}
EMBEDDINGS = {
    "plain": {},
    "padding": {"padding_idx": 2},
    "sparse": {"sparse": True},
}


class Headed(nn.Module):
    """A layer, a nonlinearity, and a fixed projection of everything to four logits."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.layer(x)).flatten(1)
        fixed = torch.linspace(-1, 1, h.shape[1] * 4, dtype=h.dtype, device=h.device)
        return h @ torch.sin(40 * fixed).view(-1, 4)


def randomised(layer: nn.Module) -> nn.Module:
    for p in layer.parameters():
        nn.init.normal_(p)
    for name, buffer in layer.named_buffers():
        if name.startswith("running"):
            nn.init.uniform_(buffer, 0.5, 2)
    return layer.double()


def check(module: nn.Module, x: Tensor, share: float, device: str) -> None:
    """Compare both contractions of every parameter with the oracle, and see the rule used."""
    g, p = oracles.scores(module, x)
    module, x, rows = module.to(device), x.to(device), directions(p).to(device)
    generator = torch.Generator().manual_seed(0)
    entries = {}
    for name, parameter in module.named_parameters():
        count = max(1, int(share * parameter.numel()))
        entries[name] = torch.randperm(parameter.numel(), generator=generator)[:count].sort().values
    gather, square = JacobianReader(module, entries), JacobianReader(module)
    with gather.open():
        V = gather.embed(gather.forward(x), rows)
    with square.open():
        squares = square.squares(square.forward(x), rows)
    expected = directions(p) @ g[:, :, oracles.columns(module, entries)]
    assert gather.loose == square.loose == []
    torch.testing.assert_close(V.cpu(), expected, rtol=1e-9, atol=1e-12)
    expected = oracles.diagonal(g, p) * len(x)
    for (name, found), part in zip(
        squares.items(), expected.split([v.numel() for v in squares.values()]), strict=True
    ):
        torch.testing.assert_close(
            found.cpu().flatten(), part, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
        )


# A small share takes the path that gathers pairs, a large one the path over blocks.
@pytest.mark.parametrize("share", [0.02, 1.0])
@pytest.mark.parametrize("name", LAYERS)
def test_rule(name: str, share: float, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, shape = LAYERS[name]
    x = torch.randn(5, *shape, dtype=torch.float64)
    check(Headed(randomised(make())), x, share, device)
    monkeypatch.setattr("skfishermask.fisher.layers._BLOCK_ADVANTAGE", 0)  # Pairs, always.
    for chunk in (200, 500):  # Many chunks, the last one smaller.
        monkeypatch.setattr("skfishermask.fisher.layers._CHUNK", chunk)
        monkeypatch.setattr("skfishermask.fisher.layers._SQUARES_CHUNK", chunk)
        check(Headed(randomised(make())), x, share, device)


@pytest.mark.parametrize("shape", [(), (6,), (2, 3)])
@pytest.mark.parametrize("options", EMBEDDINGS.values(), ids=EMBEDDINGS)
def test_embedding(options: dict, shape: tuple[int, ...], device: str) -> None:
    layer = randomised(nn.Embedding(7, 3, **options))
    x = torch.randint(0, 7, (5, *shape))
    check(Headed(nn.Embedding(7, 3, _weight=layer.weight.detach(), **options)), x, 0.5, device)


@pytest.mark.parametrize("name", ["linear", "conv2d {'kernel_size': 3}", "batch_norm2d"])
def test_windows_stacked_along_the_batch_axis(
    name: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, shape = LAYERS[name]

    class Windowed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = randomised(make())

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])

    x = torch.randn(5, 3, *shape, dtype=torch.float64)
    for chunk in (1 << 20, 500):
        monkeypatch.setattr("skfishermask.fisher.layers._SQUARES_CHUNK", chunk)
        check(Headed(Windowed()), x, 0.5, device)


class _OwnForward(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, 2 * self.weight, self.bias)


class _OwnConvForward(nn.Conv2d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, 2 * weight, bias)


class _SameForward(nn.Linear):
    pass


def test_a_layer_that_computes_otherwise_has_no_rule() -> None:
    assert rule_for(nn.Linear(2, 2)) is not None
    assert rule_for(_SameForward(2, 2)) is rule_for(nn.Linear(2, 2))
    patched = nn.Linear(2, 2)
    patched.forward = lambda x: x
    for module in (_OwnForward(2, 2), _OwnConvForward(2, 2, 1), patched, nn.ReLU(), nn.GRU(2, 2)):
        assert rule_for(module) is None
