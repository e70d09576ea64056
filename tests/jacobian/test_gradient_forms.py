"""Each form gives the gradient that autograd gives, summed over all rows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from skfishermask.jacobian.gradient_forms import BroadcastGrad, EmbeddingGrad, OuterProductGrad
from skfishermask.jacobian.rules import form_of
from tests.jacobian.common import only_use, with_parameters

Run = Callable[..., Tensor]
Shape = tuple[int, ...]
# name -> (operation on an input and a parameter, their shapes)
PRODUCTS: dict[str, tuple[Run, Shape, Shape]] = {
    "matrix": (lambda x, w: x @ w, (4, 3), (3, 2)),
    "matrix on the left": (lambda x, w: w @ x, (3, 4), (2, 3)),
    "groups": (torch.bmm, (2, 4, 3), (2, 3, 5)),
    "convolution": (lambda x, w: F.conv1d(x, w, stride=2, padding=1), (4, 2, 6), (3, 2, 3)),
    "grouped convolution": (lambda x, w: F.conv2d(x, w, groups=2), (3, 4, 4, 4), (4, 2, 2, 3)),
    "transposed convolution": (F.conv_transpose1d, (4, 2, 5), (2, 3, 2)),
}
BROADCASTS: dict[str, tuple[Run, Shape, Shape]] = {
    "shift": (lambda x, b: x + b, (4, 3), (3,)),
    "taken away": (lambda x, b: torch.sub(x, b, alpha=3), (4, 3), (3,)),
    "scale": (lambda x, w: x * w, (4, 2, 3), (2, 1)),
    "scalar": (lambda x, w: x * w, (4, 3), ()),
    "repeated": (lambda x, w: w.repeat(2, 3), (1,), (2, 3)),
}


def made(run: Run, x_shape: Shape, shape: Shape) -> tuple[Tensor, Tensor, object]:
    """Return random weights of the operation's output, autograd's gradient, and the form."""
    module = with_parameters(run, shape)
    x = torch.randn(*x_shape, dtype=torch.float64)
    outputs, use = only_use(module, x)
    g = torch.randn_like(outputs)
    [expected] = torch.autograd.grad(outputs, [module.p0], g, retain_graph=True)
    return g, expected, form_of(use)


@pytest.mark.parametrize("name", PRODUCTS)
def test_outer_product(name: str) -> None:
    g, expected, form = made(*PRODUCTS[name])
    assert isinstance(form, OuterProductGrad)
    saved, grad = form.saved_side(None), form.grad_side(g, None)
    left, right = (saved, grad) if form.saved_is_left else (grad, saved)
    left = left.unflatten(1, (form.groups, form.left))
    right = right.unflatten(1, (form.groups, form.right))
    total = torch.einsum("ngap,ngbp->gab", left, right)
    torch.testing.assert_close(total.flatten(), expected.flatten())
    # Some features alone, counted through all groups.
    features = torch.arange(0, saved.shape[1], 2)
    torch.testing.assert_close(form.saved_side(features), saved[:, features])
    features = torch.arange(0, grad.shape[1], 2)
    torch.testing.assert_close(form.grad_side(g, features), grad[:, features])
    if form.saved_blocks is not None and form.restore_order is not None:
        blocks = form.saved_blocks()
        total = torch.einsum("ngap,npgb->gab", left, blocks)
        torch.testing.assert_close(form.restore_order(total).reshape(expected.shape), expected)


@pytest.mark.parametrize("name", BROADCASTS)
def test_broadcast(name: str) -> None:
    g, expected, form = made(*BROADCASTS[name])
    assert isinstance(form, BroadcastGrad)
    values = form.view(g) if form.factor is None else form.view(g) * form.factor()
    axes = [axis for axis, size in enumerate(form.shape) if size == 1]
    assert [*form.axes] == axes
    total = form.scale * values.sum(axes)
    torch.testing.assert_close(total.flatten(), expected.flatten())


def test_embedding() -> None:
    ids = torch.tensor([[1, 4, 2], [2, 2, 0]])
    module = with_parameters(lambda x, w: F.embedding(x, w, padding_idx=2), (5, 3))
    outputs, use = only_use(module, ids)
    g = torch.randn_like(outputs)
    [expected] = torch.autograd.grad(outputs, [module.p0], g, retain_graph=True)
    form = form_of(use)
    assert isinstance(form, EmbeddingGrad)
    assert form.ids is not None
    assert form.ids.tolist() == [1, 4, -1, -1, -1, 0]
    total = torch.einsum("nap,nbp->ab", form.saved_side(None), form.grad_side(g, None))
    torch.testing.assert_close(total, expected)
