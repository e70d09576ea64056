from __future__ import annotations

import pytest
import torch
from torch import Tensor

from skfishermask import fisher_diagonal, fisher_embedding
from skfishermask.fisher import Categorical, as_likelihood, predict
from tests import oracles
from tests.fisher.common import (
    LIKELIHOODS,
    POSITIONS,
    TOLERANCE,
    Tagger,
    case,
    error,
    flat,
    mask_of_all,
    tokens,
)


@pytest.mark.parametrize("kind", ["categorical", "bernoulli", "gaussian"])
@pytest.mark.parametrize("name", POSITIONS)
def test_random_combinations_are_exact_in_the_mean(name: str, kind: str) -> None:
    *_, outputs = case(name)
    likelihood, loss = LIKELIHOODS[kind]
    likelihood = as_likelihood(likelihood)
    # In output space, in which the matrices are small: V = R J.
    identity = torch.eye(outputs[0].numel()).double().expand(len(outputs), -1, -1)
    exact = oracles.information_of_loss(identity, outputs, loss)
    found = []
    for seed in range(200):
        R = likelihood.directions(outputs, 5, first_row=1000 * seed).flatten(2)
        assert R.shape[1] == 5
        found.append(R.mT @ R)
    mean, deviation = torch.stack(found).mean(0), torch.stack(found).std(0)
    standard = deviation / len(found) ** 0.5
    far = (mean - exact).abs() > 3 * standard + 1e-12
    # One in 370 entries is further off by chance; the matrices are symmetric.
    assert far.double().mean() < 0.01
    assert ((mean - exact).abs() <= 5 * standard + 1e-12).all()
    R = likelihood.directions(outputs, likelihood.rank(outputs)).flatten(2)
    assert error(R.mT @ R, exact) < TOLERANCE


@pytest.mark.parametrize("n_directions", [None, 2])
@pytest.mark.parametrize("kind", ["categorical", "bernoulli", "gaussian"])
def test_rows_do_not_depend_on_batches_or_padding(kind: str, n_directions: int | None) -> None:
    module, *_ = case("tokens")
    x = tokens(5)
    x[:, 3] = 0  # Padding, of which the last batch is free.
    likelihood = type(as_likelihood(LIKELIHOODS[kind][0]))(ignored=lambda batch: batch == 0)
    mask = mask_of_all(module)

    def embed(*batches: Tensor) -> Tensor:
        options = {"likelihood": likelihood, "n_directions": n_directions}
        V = fisher_embedding(module, batches, mask, dtype=torch.float64, **options)
        return V if n_directions else V.mT @ V

    for batches in ((x[:2], x[2:, :3]), (x[:2, :3], x[2:])):
        torch.testing.assert_close(embed(*batches), embed(x))
    if n_directions:
        assert not torch.equal(embed(x)[:2], embed(x[:2].flip(0)).flip(0))


@pytest.mark.parametrize("n_directions", [None, 4, 100])
@pytest.mark.parametrize("kind", ["categorical", "bernoulli", "gaussian"])
def test_ignored_positions_count_nothing(kind: str, n_directions: int | None) -> None:
    module, *_ = case("tokens")
    x = tokens(4)
    x[1, 2:] = x[2] = 0
    likelihood = type(as_likelihood(LIKELIHOODS[kind][0]))(ignored=lambda batch: batch == 0)
    options = {"likelihood": likelihood, "n_directions": n_directions}
    V = fisher_embedding(module, [x], mask_of_all(module), dtype=torch.float64, **options)
    assert not V[2].any()
    if n_directions is None:
        # As if the sequence ended there: later tokens do not change what is before.
        short = fisher_embedding(
            module, [x[1:2, :2]], mask_of_all(module), dtype=torch.float64, **options
        )
        torch.testing.assert_close(V[1].T @ V[1], short[0].T @ short[0])
    diagonal = fisher_diagonal(module, [x], **options)
    torch.testing.assert_close(flat(diagonal), V.square().sum(1).mean(0))
    predicted = predict(module, [x], likelihood=likelihood)
    short = predict(module, [x[1:2, :2]], likelihood=likelihood)
    torch.testing.assert_close(predicted.uncertainty[1:2], short.uncertainty)


def test_ignored_positions_of_another_shape() -> None:
    likelihood = Categorical(ignored=lambda batch: batch[:, :2] == 0)
    with pytest.raises(ValueError, match=r"shape \(3, 4\) .*found \(3, 2\)"):
        fisher_diagonal(Tagger(), [tokens(3)], likelihood=likelihood)
