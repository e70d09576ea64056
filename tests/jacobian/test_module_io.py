from __future__ import annotations

import pickle

import pytest
import torch
from torch import Tensor, nn

from skfishermask.jacobian.module_io import (
    NonFiniteOutputError,
    batch_length,
    check_outputs,
    move,
    output_layer,
)
from tests import networks


def test_batch_length() -> None:
    x = torch.zeros(3, 2)
    assert batch_length(x) == batch_length([x, x]) == batch_length({"a": x}) == 3


@pytest.mark.parametrize(
    ("batch", "kind", "message"),
    [
        ("hello", TypeError, "found str"),
        (["hello"], TypeError, "found str"),
        (None, TypeError, "found NoneType"),
        ([], ValueError, r"at least one tensor, found \[\]"),
        ({}, ValueError, "at least one tensor"),
    ],
)
def test_what_is_no_batch(batch: object, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        batch_length(batch)


@pytest.mark.parametrize(
    ("n", "words"), [(1, r"found \(3,\)\. One sample was tried alone"), (4, r"found \(3,\)\.$")]
)
def test_a_squeeze_is_suspected_of_one_sample_alone(n: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_outputs(torch.zeros(3), n, 0)


def test_the_bad_row_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(NonFiniteOutputError(3)))
    assert error.row == 3
    assert str(error).endswith("sample 3.")


class _Auxiliary(nn.Module):
    """The head of the logits does not run last, nor stand last."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(5, 3)
        self.temperature = nn.Parameter(torch.ones(1))
        self.auxiliary = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.head(x) / self.temperature, self.auxiliary(x)


class _Raw(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(5, 3))
        self.shift = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix + self.shift


@pytest.mark.parametrize(
    ("make", "x", "expected"),
    [
        (networks.mlp, torch.randn(2, 5), ["2.weight", "2.bias"]),
        (_Auxiliary, torch.randn(2, 5), ["head.weight", "head.bias"]),
        (_Raw, torch.randn(2, 5), ["matrix", "shift"]),
        (networks.small_vit, networks.images(2), ["heads.head.weight", "heads.head.bias"]),
        (networks.TextClassifier, networks.tokens(2), ["output.weight", "output.bias"]),
        (networks.Tied, networks.tokens(2), ["embedding.weight"]),
        (
            networks.Functional,
            torch.randn(2, 5),
            [
                "output.bias",
                "output.parametrizations.weight.original0",
                "output.parametrizations.weight.original1",
            ],
        ),
        (
            lambda: nn.Sequential(
                nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(4)
            ),
            networks.images(2),
            ["0.weight", "0.bias"],
        ),
    ],
)
def test_output_layer(make: object, x: Tensor, expected: list[str]) -> None:
    assert output_layer(make(), x) == expected


def test_no_output_layer() -> None:
    with pytest.raises(ValueError, match="no layer that holds a weight matrix"):
        output_layer(nn.BatchNorm1d(3), torch.randn(2, 3))


def test_images_are_moved_in_plain_order() -> None:
    images = torch.randn(3, 2, 4, 4).contiguous(memory_format=torch.channels_last)
    moved = move(images, nn.Linear(2, 2))
    assert moved.is_contiguous()
    assert torch.equal(moved, images)
