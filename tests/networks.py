"""Networks that between them use every layer rule, every fallback and every trap."""

from __future__ import annotations

from itertools import pairwise

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F


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


class _Block(nn.Module):
    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(n_out)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(n_out)
        self.shortcut = nn.Sequential()
        if stride != 1 or n_in != n_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(n_in, n_out, 1, stride, bias=False), nn.BatchNorm2d(n_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(h)) + self.shortcut(x))


class CifarResNet18(nn.Module):
    """ResNet-18 for 32 x 32 images; width 16 is about the size of the authors' one."""

    def __init__(self, width: int = 16, n_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        widths = [width, width, 2 * width, 4 * width, 8 * width]
        self.layers = nn.Sequential(
            *(
                nn.Sequential(_Block(a, b, 1 if i == 0 else 2), _Block(b, b, 1))
                for i, (a, b) in enumerate(pairwise(widths))
            )
        )
        self.linear = nn.Linear(8 * width, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layers(F.relu(self.bn1(self.conv1(x))))
        return self.linear(h.mean((2, 3)))


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
    """A layer whose weight is used past its own forward, and a parametrised one."""

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


def images(n: int, channels: int = 3, size: int = 8) -> Tensor:
    return torch.randn(n, channels, size, size)


def tokens(n: int) -> Tensor:
    return torch.randint(0, 9, (n, 5))


# name -> (network, input of n samples)
NETWORKS = {
    "mlp": (mlp, lambda n: torch.randn(n, 5)),
    "conv_norm": (ConvNorm, lambda n: torch.randn(n, 2, 12)),
    "cifar_resnet18": (lambda: CifarResNet18(width=4), images),
    "torchvision_resnet18": (lambda: torchvision.models.resnet18(num_classes=3), images),
    "vit": (small_vit, images),
    "text_gru": (TextClassifier, tokens),
    "time_first": (TimeFirst, tokens),
    "tied": (Tied, tokens),
    "windows": (Windows, lambda n: torch.randn(n, 2, 12)),
    "functional": (Functional, lambda n: torch.randn(n, 5)),
    "compiled": (lambda: torch.compile(mlp(), backend="eager"), lambda n: torch.randn(n, 5)),
}
