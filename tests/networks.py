"""Networks that between them use every layer rule, every fallback and every trap."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from benchmarks.common.networks import CifarResNet18, MaskedText

Batch = Tensor | dict[str, Tensor]


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4))


class ConvNorm(nn.Module):
    """Every convolution and normalisation rule; one convolution runs twice; ReLU in place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(2, 4, 3, padding=1, padding_mode="circular")
        self.group = nn.GroupNorm(2, 4)
        self.batch1 = nn.BatchNorm1d(4)
        self.conv2 = nn.Conv2d(1, 4, (3, 2), stride=(2, 1), padding="valid", dilation=(1, 2))
        self.batch2 = nn.BatchNorm2d(4)
        self.twice = nn.Conv2d(4, 4, 3, padding="same", groups=2, padding_mode="reflect")
        self.depthwise = nn.Conv2d(4, 8, 3, padding=(1, 2), groups=4, bias=False)
        self.conv3 = nn.Conv3d(1, 2, 2, padding=1, stride=2, padding_mode="replicate")
        self.batch3 = nn.BatchNorm3d(2)
        self.layer = nn.LayerNorm([4, 6])
        self.tokens = nn.LayerNorm(6)
        self.mix = nn.Linear(6, 6)
        self.output = nn.Linear(4 * 6, 5)
        self.relu = nn.ReLU(inplace=True)
        for m in (self.batch1, self.batch2, self.batch3):
            nn.init.normal_(m.running_mean)
            nn.init.uniform_(m.running_var, 0.5, 2)
        for m in (self.group, self.batch1, self.layer, self.tokens):
            nn.init.normal_(m.weight)

    def forward(self, x: Tensor) -> Tensor:
        h = self.relu(self.batch1(self.group(self.conv1(x))))  # (n, 4, 12)
        h = self.relu(self.batch2(self.conv2(h[:, None].repeat(1, 1, 2, 1))))
        h = self.depthwise(self.twice(self.twice(h)))
        h = self.relu(self.batch3(self.conv3(h[:, None])))
        h = self.layer(h.flatten(1)[:, 7:31].unflatten(1, (4, 6)))
        h = self.mix(self.tokens(h))
        return self.output(h.flatten(1))


class TextClassifier(nn.Module):
    """Tokens -> Embedding -> GRU -> logits, and the hidden states beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6, padding_idx=0)
        self.gru = nn.GRU(6, 8, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.output = nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        states, _ = self.gru(self.embedding(tokens))
        return self.output(self.norm(states).mean(1)), states


class TimeFirst(nn.Module):
    """An LSTM and a Linear that see time before samples, inside."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 4)
        self.lstm = nn.LSTM(4, 5)
        self.mix = nn.Linear(5, 5)
        self.output = nn.Linear(5, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        states, _ = self.lstm(self.embedding(tokens).transpose(0, 1))
        return self.output(torch.tanh(self.mix(states)).mean(0))


class Tied(nn.Module):
    """Tied weights, a parameter on the container, attention, a frozen layer, an unused one."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.position = nn.Parameter(torch.randn(1, 5, 8))
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.unused = nn.Linear(8, 2)
        self.output = nn.Linear(8, 11, bias=False)
        self.output.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.encoder(self.embedding(tokens) + self.position)
        self.unused(h)
        return self.output(self.frozen(h).mean(1))


class Windows(nn.Module):
    """Windows of a sample stacked along the batch axis, as in Swin transformers or video."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 3, 2)
        self.norm = nn.BatchNorm1d(3)
        self.mix = nn.Linear(3, 3)
        self.output = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        n = len(x)
        windows = x.unflatten(2, (3, 4)).transpose(1, 2).flatten(0, 1)  # (3 n, 2, 4)
        h = torch.tanh(self.norm(self.conv(windows))).mean(2)
        return self.output(torch.tanh(self.mix(h)).unflatten(0, (n, 3)).sum(1))


class Functional(nn.Module):
    """A layer with a weight that is used past its own forward, and a parametrised one."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(5, 5)
        self.output = nn.utils.parametrizations.weight_norm(nn.Linear(5, 3))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.hidden(x))
        return self.output(F.linear(h, self.hidden.weight))


def small_vit() -> nn.Module:
    vit = torchvision.models.VisionTransformer(
        image_size=8,
        patch_size=4,
        num_layers=2,
        num_heads=2,
        hidden_dim=8,
        mlp_dim=12,
        num_classes=4,
    )
    nn.init.normal_(vit.heads.head.weight)  # torchvision starts at zero: no gradient below.
    return vit


# --------------------------------------------------------------------------------------
# Short networks: parts, and a forward that is a function of them and the input
# --------------------------------------------------------------------------------------


class Net(nn.Module):
    """Parts, and a function of them and the input: `run(net, x)`."""

    def __init__(self, run: Callable[..., Tensor], **parts: nn.Module | Tensor) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            if isinstance(part, nn.Module | nn.Parameter):
                setattr(self, name, part)
            else:
                self.register_buffer(name, part)

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        return self.run(self, *args, **kwargs)


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) / 2)


def randomised(module: nn.Module) -> nn.Module:
    """Assign every parameter random values: what starts as zero or one hides mistakes."""
    for p in module.parameters():
        nn.init.normal_(p, std=0.5)
    return module


def mean_over(steps: Tensor, mask: Tensor) -> Tensor:
    """Mean of (n, T, d) over the steps that a mask (n, T) keeps."""
    return (steps * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)


# Attention ----------------------------------------------------------------------------


def encoder(batch_first: bool) -> nn.Module:
    def run(net: Net, x: Tensor) -> Tensor:
        h = x if batch_first else x.transpose(0, 1)
        return net.output(net.encoder(h).mean(1 if batch_first else 0))

    layer = nn.TransformerEncoderLayer(4, 2, 6, batch_first=batch_first)
    stack = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return randomised(Net(run, encoder=stack, output=nn.Linear(4, 3)))


def decoder(batch_first: bool) -> nn.Module:
    def run(net: Net, x: Tensor) -> Tensor:
        h = x if batch_first else x.transpose(0, 1)
        causal = nn.Transformer.generate_square_subsequent_mask(
            x.shape[1], device=x.device, dtype=x.dtype
        )
        h = net.decoder(h, torch.tanh(net.memory(h)), tgt_mask=causal)
        return net.output(h.mean(1 if batch_first else 0))

    layer = nn.TransformerDecoderLayer(4, 2, 6, batch_first=batch_first)
    parts = {"memory": nn.Linear(4, 4), "decoder": nn.TransformerDecoder(layer, 1)}
    return randomised(Net(run, **parts, output=nn.Linear(4, 3)))


def attention(**options: object) -> nn.Module:
    """Attention with one projection for query, key and value, or with three."""

    def run(net: Net, x: Tensor) -> Tensor:
        key = x[..., : net.attention.kdim]
        value = x[..., : net.attention.vdim]
        h, _ = net.attention(x, key, value, need_weights=False)
        return net.output(torch.tanh(h).mean(1))

    parts = {"attention": nn.MultiheadAttention(4, 2, batch_first=True, **options)}
    return randomised(Net(run, **parts, output=nn.Linear(4, 3)))


def masked_encoder() -> nn.Module:
    """A library's encoder that is told which tokens are padding."""

    def run(net: Net, tokens: Tensor, mask: Tensor) -> Tensor:
        h = net.encoder(net.table(tokens) + net.position, src_key_padding_mask=~mask)
        return net.output(mean_over(h, mask))

    layer = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True)
    return Net(
        run,
        table=nn.Embedding(9, 4),
        position=weight(1, 5, 4),
        encoder=nn.TransformerEncoder(layer, 1, enable_nested_tensor=False),
        output=nn.Linear(4, 3),
    )


def relative_positions() -> nn.Module:
    """Attention with a learned bias for every distance, looked up in a table."""

    def run(net: Net, x: Tensor) -> Tensor:
        q, k, v = net.project(x).chunk(3, dim=2)
        bias = net.table[net.distance.flatten()].unflatten(0, net.distance.shape)
        h = (q @ k.mT / 2 + bias[..., 0]).softmax(2) @ v
        return net.output(h.mean(1))

    steps = torch.arange(5)
    return Net(
        run,
        project=nn.Linear(4, 12),
        table=weight(9, 1),
        distance=steps[:, None] - steps + 4,
        output=nn.Linear(4, 3),
    )


def class_token() -> nn.Module:
    def run(net: Net, x: Tensor) -> Tensor:
        h = torch.cat([net.token.expand(len(x), -1, -1), net.inner(x)], 1) + net.position
        return net.output(net.layer(h)[:, 0])

    layer = nn.TransformerEncoderLayer(4, 1, 6, batch_first=True, norm_first=True)
    return Net(
        run,
        token=weight(1, 1, 4),
        position=weight(6, 4),
        inner=nn.Linear(4, 4),
        layer=layer,
        output=nn.Linear(4, 3),
    )


def one_concatenated_projection() -> nn.Module:
    def run(net: Net, x: Tensor) -> Tensor:
        joined = torch.cat([net.queries, net.keys, net.values])
        q, k, v = F.linear(x, joined, net.bias).chunk(3, dim=2)
        return net.output(((q @ k.mT).softmax(2) @ v).mean(1))

    parts = {name: weight(4, 4) for name in ("queries", "keys", "values")}
    return Net(run, **parts, bias=weight(12), output=nn.Linear(4, 3))


def swin() -> nn.Module:
    return randomised(
        torchvision.models.SwinTransformer(
            patch_size=[2, 2],
            embed_dim=4,
            depths=[2, 1],
            num_heads=[1, 2],
            window_size=[2, 2],
            num_classes=3,
        )
    )


# Recurrence ---------------------------------------------------------------------------


def recurrent(kind: str, *, packed: bool = False, batch_first: bool = True) -> nn.Module:
    """Two layers in both directions."""

    def run(net: Net, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        h = x if batch_first else x.transpose(0, 1)
        if packed:
            h = nn.utils.rnn.pack_padded_sequence(
                h, lengths.cpu(), batch_first=batch_first, enforce_sorted=False
            )
        h, last = net.cells(h)
        if packed:
            h, _ = nn.utils.rnn.pad_packed_sequence(h, batch_first=batch_first)
        last = last[0] if kind == "LSTM" else last
        return net.output(torch.cat([h.sum(1 if batch_first else 0), last[-1]], 1))

    cells = getattr(nn, kind)(3, 4, 2, bidirectional=True, batch_first=batch_first)
    return Net(run, cells=cells, output=nn.Linear(12, 3))


def written_lstm() -> nn.Module:
    def run(net: Net, x: Tensor) -> Tensor:
        h = c = x.new_zeros(len(x), 4)
        for step in x.unbind(1):
            i, f, g, o = (net.inside(step) + net.outside(h)).chunk(4, dim=1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
        return net.output(h)

    parts = {"inside": nn.Linear(4, 16), "outside": nn.Linear(4, 16, bias=False)}
    return Net(run, **parts, output=nn.Linear(4, 3))


def loop_to_the_longest(cell: nn.Module) -> nn.Module:
    """As many steps as the longest sequence of the batch has."""

    def run(net: Net, x: Tensor, lengths: Tensor) -> Tensor:
        h = x.new_zeros(len(x), 4)
        for t in range(int(lengths.max())):
            h = torch.where((t < lengths)[:, None], net.cell(x[:, t], h), h)
        return net.output(h)

    return Net(run, cell=cell, output=nn.Linear(4, 3))


# Routing ------------------------------------------------------------------------------


def routed(run_on: Callable[[Tensor], Tensor], n_experts: int = 3) -> nn.Module:
    """Each row goes to one expert, by its values; an expert may get none."""

    def run(net: Net, x: Tensor) -> Tensor:
        rows = run_on(x)
        h = rows.new_zeros(len(rows), 4)
        choice = (rows[:, 0] * 1.2 + 1).clamp(0, n_experts - 1).long()
        for i, expert in enumerate(net.experts):
            mine = choice == i
            h[mine] = expert(rows[mine])
        return net.output(torch.tanh(h).unflatten(0, (len(x), -1)).mean(1))

    experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(n_experts))
    return Net(run, experts=experts, output=nn.Linear(4, 3))


def gated() -> nn.Module:
    """Every expert sees every sample; their weights are one tensor."""

    def run(net: Net, x: Tensor) -> Tensor:
        h = torch.einsum("nd,edh->neh", x, net.experts) + net.shifts
        return net.output(torch.einsum("ne,neh->nh", net.gate(x).softmax(1), torch.tanh(h)))

    parts = {"gate": nn.Linear(5, 3), "experts": weight(3, 5, 4), "shifts": weight(3, 4)}
    return Net(run, **parts, output=nn.Linear(4, 3))


def sometimes_twice() -> nn.Module:
    """A weight has a second use in those batches alone that hold a certain kind of sample."""

    def run(net: Net, x: Tensor) -> Tensor:
        h = torch.tanh(net.hidden(x))
        again = x[:, 0] > 0.3
        if again.any():
            h = h.index_put((again,), F.linear(h[again], net.hidden.weight))
        return net.output(torch.tanh(h))

    return Net(run, hidden=nn.Linear(5, 5), output=nn.Linear(5, 3))


# Parameters past any layer ------------------------------------------------------------


def other_layers_weight() -> nn.Module:
    def run(net: Net, x: Tensor) -> Tensor:
        h = torch.tanh(net.hidden(x))
        return net.output(torch.tanh(F.linear(net.inner(h), net.hidden.weight)))

    return Net(run, hidden=nn.Linear(5, 5), inner=nn.Linear(5, 5), output=nn.Linear(5, 3))


def conv1d_of_gpt2() -> nn.Module:
    """A weight (in, out), and positions flattened into rows."""

    def run(net: Net, x: Tensor) -> Tensor:
        h = torch.addmm(net.bias, x.reshape(-1, 4), net.weight).view(*x.shape[:2], 6)
        return net.output(F.gelu(h).mean(1))

    return Net(run, weight=weight(4, 6), bias=weight(6), output=nn.Linear(6, 3))


def rms_norm(written: bool) -> nn.Module:
    def run(net: Net, x: Tensor) -> Tensor:
        h = net.inner(x)
        if written:
            h = net.scale * (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6))
        else:
            h = net.norm(h)
        return net.output(torch.tanh(h).mean(1))

    norm = {"scale": weight(4)} if written else {"norm": randomised(nn.RMSNorm(4))}
    return Net(run, inner=nn.Linear(4, 4), **norm, output=nn.Linear(4, 3))


def parametrised(how: Callable[[nn.Module], nn.Module]) -> nn.Module:
    return nn.Sequential(how(nn.Linear(5, 5)), nn.Tanh(), nn.Linear(5, 3))


def lora(merged: bool) -> nn.Module:
    """A frozen layer, and a trained product of two factors beside it or added to its weight."""

    def run(net: Net, x: Tensor) -> Tensor:
        if merged:
            h = F.linear(x, net.base.weight + net.lora_up @ net.lora_down, net.base.bias)
        else:
            h = net.base(x) + x @ net.lora_down.T @ net.lora_up.T
        return net.output(torch.tanh(h))

    return Net(
        run,
        base=nn.Linear(5, 6).requires_grad_(False),
        lora_down=weight(2, 5),
        lora_up=weight(6, 2),
        output=nn.Linear(6, 3),
    )


def layer_scale() -> nn.Module:
    def run(net: Net, x: Tensor) -> Tensor:
        return net.output((x + net.gamma * torch.tanh(net.inner(x))).mean(1))

    return Net(run, inner=nn.Linear(4, 4), gamma=weight(4), output=nn.Linear(4, 3))


def weight_on_the_left() -> nn.Module:
    def run(net: Net, x: Tensor) -> Tensor:
        h = torch.tanh(torch.matmul(net.mixing, x))  # (6, 5) times (n, 5, 4)
        return (net.classes @ h.mean(1).T).T  # (3, 4) times (4, n)

    return Net(run, mixing=weight(6, 5), classes=weight(3, 4))


def einsums() -> nn.Module:
    def run(net: Net, x: Tensor) -> Tensor:
        h = torch.einsum("ntd,dhk->nhtk", x, net.heads)
        h = torch.einsum("nhtk,th->nk", torch.tanh(h), net.pool)
        return torch.einsum("ck,nk->nc", net.classes, h)

    return Net(run, heads=weight(4, 2, 3), pool=weight(5, 2), classes=weight(3, 3))


def sum_over_expanded() -> nn.Module:
    def run(net: Net, x: Tensor) -> Tensor:
        h = torch.tanh((net.table.expand(len(x), 6, 5) * x[:, None]).sum(2))
        return torch.bmm(net.classes.expand(len(x), 3, 6), h[:, :, None])[:, :, 0]

    return Net(run, table=weight(6, 5), classes=weight(1, 3, 6))


class _OwnProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale)
        return x * scale

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, scale = ctx.saved_tensors
        return g * scale, (g * x).sum(0)


def own_function() -> nn.Module:
    def run(net: Net, x: Tensor) -> Tensor:
        return net.output(torch.tanh(_OwnProduct.apply(net.hidden(x), net.own_scale)))

    return Net(run, hidden=nn.Linear(5, 5), own_scale=weight(5), output=nn.Linear(5, 3))


def reshaped_by_values() -> nn.Module:
    """A positive scale, and thresholds that rise."""

    def run(net: Net, x: Tensor) -> Tensor:
        h = net.hidden(x) * net.log_scale.exp()
        return net.output(torch.tanh(h - net.rises.cumsum(0)))

    parts = {"log_scale": weight(5), "rises": weight(5)}
    return Net(run, hidden=nn.Linear(5, 5), **parts, output=nn.Linear(5, 3))


def branching() -> nn.Module:
    """What is done to a sample depends on its values, so nothing can be traced or vectorised."""

    def run(net: Net, x: Tensor) -> Tensor:
        h = torch.stack([s * net.factor if s[0] > 0 else s - net.factor for s in x])
        return net.output(torch.tanh(h))

    return Net(run, factor=weight(5), output=nn.Linear(5, 3))


def frozen_and_unused() -> nn.Module:
    def run(net: Net, x: Tensor) -> Tensor:
        net.idle(x)
        return net.output(torch.tanh(net.frozen(torch.tanh(net.hidden(x)))))

    return Net(
        run,
        hidden=nn.Linear(5, 5),
        frozen=nn.Linear(5, 4).requires_grad_(False),
        idle=nn.Linear(5, 2),
        never=weight(3),
        output=nn.Linear(4, 3),
    )


def auto_cast() -> nn.Module:
    def run(net: Net, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            h = net.output(net.norm(torch.tanh(net.hidden(x))))
        return h.to(x.dtype)

    return Net(run, hidden=nn.Linear(5, 6), norm=nn.LayerNorm(6), output=nn.Linear(6, 3))


def checkpointed() -> nn.Module:
    def run(net: Net, x: Tensor) -> Tensor:
        h = checkpoint(net.first, x, use_reentrant=False)
        h = checkpoint_sequential(net.second, 2, h, use_reentrant=False)
        return net.output(h)

    def block() -> nn.Module:
        return nn.Sequential(nn.Linear(5, 5), nn.Tanh())

    return Net(run, first=block(), second=nn.Sequential(block(), block()), output=nn.Linear(5, 3))


# Text and images ----------------------------------------------------------------------


def bag(mode: str) -> nn.Module:
    bag = nn.EmbeddingBag(9, 4, mode=mode, padding_idx=1)
    return nn.Sequential(bag, nn.Tanh(), nn.Linear(4, 3))


def norms() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(2, 4, 3),
        randomised(nn.InstanceNorm1d(4, affine=True)),
        nn.Tanh(),
        randomised(nn.GroupNorm(2, 4)),
        randomised(nn.LayerNorm([4, 10])),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(40, 3),
    )


def transposed_convolutions() -> nn.Module:
    def run(net: Net, x: Tensor) -> Tensor:
        h = torch.tanh(net.one(x))  # (n, 4, 9)
        h = torch.tanh(net.two(h.unflatten(2, (3, 3))))  # (n, 2, 5, 8)
        return net.output(net.three(h[:, :, :2, :3, None]).flatten(1))

    return Net(
        run,
        one=nn.ConvTranspose1d(2, 4, 3, stride=2, padding=1, output_padding=0, groups=2),
        two=nn.ConvTranspose2d(4, 2, (1, 3), stride=2, padding=(0, 1), output_padding=(0, 1)),
        three=nn.ConvTranspose3d(2, 2, 2, dilation=(1, 2, 1), groups=2, bias=False),
        output=nn.Linear(2 * 3 * 5 * 2, 3),
    )


def convnext() -> nn.Module:
    block = torchvision.models.convnext.CNBlockConfig
    return torchvision.models.ConvNeXt(
        [block(4, 8, 1), block(8, None, 1)], layer_scale=0.5, num_classes=3
    )


def mobilenet() -> nn.Module:
    conf = partial(torchvision.models.mobilenetv3.InvertedResidualConfig, width_mult=1)
    blocks = [
        conf(8, 3, 8, 8, True, "RE", stride=1, dilation=1),
        conf(8, 5, 16, 8, True, "HS", stride=2, dilation=1),
    ]
    return torchvision.models.MobileNetV3(blocks, last_channel=12, num_classes=3)


# Inputs -------------------------------------------------------------------------------


def images(n: int, channels: int = 3, size: int = 8) -> Tensor:
    return torch.randn(n, channels, size, size)


def tokens(n: int) -> Tensor:
    return torch.randint(0, 9, (n, 5))


def vectors(n: int) -> Tensor:
    return torch.randn(n, 5)


def sequences(n: int) -> Tensor:
    return torch.randn(n, 5, 4)


def ragged(n: int, width: int = 3) -> dict[str, Tensor]:
    return {"x": torch.randn(n, 4, width), "lengths": torch.randint(1, 5, (n,))}


def masked_tokens(n: int) -> dict[str, Tensor]:
    lengths = torch.randint(1, 6, (n, 1))
    mask = torch.arange(5) < lengths
    return {"tokens": tokens(n) * mask, "mask": mask}


# name -> (network, input of n samples)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Batch]]] = {
    "mlp": (mlp, vectors),
    "conv_norm": (ConvNorm, lambda n: torch.randn(n, 2, 12)),
    "cifar_resnet18": (lambda: CifarResNet18(width=4), images),
    "torchvision_resnet18": (lambda: torchvision.models.resnet18(num_classes=3), images),
    "vit": (small_vit, images),
    "text_gru": (TextClassifier, tokens),
    "time_first": (TimeFirst, tokens),
    "tied": (Tied, tokens),
    "windows": (Windows, lambda n: torch.randn(n, 2, 12)),
    "functional": (Functional, vectors),
    "compiled": (lambda: torch.compile(mlp(), backend="eager"), vectors),
    "data_parallel": (lambda: nn.DataParallel(mlp()), vectors),
    # Attention
    "encoder": (lambda: encoder(batch_first=True), sequences),
    "encoder_sequence_first": (lambda: encoder(batch_first=False), sequences),
    "decoder": (lambda: decoder(batch_first=True), sequences),
    "decoder_sequence_first": (lambda: decoder(batch_first=False), sequences),
    "attention": (attention, sequences),
    "attention_separate": (lambda: attention(kdim=3, vdim=2), sequences),
    "attention_extra_key": (lambda: attention(add_bias_kv=True, add_zero_attn=True), sequences),
    "masked_encoder": (masked_encoder, masked_tokens),
    "masked_text": (lambda: MaskedText(9, 5, 4, 2, 2, 3), masked_tokens),
    "relative_positions": (relative_positions, sequences),
    "class_token": (class_token, sequences),
    "one_concatenated_projection": (one_concatenated_projection, sequences),
    "swin": (swin, images),
    # Recurrence
    "rnn": (lambda: recurrent("RNN"), lambda n: ragged(n)["x"]),
    "gru": (lambda: recurrent("GRU"), lambda n: ragged(n)["x"]),
    "lstm": (lambda: recurrent("LSTM"), lambda n: ragged(n)["x"]),
    "gru_time_first": (lambda: recurrent("GRU", batch_first=False), lambda n: ragged(n)["x"]),
    "rnn_packed": (lambda: recurrent("RNN", packed=True), ragged),
    "gru_packed": (lambda: recurrent("GRU", packed=True), ragged),
    "lstm_packed": (lambda: recurrent("LSTM", packed=True, batch_first=False), ragged),
    "written_lstm": (written_lstm, sequences),
    "loop_to_the_longest": (lambda: loop_to_the_longest(nn.GRUCell(3, 4)), ragged),
    # Routing
    "routed": (lambda: routed(lambda x: x), lambda n: torch.randn(n, 4)),
    "routed_tokens": (lambda: routed(lambda x: x.flatten(0, 1)), sequences),
    "gated": (gated, vectors),
    "sometimes_twice": (sometimes_twice, vectors),
    "branching": (branching, vectors),
    # Parameters past any layer
    "sequence_first": (
        lambda: Net(
            lambda net, x: net.output(torch.tanh(net.hidden(x.transpose(0, 1))).mean(0)),
            hidden=nn.Linear(4, 6),
            output=nn.Linear(6, 3),
        ),
        sequences,
    ),
    "other_layers_weight": (other_layers_weight, vectors),
    "conv1d_of_gpt2": (conv1d_of_gpt2, sequences),
    "rms_norm": (lambda: rms_norm(written=False), sequences),
    "rms_norm_written": (lambda: rms_norm(written=True), sequences),
    "weight_norm": (lambda: parametrised(nn.utils.parametrizations.weight_norm), vectors),
    "spectral_norm": (lambda: parametrised(nn.utils.parametrizations.spectral_norm), vectors),
    "lora": (lambda: lora(merged=False), vectors),
    "lora_merged": (lambda: lora(merged=True), vectors),
    "layer_scale": (layer_scale, sequences),
    "weight_on_the_left": (weight_on_the_left, sequences),
    "einsums": (einsums, sequences),
    "sum_over_expanded": (sum_over_expanded, vectors),
    "bilinear": (
        lambda: Net(
            lambda net, x: net.output(torch.tanh(net.pair(x, torch.sin(x)))),
            pair=nn.Bilinear(5, 5, 4),
            output=nn.Linear(4, 3),
        ),
        vectors,
    ),
    "prelu": (
        lambda: nn.Sequential(nn.Linear(5, 6), nn.PReLU(6), nn.Linear(6, 4), nn.PReLU()),
        vectors,
    ),
    "own_function": (own_function, vectors),
    "reshaped_by_values": (reshaped_by_values, vectors),
    "frozen_and_unused": (frozen_and_unused, vectors),
    "autocast": (auto_cast, vectors),
    "checkpointed": (checkpointed, vectors),
    "log_probabilities": (lambda: nn.Sequential(mlp(), nn.LogSoftmax(1)), vectors),
    # Text and images
    "bag_sum": (lambda: bag("sum"), tokens),
    "bag_mean": (lambda: bag("mean"), tokens),
    "norms": (norms, lambda n: torch.randn(n, 2, 12)),
    "transposed_convolutions": (transposed_convolutions, lambda n: torch.randn(n, 2, 5)),
    "convnext": (convnext, images),
    "mobilenet": (mobilenet, images),
}

# Parameters that no rule covers, which a warning must name: they enter through a function of
# their own values.
WEIGHT_NORM = [f"parametrizations.weight.original{i}" for i in range(2)]
SLOW = {
    "functional": [f"output.{name}" for name in WEIGHT_NORM],
    "weight_norm": [f"0.{name}" for name in WEIGHT_NORM],
    "spectral_norm": ["0.parametrizations.weight.original"],
    "lora_merged": ["base.weight", "lora_down", "lora_up"],
    "own_function": ["own_scale"],
    "reshaped_by_values": ["log_scale", "rises"],
}
