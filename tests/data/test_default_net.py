from __future__ import annotations

import numpy as np
import pytest
import torch
from skorch import NeuralNet, NeuralNetClassifier, NeuralNetRegressor
from torch import nn
from torch.utils.data import TensorDataset

from skfishermask import PUBLISHED, FisherMaskSampler
from skfishermask.data.default_net import default_net
from tests import nets

X, Y = nets.digits()
# The digits below and above five: two classes, learned quickly.
HALVES = np.where(Y > 4, "high", "low")


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((64,), "float32"),
        ((64,), "float64"),
        ((64,), "int64"),
        ((8, 8), "float32"),
        ((1, 8, 8), "float64"),
        ((4, 4, 4), "int64"),
    ],
    ids=str,
)
def test_default_net_for_tables_and_images(shape: tuple[int, ...], dtype: str) -> None:
    images = (16 * X[:180]).reshape(180, *shape).astype(dtype)
    fitted = FisherMaskSampler(mask_fraction=140, n_mask_samples=32, random_state=0).fit(
        images[:100], HALVES[:100]
    )
    assert fitted.n_features_in_ == shape[0]
    assert fitted.score(images[:100], HALVES[:100]) > 0.8
    indices, instances = fitted.query(images[100:], 5)
    assert len(set(indices.tolist())) == 5
    np.testing.assert_array_equal(instances, images[100:][indices])


@pytest.mark.parametrize("shape", [(3,), (1, 8, 8)], ids=["table", "images"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.uint8])
def test_default_nets_query_datasets_of_any_dtype(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    A = 9 * np.random.default_rng(0).random((40, *shape))
    fitted = FisherMaskSampler(random_state=0).fit(A[:20], np.arange(20) % 3)
    pool = TensorDataset(torch.as_tensor(A[20:]).to(dtype), torch.zeros(20))
    assert len(fitted.set_params(**PUBLISHED).query(pool, 3)[0]) == 3


def test_default_net_for_other_shapes() -> None:
    with pytest.raises(ValueError, match=r"found \(60, 2, 2, 4, 4\); give an estimator"):
        FisherMaskSampler().fit(X[:60].reshape(60, 2, 2, 4, 4), Y[:60])


@pytest.mark.parametrize(
    ("likelihood", "kind", "criterion"),
    [
        ("categorical", NeuralNetClassifier, nn.CrossEntropyLoss),
        ("bernoulli", NeuralNet, nn.BCEWithLogitsLoss),
        ("gaussian", NeuralNetRegressor, nn.MSELoss),
    ],
)
def test_kind_and_criterion_are_those_of_the_likelihood(
    likelihood: str, kind: type, criterion: type
) -> None:
    net = default_net((20, 64), 3, likelihood).initialize()
    assert type(net) is kind
    assert type(net.criterion_) is criterion
    assert net.forward(X[:5]).shape == (5, 3)
