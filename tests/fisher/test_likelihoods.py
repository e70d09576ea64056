"""Likelihoods on networks, against the second derivatives of their losses."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from skfishermask import ParameterMask, fisher_diagonal, fisher_embedding
from skfishermask.fisher import Bernoulli, Categorical, Gaussian, as_likelihood, predict
from skfishermask.fisher.directions import random_signs
from tests import networks, oracles

TOLERANCE = 1e-10


def cross_entropy(f: Tensor, f0: Tensor) -> Tensor:
    return F.cross_entropy(f, f0.softmax(1), reduction="sum")


def binary_cross_entropy(f: Tensor, f0: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(f, f0.sigmoid(), reduction="sum")


def half_squares(f: Tensor, f0: Tensor) -> Tensor:
    return 0.5 * (f - f0).square().sum() / 0.3


def expected_poisson(f: Tensor, f0: Tensor) -> Tensor:
    return F.poisson_nll_loss(f, f0.exp(), reduction="sum")


class Poisson:
    """Counts: a user's own likelihood."""

    def check(self, outputs: Tensor) -> None:
        if outputs.dim() != 2:
            raise ValueError("two axes")

    def rank(self, outputs: Tensor) -> int:
        return outputs.shape[1]

    def factor(self, outputs: Tensor) -> Tensor:
        return torch.diag_embed(torch.exp(outputs / 2))


LIKELIHOODS = {
    "categorical": ("categorical", cross_entropy),
    "bernoulli": ("bernoulli", binary_cross_entropy),
    "gaussian": (Gaussian(0.3), half_squares),
    "poisson": (Poisson(), expected_poisson),
}


class Tagger(nn.Module):
    """A label for each token: logits (n, C, length)."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.cell = nn.Embedding(7, 3), nn.GRU(3, 3, batch_first=True)
        self.head = nn.Linear(3, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden, _ = self.cell(self.table(tokens))
        return self.head(hidden).transpose(1, 2)


def pixels() -> nn.Module:
    """A label for each pixel: logits (n, C, height, width)."""
    return nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.Conv2d(2, 3, 1))


def tokens(n: int) -> Tensor:
    return torch.randint(1, 7, (n, 4), generator=torch.Generator().manual_seed(3))


def images(n: int) -> Tensor:
    return torch.randn(n, 1, 3, 2, generator=torch.Generator().manual_seed(3))


POSITIONS = {"tokens": (Tagger, tokens), "pixels": (pixels, images)}


def is_small(make: Callable[[], nn.Module]) -> bool:
    return sum(p.numel() for p in make().parameters()) < 700


def everything(module: nn.Module) -> ParameterMask:
    zeros = {n: torch.zeros_like(module.get_parameter(n)) for n in oracles.trainable(module)}
    return ParameterMask.from_diagonal(zeros, "all", 1.0, output_layer=[])


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def flat(diagonal: dict[str, Tensor]) -> Tensor:
    return torch.cat([d.flatten() for d in diagonal.values()])


@pytest.fixture(scope="module")
def cases() -> dict[str, tuple[nn.Module, networks.Batch, Tensor, Tensor]]:
    """Networks with their input, the oracle's Jacobian and the outputs, computed once each."""

    class Cases(dict):
        def __missing__(self, name: str) -> tuple[nn.Module, networks.Batch, Tensor, Tensor]:
            make, sample = {**networks.NETWORKS, **POSITIONS}[name]
            torch.manual_seed(1)
            module, x = make().double(), oracles.cast(sample(4))
            self[name] = (module, x, *oracles.jacobian(module, x))
            return self[name]

    return Cases()


SMALL = [name for name, (make, _) in networks.NETWORKS.items() if is_small(make)]


@pytest.mark.parametrize("kind", LIKELIHOODS)
@pytest.mark.parametrize("name", [*SMALL, *POSITIONS])
@pytest.mark.filterwarnings("ignore:Reading")
def test_diagonal_and_embedding_against_the_oracle(name: str, kind: str, cases: dict) -> None:
    module, x, J, outputs = cases[name]
    likelihood, loss = LIKELIHOODS[kind]
    if name in POSITIONS and kind == "poisson":
        with pytest.raises(ValueError, match="two axes"):
            fisher_diagonal(module, [x], likelihood=likelihood)
        return
    J = J[:, :, oracles.columns(module, oracles.trainable(module))]
    information = oracles.information_of_loss(J, outputs, loss)
    batches = [oracles.rows(x, slice(3)), oracles.rows(x, slice(3, None))]
    diagonal = fisher_diagonal(module, batches, likelihood=likelihood)
    expected = information.diagonal(dim1=1, dim2=2).mean(0)
    assert error(flat(diagonal), expected) < TOLERANCE
    V = fisher_embedding(
        module, batches, everything(module), likelihood=likelihood, dtype=torch.float64
    )
    assert V.shape[1] == as_likelihood(likelihood).rank(outputs)
    assert error(V.mT @ V, information) < TOLERANCE


@pytest.mark.parametrize("kind", ["categorical", "bernoulli", "gaussian"])
@pytest.mark.parametrize("name", POSITIONS)
def test_random_combinations_are_exact_in_the_mean(name: str, kind: str, cases: dict) -> None:
    *_, outputs = cases[name]
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


@pytest.mark.parametrize("kind", ["categorical", "bernoulli", "gaussian"])
def test_combinations_do_not_depend_on_batches_or_padding(kind: str, cases: dict) -> None:
    module, *_ = cases["tokens"]
    x = tokens(5)
    x[:, 3] = 0  # Padding, of which the last batch is free.
    likelihood = type(as_likelihood(LIKELIHOODS[kind][0]))(ignored=lambda batch: batch == 0)
    mask = everything(module)

    def embed(*batches: Tensor) -> Tensor:
        return fisher_embedding(
            module, batches, mask, likelihood=likelihood, n_directions=2, dtype=torch.float64
        )

    torch.testing.assert_close(embed(x[:2], x[2:, :3]), embed(x))
    assert not torch.equal(embed(x)[:2], embed(x[:2].flip(0)).flip(0))


@pytest.mark.parametrize("n_directions", [None, 4, 100])
@pytest.mark.parametrize("kind", ["categorical", "bernoulli", "gaussian"])
def test_ignored_positions_count_nothing(kind: str, n_directions: int | None, cases: dict) -> None:
    module, *_ = cases["tokens"]
    x = tokens(4)
    x[1, 2:] = x[2] = 0
    likelihood = type(as_likelihood(LIKELIHOODS[kind][0]))(ignored=lambda batch: batch == 0)
    options = {"likelihood": likelihood, "n_directions": n_directions}
    V = fisher_embedding(module, [x], everything(module), dtype=torch.float64, **options)
    assert not V[2].any()
    if n_directions is None:
        # As if the sequence ended there: later tokens do not change what is before.
        short = fisher_embedding(
            module, [x[1:2, :2]], everything(module), dtype=torch.float64, **options
        )
        torch.testing.assert_close(V[1].T @ V[1], short[0].T @ short[0])
    diagonal = fisher_diagonal(module, [x], **options)
    torch.testing.assert_close(flat(diagonal), V.square().sum(1).mean(0))
    predicted = predict(module, [x], likelihood=likelihood)
    short = predict(module, [x[1:2, :2]], likelihood=likelihood)
    torch.testing.assert_close(predicted.uncertainty[1:2], short.uncertainty)
    torch.testing.assert_close(predicted.class_probabilities[1:2], short.class_probabilities)


def test_signs_are_fair_and_independent() -> None:
    signs = random_signs(0, 0, torch.device("cpu"), (50, 20, 30))
    assert signs.unique().tolist() == [-1, 1]
    others = [
        random_signs(0, 1, signs.device, signs.shape),
        random_signs(1, 0, signs.device, signs.shape),
        signs.roll(1, 1),
        signs.roll(1, 2),
    ]
    for values in [signs, *(signs * other for other in others)]:
        # Four standard errors.
        assert abs(float(values.mean())) < 4 / values.numel() ** 0.5
    # One sample's are those of the same number in another batch, and of a longer one.
    one = random_signs(3, 0, signs.device, (1, 20, 40))
    assert torch.equal(one[..., :30], signs[3:4])


def test_leading_labels_carry_the_most_trace() -> None:
    z = torch.tensor([[4.0, 0.0, -1.0]]).double()
    R = Bernoulli().directions(z, 2)[0]
    p = z.sigmoid()[0]
    expected = torch.zeros(2, 3).double()
    expected[0, 1], expected[1, 2] = (p * (1 - p)).sqrt()[1:]
    torch.testing.assert_close(R, expected)


def test_uncertainty_by_hand() -> None:
    z = torch.tensor([0.9, 0.5]).double().logit()[None]
    assert Bernoulli().uncertainty(z).tolist() == pytest.approx([(0.2 + 1) / 2])
    assert Gaussian().uncertainty(torch.randn(3, 2)).tolist() == [1, 1, 1]
    p = torch.tensor([[0.7, 0.2, 0.1], [0.5, 0.5, 0.0]]).double().T[None]  # Two positions.
    assert Categorical().uncertainty(p.log()).tolist() == pytest.approx([(0.5 + 1) / 2])
    assert Categorical().class_probabilities(p.log())[0].tolist() == pytest.approx(
        [0.6, 0.35, 0.05]
    )


def test_one_logit_is_two_classes() -> None:
    module, x = nn.Linear(4, 1).double(), torch.randn(6, 4).double()
    two = copy.deepcopy(module)
    binary = fisher_diagonal(module, [x], likelihood="bernoulli")
    squeezed = fisher_diagonal(
        two, [x], likelihood="bernoulli", to_logits=lambda output: output.squeeze(1)
    )
    classes = fisher_diagonal(
        module, [x], to_logits=lambda z: torch.cat([torch.zeros_like(z), z], 1)
    )
    for name in classes:
        torch.testing.assert_close(binary[name], classes[name])
        torch.testing.assert_close(squeezed[name], classes[name])


def test_a_share_of_the_trace_needs_an_order() -> None:
    x = tokens(3)
    with pytest.raises(ValueError, match="share of the trace"):
        fisher_embedding(Tagger(), [x], everything(Tagger()), n_directions=0.5)
    V = fisher_embedding(
        nn.Linear(4, 3),
        [torch.randn(5, 4)],
        everything(nn.Linear(4, 3)),
        likelihood="bernoulli",
        n_directions=0.99,
    )
    assert 1 < V.shape[1] <= 3


@pytest.mark.parametrize("wrong", ["poisson", Categorical, 3, None])
def test_no_likelihood(wrong: object) -> None:
    with pytest.raises(TypeError, match=r"must be one of .*check, rank and factor"):
        fisher_diagonal(nn.Linear(4, 3), [torch.randn(2, 4)], likelihood=wrong)


def test_a_factor_of_another_shape() -> None:
    class Wrong(Poisson):
        def rank(self, outputs: Tensor) -> int:
            return 1

    with pytest.raises(ValueError, match=r"of Wrong must be .* \(2, 1, 3\), found \(2, 3, 3"):
        fisher_diagonal(nn.Linear(4, 3), [torch.randn(2, 4)], likelihood=Wrong())


def test_unweighted_scores_are_for_classes() -> None:
    with pytest.raises(ValueError, match="is for classes, found likelihood='gaussian'"):
        fisher_embedding(
            nn.Linear(4, 3),
            [torch.randn(2, 4)],
            everything(nn.Linear(4, 3)),
            likelihood="gaussian",
            weighting="none",
        )


@pytest.mark.parametrize("wrong", [0, -1.0, float("nan"), float("inf")])
def test_a_variance_is_positive(wrong: float) -> None:
    with pytest.raises(ValueError, match="variance must be a positive number"):
        Gaussian(wrong)


def test_ignored_positions_of_another_shape() -> None:
    likelihood = Categorical(ignored=lambda batch: batch[:, :2] == 0)
    with pytest.raises(ValueError, match=r"shape \(3, 4\) .*found \(3, 2\)"):
        fisher_diagonal(Tagger(), [tokens(3)], likelihood=likelihood)
