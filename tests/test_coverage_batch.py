"""The share of a query's batch that covers the inputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from skorch import NeuralNetClassifier
from torch import Tensor, nn
from torch.nn.functional import normalize

from skfishermask import FisherMaskSampler
from skfishermask.fisher import margin_uncertainty
from tests import nets, oracles

X, Y = nets.digits()
X_LABELED, X_POOL = X[:60], X[60:110]
SMALL = {"mask_fraction": 160, "n_mask_samples": None, "random_state": 0}


def by_coverage(net: Any, n: int, pool: np.ndarray = X_POOL) -> list[int]:
    there, labeled = (normalize(torch.as_tensor(part).double()) for part in (pool, X_LABELED))
    w = margin_uncertainty(torch.as_tensor(net.predict_proba(pool)).double())
    return oracles.select_by_coverage(there, labeled, w, n)


def test_a_share_is_taken_by_coverage(net: Any) -> None:
    alone = FisherMaskSampler(coverage_share=1.0, **SMALL)
    indices, gains = alone(net, X_POOL, 8, X_labeled=X_LABELED)
    assert indices.tolist() == by_coverage(net, 8)
    assert len(gains) == 8
    assert (gains > 0).all()
    half = FisherMaskSampler(coverage_share=0.5, **SMALL)
    found, of_half = half(net, X_POOL, 8, X_labeled=X_LABELED)
    assert found[:4].tolist() == indices[:4].tolist()
    assert (of_half > 0).all()
    assert half.query_info_["coverage_share"] == 0.5
    none = FisherMaskSampler(coverage_share=0, **SMALL)
    assert none(net, X_POOL, 8, X_labeled=X_LABELED)[0].tolist() != found.tolist()


def test_a_pool_of_few_distinct_rows_has_a_batch() -> None:
    """A net that is certain of all, and a pool that has every labelled row, five times."""
    rows = np.array(np.meshgrid(*[[0, 1]] * 4)).reshape(4, -1).T.astype("float32")
    pool = np.concatenate([np.repeat(rows, 5, axis=0), rows[np.arange(520) % 16]])
    module = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))
    net = NeuralNetClassifier(module, criterion=nn.CrossEntropyLoss, **nets.options(max_epochs=1))
    net.fit(rows, np.arange(16) % 4)
    with torch.no_grad():
        module[1].weight.zero_()
        module[1].bias.copy_(torch.tensor([900.0, 0, 0, 0]))
    sampler = FisherMaskSampler(coverage_share=1.0, random_state=0)
    for X_labeled in (rows, None):
        found = sampler(net, pool, 40, X_labeled=X_labeled)[0].tolist()
        assert len(set(found)) == 40
        for row in rows:  # Of equal ones the first.
            equal = np.flatnonzero((pool == row).all(1)).tolist()
            chosen = [i for i in found if i in equal]
            assert chosen == equal[: len(chosen)]


def share_of(net: Any, pool: np.ndarray, X_labeled: Any, **asked: Any) -> float:
    sampler = FisherMaskSampler(random_state=0)
    sampler(net, pool, 10, X_labeled=X_labeled, **asked)
    return sampler.query_info_["coverage_share"]


def test_by_default_all_of_the_batch_covers(net: Any) -> None:
    sampler = FisherMaskSampler(random_state=0)
    assert sampler(net, X_POOL, 8, X_labeled=X_LABELED)[0].tolist() == by_coverage(net, 8)
    assert share_of(net, X_POOL, X[200:400]) == 1
    binary = nets.binary_net().fit(X[:60], (Y[:60] > 4).astype("float32"))
    assert share_of(binary, X_POOL, X[:10]) == 1


def test_target_samples_are_covered(net: Any) -> None:
    target = X[200:260]
    sampler = FisherMaskSampler(random_state=0)
    found, _ = sampler(net, X_POOL, 8, X_labeled=X_LABELED, X_target=target)
    sets = [normalize(torch.as_tensor(part).double()) for part in (X_POOL, X_LABELED, target)]
    w = margin_uncertainty(torch.as_tensor(net.predict_proba(target)).double())
    assert found.tolist() == oracles.select_by_coverage(*sets[:2], w, 8, target=sets[2])
    assert found.tolist() != by_coverage(net, 8)


@pytest.mark.parametrize(
    "options",
    [
        {"mask": "output_layer"},
        {"mask_fraction": 200},
        {"n_mask_samples": None},
        {"n_directions": 2},
        {"target": "identity"},
        {"use_labeled": False},
        {"regularization": 0.1},
        {"oversample": 2.0},
        {"embedding_dtype": "float64"},
    ],
    ids=str,
)
def test_a_parameter_of_the_fisher_information_is_not_ignored(
    net: Any, options: dict[str, Any]
) -> None:
    sampler = FisherMaskSampler(random_state=0, **options)
    sampler(net, X_POOL, 3, X_labeled=X_LABELED)
    assert sampler.query_info_["coverage_share"] == 0
    sampler.set_params(coverage_share=1)(net, X_POOL, 3, X_labeled=X_LABELED)
    assert sampler.mask_ is None


class NoGradient(torch.autograd.Function):
    """Nothing is to be differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise AssertionError("a gradient was asked for")


class Undifferentiable(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return NoGradient.apply(super().forward(x))


def test_coverage_alone_computes_no_gradients(net: Any) -> None:
    options = nets.options(max_epochs=0)
    module = Undifferentiable(64, 10)
    untrained = NeuralNetClassifier(module, criterion=nn.CrossEntropyLoss, **options).initialize()
    sampler = FisherMaskSampler(coverage_share=1.0, random_state=0)
    indices, _ = sampler(untrained, X_POOL, 8, X_labeled=X_LABELED)
    assert len(set(indices.tolist())) == 8
    assert sampler.mask_ is None
    assert sampler.fisher_diagonal_ is None
    before, after = sampler.query_info_["objective"]
    assert before > after > 0
    with pytest.raises(AssertionError, match="a gradient"):
        sampler.set_params(coverage_share=0.5)(untrained, X_POOL, 8, X_labeled=X_LABELED)


class Means(nn.Module):
    """Of a few numbers of each sample, or of the rows of a table that they name."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 3)

    def forward(self, X: Tensor) -> Tensor:
        return X.flatten(1)[:, :3] if X.is_floating_point() else self.table(X).mean(1)


def net_of(X: np.ndarray) -> Any:
    module = nn.Sequential(Means(), nn.Linear(3, 4))
    net = NeuralNetClassifier(module, criterion=nn.CrossEntropyLoss, **nets.options(max_epochs=1))
    return net.fit(X[:8], np.arange(8) % 4)


def test_token_ids_are_not_covered() -> None:
    ids = np.random.default_rng(0).integers(20, size=(40, 5))
    assert share_of(net_of(ids), ids, ids[:4]) == 0
    with pytest.raises(ValueError, match=r"coverage_share=0\.5 needs inputs with real numbers"):
        FisherMaskSampler(coverage_share=0.5)(net_of(ids), ids, 3)


@pytest.mark.parametrize(("n_inputs", "covers"), [(2048, True), (2052, False)])
def test_large_images_are_not_covered_of_themselves(n_inputs: int, covers: bool) -> None:
    images = np.random.default_rng(0).normal(size=(40, 4, n_inputs // 4)).astype("float32")
    assert share_of(net_of(images), images, images[:1]) == covers
    sampler = FisherMaskSampler(coverage_share=0.5, random_state=0)
    sampler(net_of(images), images, 4)
    assert sampler.query_info_["coverage_share"] == 0.5


class Sequences(torch.utils.data.Dataset):
    """Of several lengths, or of one."""

    def __init__(self, *lengths: int) -> None:
        self.lengths = lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return torch.arange(self.lengths[i]) + 1.0 + i, 0


@pytest.mark.parametrize(
    ("pool", "labeled"),
    [
        (Sequences(3, 4, 5, 6), Sequences(4)),
        (Sequences(4, 4, 4), Sequences(4, 5)),
        (Sequences(4, 4, 4), Sequences(5)),
    ],
    ids=["pool", "labelled", "each of one"],
)
def test_inputs_of_several_lengths_are_not_covered(pool: Any, labeled: Any) -> None:
    net = net_of(np.ones((8, 3), dtype="float32"))
    sampler = FisherMaskSampler(coverage_share="auto", batch_size=1, random_state=0)
    indices, _ = sampler(net, pool, 3, X_labeled=labeled)
    assert sampler.query_info_["coverage_share"] == 0
    plain = FisherMaskSampler(coverage_share=0, batch_size=1, random_state=0)
    assert plain(net, pool, 3, X_labeled=labeled)[0].tolist() == indices.tolist()
    with pytest.raises(ValueError, match=r"coverage_share=1.0 needs inputs of one length"):
        sampler.set_params(coverage_share=1.0)(net, pool, 3, X_labeled=labeled)


class Counting(torch.utils.data.Dataset):
    """Counts how often each sample is read."""

    def __init__(self, X: np.ndarray) -> None:
        self.X, self.n_reads = X, np.zeros(len(X), int)

    def __len__(self) -> int:
        return len(self.X)

    def __getitem__(self, i: int) -> tuple[np.ndarray, int]:
        self.n_reads[i] += 1
        return self.X[i], 0


def test_coverage_reads_a_sample_once_more(net: Any) -> None:
    reads = []
    for share in (0.0, 0.5):
        pool, labeled = Counting(X_POOL), Counting(X_LABELED)
        FisherMaskSampler(coverage_share=share, **SMALL)(net, pool, 4, X_labeled=labeled)
        reads.append(np.concatenate([pool.n_reads[1:], labeled.n_reads[1:]]))
    assert set(reads[1] - reads[0]) == {1}


def test_a_large_pool_is_covered_by_some() -> None:
    large = np.random.default_rng(0).normal(size=(20_050, 3)).astype("float32")
    net = net_of(large)
    sampler = FisherMaskSampler(
        coverage_share=1.0, **SMALL | {"mask_fraction": "auto", "n_mask_samples": 100}
    )
    indices, _ = sampler(net, large, 30)
    assert len(set(indices.tolist())) == 30
    assert indices.max() > 10_000
    assert sampler.query_info_["n_candidates"] == 20_000
    other = sampler.set_params(random_state=1)(net, large, 30)[0]
    assert other.tolist() != indices.tolist()


class Several(nn.Module):
    """A linear network of two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 10)

    def forward(self, top: Tensor, bottom: Tensor) -> Tensor:
        return self.linear(torch.cat([top, bottom], 1))


def test_several_inputs_are_covered_like_one() -> None:
    def halves(X: np.ndarray) -> dict[str, np.ndarray]:
        return {"top": X[:, :20], "bottom": X[:, 20:]}

    one = nets.fitted(
        NeuralNetClassifier(nn.Linear(64, 10), criterion=nn.CrossEntropyLoss, **nets.options())
    )
    two = NeuralNetClassifier(Several, criterion=nn.CrossEntropyLoss, **nets.options())
    two.fit(halves(X[:60]), Y[:60])
    two.module_.linear.load_state_dict(one.module_.state_dict())
    sampler = FisherMaskSampler(coverage_share=1.0, random_state=0)
    expected, _ = sampler(one, X_POOL, 6, X_labeled=X_LABELED)
    found, _ = sampler(two, halves(X_POOL), 6, X_labeled=halves(X_LABELED))
    assert found.tolist() == expected.tolist()
