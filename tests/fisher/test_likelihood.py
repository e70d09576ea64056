from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from skfishermask import fisher_diagonal, fisher_embedding, select_batch
from skfishermask.fisher import (
    Bernoulli,
    Categorical,
    Gaussian,
    as_likelihood,
    fisher_matrix,
)
from skfishermask.fisher.likelihood import (
    UnweightedCategorical,
    categorical_factor,
)
from tests import networks, oracles
from tests.fisher.common import (
    LIKELIHOODS,
    POSITIONS,
    TOLERANCE,
    Poisson,
    case,
    error,
    flat,
    mask_of_all,
)
from tests.pairs import each_with_one


def probabilities(n: int, n_classes: int, temperature: float, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, n_classes, generator=generator, dtype=torch.float64)
    return (logits * temperature).softmax(1)


def covariance(p: torch.Tensor) -> torch.Tensor:
    return torch.diag_embed(p) - p[:, :, None] * p[:, None, :]


@given(n_classes=st.integers(2, 12), temperature=st.floats(0, 200), seed=st.integers(0, 2**32 - 1))
def test_rows_factorise_the_covariance(n_classes: int, temperature: float, seed: int) -> None:
    p = probabilities(3, n_classes, temperature, seed)
    R = categorical_factor(p)
    assert R.shape == (3, n_classes - 1, n_classes)
    assert torch.isfinite(R).all()
    torch.testing.assert_close(R.mT @ R, covariance(p), rtol=1e-12, atol=1e-15)


def test_a_small_tail_keeps_its_digits() -> None:
    # 1 - p_1 would lose all digits of this tail.
    p = torch.tensor([[1.0, 3e-30, 1e-30]], dtype=torch.float64)
    R = categorical_factor(p)[0]
    # The trace of diag(p) - p p^T is 2 (p_2 + p_3) to first order.
    assert R.square().sum() == pytest.approx(8e-30, rel=1e-12)


@pytest.mark.parametrize("certain", [[1.0, 0.0, 0.0], [0.0, 0.5, 0.5], [0.0, 0.0, 1.0]])
def test_zero_probabilities_give_finite_rows(certain: list[float]) -> None:
    p = torch.tensor([certain], dtype=torch.float64)
    R = categorical_factor(p)
    torch.testing.assert_close(R.mT @ R, covariance(p), rtol=0, atol=1e-16)


@pytest.mark.parametrize("r", [1, 2, 3, 5])
def test_truncation_has_the_residual_of_the_closed_form(r: int) -> None:
    p = probabilities(4, 6, 2.0)
    residual = covariance(p) - categorical_factor(p, r).mT @ categorical_factor(p, r)
    sorted_p = p.sort(1, descending=True).values
    dropped = torch.zeros(4, dtype=torch.float64)
    for i in range(r, 5):  # The dropped rows, by their formula.
        s = sorted_p[:, i + 1 :].sum(1)
        before = sorted_p[:, i:].sum(1)
        tail = sorted_p[:, i + 1 :].square().sum(1)
        dropped += sorted_p[:, i] * s / before * (1 + tail / s.square())
    torch.testing.assert_close(residual.diagonal(dim1=1, dim2=2).sum(1), dropped)
    assert torch.linalg.eigvalsh(residual).min() > -1e-15  # What is dropped is information.


def test_the_first_row_is_the_binary_view() -> None:
    p = probabilities(5, 4, 1.0)
    q = p.max(1).values
    row = categorical_factor(p, 1)[:, 0]
    # The event "the predicted class or another": its score has variance q (1 - q).
    best = row.gather(1, p.argmax(1, keepdim=True))[:, 0]
    torch.testing.assert_close(best, (q * (1 - q)).sqrt())


def test_unweighted_rows_are_the_scores_in_logit_space() -> None:
    p = probabilities(3, 5, 1.0)
    order = p.argsort(1, descending=True)
    expected = torch.eye(5).double()[order] - p[:, None, :]
    unweighted = UnweightedCategorical()
    torch.testing.assert_close(unweighted.factor(p.log()), expected)
    torch.testing.assert_close(unweighted.directions(p.log(), 2), expected[:, :2])
    assert unweighted.rank(p) == 5
    assert Categorical().rank(p) == 4


# One of each way in which parameters are read; `test_information.py` has all networks.
NETWORKS = [
    "mlp", "conv_norm", "text_gru", "windows", "encoder", "masked_encoder", "class_token",
    "rnn_packed", "written_lstm", "routed", "sometimes_twice", "branching", "spectral_norm",
    "lora", "own_function", "frozen_and_unused", "checkpointed", "bag_mean", "norms",
    "transposed_convolutions",
]  # fmt: skip


KINDS = ["bernoulli", "gaussian", "own", "categorical"]


@pytest.mark.parametrize(("name", "kind"), each_with_one([*NETWORKS, *POSITIONS], KINDS, POSITIONS))
@pytest.mark.filterwarnings("ignore:Reading")
def test_diagonal_and_embedding_against_the_oracle(name: str, kind: str) -> None:
    module, x, J, outputs = case(name)
    likelihood, loss = LIKELIHOODS[kind]
    if name in POSITIONS and kind == "own":
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
        module, batches, mask_of_all(module), likelihood=likelihood, dtype=torch.float64
    )
    assert V.shape[1] == as_likelihood(likelihood).rank(outputs)
    assert error(V.mT @ V, information) < TOLERANCE


# Layers, convolutions, attention, ragged sequences, experts; a label for each token or pixel.
PICKED = ["mlp", "conv_norm", "attention", "gru_packed", "routed_tokens", *POSITIONS]


@pytest.mark.parametrize(
    ("name", "kind"), each_with_one(PICKED, ["categorical", "bernoulli", "gaussian"])
)
@pytest.mark.filterwarnings("ignore:Reading")
def test_picks_against_the_oracle(name: str, kind: str) -> None:
    make, sample = {**networks.NETWORKS, **POSITIONS}[name]
    torch.manual_seed(1)
    module, x = make().double(), oracles.cast(sample(16))
    likelihood, loss = LIKELIHOODS[kind]
    J, outputs = oracles.jacobian(module, x)
    J = J[:, :, oracles.columns(module, oracles.trainable(module))]
    information = oracles.information_of_loss(J, outputs, loss)
    values, vectors = torch.linalg.eigh(information)
    rank = as_likelihood(likelihood).rank(outputs)
    rows = (vectors * values.clamp(min=0).sqrt()[:, None])[:, :, -rank:].mT
    labeled = {"n_labeled": 4, "fisher_labeled": information[:4].mean(0)}
    expected, gains = oracles.select_batch_oracle(rows[4:], 5, information.mean(0), **labeled)

    mask = mask_of_all(module)
    V = fisher_embedding(module, [x], mask, likelihood=likelihood, dtype=torch.float64)
    labeled |= {"fisher_labeled": fisher_matrix(V[:4])}
    found, found_gains = select_batch(V[4:], 5, fisher_matrix(V), **labeled)
    assert found.tolist() == expected
    assert found_gains.tolist() == pytest.approx(gains, rel=1e-8)


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


@pytest.mark.parametrize("wrong", ["of none", Categorical, 3, None])
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
            mask_of_all(nn.Linear(4, 3)),
            likelihood="gaussian",
            weighting="none",
        )


@pytest.mark.parametrize("wrong", [0, -1.0, float("nan"), float("inf")])
def test_a_variance_is_positive(wrong: float) -> None:
    with pytest.raises(ValueError, match="variance must be a positive number"):
        Gaussian(wrong)
