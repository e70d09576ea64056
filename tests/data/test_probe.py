"""What a query reads of a net is what the net predicts with, or the query is refused."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from skorch import NeuralNetClassifier
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

from skfishermask import PUBLISHED, FisherMaskSampler, fisher_diagonal
from skfishermask.modal import ActiveLearner
from tests import nets, oracles
from tests.pairs import each_with_one

X, Y = nets.digits()
# Parameters of all layers, chosen without a diagonal.
SOME: dict[str, Any] = PUBLISHED | {"mask": "random", "mask_fraction": 250, "random_state": 0}
# Layers of this module are those of `nets.mlp`.
WEIGHTS = nets.fitted(nets.logits_net()).module_.state_dict()


class Prepared(nn.Module):
    """The network on inputs that it prepares itself."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nets.mlp()
        self.mlp.load_state_dict(WEIGHTS)

    def prepare(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.prepare(x))


class Times(Prepared):
    def prepare(self, x: Tensor) -> Tensor:
        return (x - 2.0**30).to(self.mlp[0].weight.dtype)


class LargeIntegers(Prepared):
    """Integers up to 2 ** 24 + 16 that came as floats."""

    def prepare(self, x: Tensor) -> Tensor:
        return (x.long() - 2**24).float() / 16


class Bytes(Prepared):
    def prepare(self, x: Tensor) -> Tensor:
        return x.float() / 16


class Signs(Prepared):
    """Booleans as minus one and one."""

    def prepare(self, x: Tensor) -> Tensor:
        return 2 * x.float() - 1


class Narrow(Prepared):
    def __init__(self) -> None:
        super().__init__()
        self.mlp.bfloat16()

    def prepare(self, x: Tensor) -> Tensor:
        return ((x - 2.0**10) / 2**4).bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).float()


class Scaling(NeuralNetClassifier):
    def infer(self, x: Any, **fit_params: Any) -> Any:
        return super().infer((x - 2.0**30).float(), **fit_params)


def net_of(module: Any, kind: Any = NeuralNetClassifier, **more: Any) -> Any:
    return kind(module, **nets.options(criterion=nn.CrossEntropyLoss) | more).initialize()


def picks(net: Any, pool: Any = X[60:160], labeled: Any = X[:60], **more: Any) -> Any:
    return FisherMaskSampler(**SOME | more)(net, pool, 8, X_labeled=labeled)


@cache
def plain(scale: float = 1.0) -> Any:
    """What is chosen by the network on inputs that are as it takes them."""
    return picks(net_of(Prepared()), X[60:160] * scale, X[:60] * scale)


def assert_same(found: Any, expected: Any, rtol: float = 1e-4) -> None:
    assert found[0].tolist() == expected[0].tolist()
    np.testing.assert_allclose(found[1], expected[1], rtol=rtol)


DIGITS = (16 * X).astype("float64")


# How the net is made, its samples, and what it makes of them.
PREPARING: dict[str, tuple[Callable[[], Any], np.ndarray, np.ndarray | None]] = {
    "float64 times": (lambda: net_of(Times()), 2.0**30 + X.astype("float64"), X),
    "integers as floats": (lambda: net_of(LargeIntegers()), 2**24 + DIGITS, X),
    "scaling in infer": (
        lambda: net_of(Prepared().mlp, Scaling),
        2.0**30 + X.astype("float64"),
        X,
    ),
    "float32 into bfloat16": (lambda: net_of(Narrow()), 2**10 + 2**4 * X, None),
    "bytes": (lambda: net_of(Bytes()), (16 * X).astype("uint8"), X),
    "booleans": (
        lambda: net_of(Signs()),
        X > 0.5,
        np.where(X > 0.5, 1, -1).astype("float32"),
    ),
}


@pytest.mark.parametrize(("way", "kind"), each_with_one(PREPARING, ["array", "tensor"]))
def test_a_net_prepares_its_input_itself(way: str, kind: str) -> None:
    net, raw, same = PREPARING[way]
    made, samples = net(), torch.as_tensor(raw) if kind == "tensor" else raw
    found = picks(made, samples[60:160], samples[:60])
    if same is None:
        p = made.predict_proba(samples[60:160])
        same_net = net_of(Narrow())
        # The same prepared beforehand: a cast to bfloat16 of the raw inputs would lose them.
        type(same_net.module_).prepare, old = lambda self, x: x.bfloat16(), Narrow.prepare
        try:
            expected = picks(same_net, X[60:160], X[:60])
            np.testing.assert_allclose(p, same_net.predict_proba(X[60:160]), rtol=1e-2)
        finally:
            Narrow.prepare = old
    else:
        expected = picks(net_of(Prepared()), same[60:160], same[:60])
    assert_same(found, expected)


def test_a_diagonal_sees_what_forward_is_given() -> None:
    x = 2.0**30 + torch.as_tensor(X[:9]).double()
    found = fisher_diagonal(Times(), [x])
    g, p = oracles.scores(Times(), x)
    flat = torch.cat([d.flatten() for d in found.values()])
    torch.testing.assert_close(flat, oracles.diagonal(g, p), rtol=1e-4, atol=1e-8)


def test_a_dtype_that_the_network_does_not_take() -> None:
    message = r"torch.float64, the network's parameters torch.float32: cast the samples"
    with pytest.raises(RuntimeError, match=message):
        fisher_diagonal(nets.mlp(), [torch.as_tensor(DIGITS[:4])])
    with pytest.raises(ValueError, match=message):
        picks(net_of(nets.mlp()), DIGITS[60:160], None)


def halves(dataset: Any, batch_size: int, **options: Any) -> Any:
    """An iterator that is a function, and changes the inputs."""
    for x, y in DataLoader(dataset, batch_size=batch_size):
        yield x / 2, y


class Halves:
    """An iterator that is a class, but no DataLoader."""

    def __init__(self, dataset: Any, batch_size: int = 1, scale: float = 2.0) -> None:
        self.dataset, self.batch_size, self.scale = dataset, batch_size, scale

    def __iter__(self) -> Iterator[Any]:
        rows = [*range(len(self.dataset))]
        for start in range(0, len(rows), self.batch_size):
            samples = [self.dataset[i] for i in rows[start : start + self.batch_size]]
            x, y = default_collate(samples)
            yield x / self.scale, y


class Halving:
    """An iterator that is made by calling an object."""

    def __call__(self, dataset: Any, batch_size: int = 1) -> Any:
        return halves(dataset, batch_size)


class HalvingLoader(DataLoader):
    def __iter__(self) -> Iterator[Any]:
        return ((x / 2, y) for x, y in super().__iter__())


class HalvingNet(NeuralNetClassifier):
    def get_iterator(self, dataset: Any, training: bool = False) -> Any:
        return HalvingLoader(dataset, batch_size=30)


class HalvingDataset(Dataset):
    def __init__(self, X: Any, y: Any = None) -> None:
        self.X = X

    def __len__(self) -> int:
        return len(self.X)

    def __getitem__(self, i: int) -> Any:
        return self.X[i] / 2, 0


OWN_WAYS = {
    "function": {"iterator_valid": halves},
    "class": {"iterator_valid": Halves},
    "class with a parameter": {"iterator_valid": Halves, "iterator_valid__scale": 2.0},
    "object": {"iterator_valid": Halving()},
    "partial": {"iterator_valid": partial(HalvingLoader, drop_last=False)},
    "loader": {"iterator_valid": HalvingLoader},
    "get_iterator": {"kind": HalvingNet},
    "dataset": {"dataset": HalvingDataset},
    "collate_fn": {
        "iterator_valid__collate_fn": lambda samples: default_collate(
            [(x / 2, 0) for x, _ in samples]
        )
    },
}


@pytest.mark.parametrize("way", OWN_WAYS)
def test_the_net_makes_batches_in_a_way_of_its_own(way: str) -> None:
    net = net_of(Prepared(), **OWN_WAYS[way])
    found = picks(net)
    assert_same(found, plain(np.float32(0.5)))
    assert_same(picks(net, batch_size=25), found)


class Tempered(NeuralNetClassifier):
    def predict_proba(self, X: Any) -> Any:
        p = super().predict_proba(X) ** 2
        return p / p.sum(1, keepdims=True)


class Rescaled(NeuralNetClassifier):
    def predict_proba(self, X: Any) -> Any:
        return super().predict_proba(X * np.float32(0.5))


class Stepping(NeuralNetClassifier):
    def evaluation_step(self, batch: Any, training: bool = False) -> Any:
        return super().evaluation_step((batch[0] + 1, batch[1]), training)


def by_length(dataset: Any, batch_size: int) -> Any:
    """Batches of similar samples: those of few grey pixels first."""
    order = sorted(range(len(dataset)), key=lambda i: float(np.sum(dataset[i][0])))
    return DataLoader([dataset[i] for i in order], batch_size=batch_size)


REFUSED = {
    "predict_proba": {"kind": Tempered},
    "samples in predict_proba": {"kind": Rescaled},
    "evaluation_step": {"kind": Stepping},
    "order": {"iterator_valid": by_length},
}


@pytest.mark.parametrize("way", REFUSED)
def test_another_way_of_predicting_is_refused(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("skfishermask.query.Query.run", None)  # refused before any work
    net = net_of(Prepared(), **REFUSED[way])
    net.module_.train()
    message = r"for row (\d+) of X_pool, output (\d), it reads ([\d.e-]+), and .* "
    with pytest.raises(ValueError, match=message) as caught:
        picks(net)
    assert net.module_.training
    assert net.criterion_.training
    if way == "predict_proba":
        row, column, read = re.search(message, str(caught.value)).groups()
        p = net_of(Prepared()).predict_proba(X[60:160])
        assert float(read) == pytest.approx(p[int(row), int(column)], rel=1e-4)


class LabelledOnly(NeuralNetClassifier):
    """Predicts otherwise for the labelled samples alone."""

    def predict_proba(self, X: Any) -> Any:
        p = super().predict_proba(X)
        return p[:, ::-1].copy() if np.asarray(X)[0, 0] == 7 else p


@pytest.mark.parametrize("argument", ["X_labeled", "X_target"])
def test_each_set_of_samples_is_looked_at(argument: str) -> None:
    net, odd = net_of(Prepared(), LabelledOnly), X[:60].copy()
    odd[0, 0] = 7
    sampler = FisherMaskSampler(**SOME)
    with pytest.raises(ValueError, match=f"for row 0 of {argument}, output"):
        sampler(net, X[60:160], 8, **{argument: odd})


class Merging(Prepared):
    """As networks with adapters do, it changes itself when its mode is set."""

    def train(self, mode: bool = True) -> Any:
        self.mlp[0].weight.data.mul_(2 if mode else 0.5)
        return super().train(mode)


def test_a_mode_is_not_set_by_a_method_of_the_network() -> None:
    net = net_of(Merging())
    before = net.module_.mlp[0].weight.detach().clone()
    picks(net)
    assert torch.equal(net.module_.mlp[0].weight, before)


def test_samples_without_labels_are_predicted_too() -> None:
    assert_same(picks(net_of(Prepared()), TensorDataset(torch.as_tensor(X[60:160]))), plain())


class Draws(Dataset):
    """Changes its samples at random, as an augmentation does."""

    def __len__(self) -> int:
        return 100

    def __getitem__(self, i: int) -> Any:
        return torch.as_tensor(X[i]) + 0.1 * torch.randn(64), 0


@pytest.mark.parametrize("n_workers", [0, 1])
def test_a_dataset_that_draws_is_compared_with_the_same_draws(n_workers: int) -> None:
    net = net_of(Prepared(), iterator_valid__num_workers=n_workers)
    state = torch.get_rng_state()
    picks(net, Draws())
    assert torch.equal(torch.get_rng_state(), state)


class LowRank(nn.Module):
    """A frozen layer in one dtype, and a trained product of two factors beside it in another."""

    def __init__(self, base: torch.dtype, output: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.base = nn.Linear(64, 12, dtype=base).requires_grad_(False)
        self.a, self.b = nn.Linear(64, 2, bias=False), nn.Linear(2, 12, bias=False)
        self.output = nn.Linear(12, 10, dtype=output)

    def forward(self, x: Tensor) -> Tensor:
        h = self.base(x.to(self.base.weight.dtype)).float() + self.b(self.a(x))
        return self.output(torch.tanh(h).to(self.output.weight.dtype))


@pytest.mark.parametrize("base", [torch.bfloat16, torch.float64, torch.float16])
@pytest.mark.parametrize("output", [torch.float32, torch.float64])
def test_parameters_of_several_dtypes(base: torch.dtype, output: torch.dtype) -> None:
    module, x = LowRank(base, output), torch.as_tensor(X[:9])
    found = fisher_diagonal(module, [x])
    assert [*found] == ["a.weight", "b.weight", "output.weight", "output.bias"]
    g, p = oracles.scores(module, x)
    flat = torch.cat([d.flatten() for d in found.values()])
    tolerance = 2e-2 if base is torch.bfloat16 else 5e-3 if base is torch.float16 else 1e-5
    expected = oracles.diagonal(g, p)[oracles.columns(module, oracles.trainable(module))]
    torch.testing.assert_close(flat, expected, rtol=tolerance, atol=tolerance * 1e-2)
    net = net_of(LowRank(base, output)).fit(X[:60], Y[:60])
    sampler = FisherMaskSampler(**SOME | {"mask": "global", "mask_fraction": "auto"})
    sampler(net, X[60:160], 5)
    assert [*sampler.mask_.shapes] == [*found]


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.turn = nn.Parameter(torch.randn(64, dtype=torch.complex64))
        self.output = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.output((x * self.turn).real)


def test_complex_parameters_are_refused_unless_they_are_frozen() -> None:
    net = net_of(Complex())
    with pytest.raises(ValueError, match=r"real numbers, found 'turn' of torch.complex64"):
        picks(net)
    net.module_.turn.requires_grad_(False)
    assert len(set(picks(net)[0].tolist())) == 8


def test_where_all_parameters_are_frozen_all_are_read() -> None:
    frozen = net_of(Prepared())
    frozen.module_.requires_grad_(False)
    assert_same(picks(frozen), plain())
    assert not any(p.requires_grad for p in frozen.module_.parameters())


class Rooted(Prepared):
    """Finite outputs with gradients that are NaN where the first pixel is 7: a root of zero."""

    def forward(self, x: Tensor) -> Tensor:
        z = self.mlp[0](x) * torch.where(x[:, :1] == 7, 0.0, 1.0)
        length = z.square().sum(1, keepdim=True).sqrt()
        return self.mlp[2](torch.relu(z) + length)


class Attending(nn.Module):
    """Attention, of which all positions are masked where the first pixel is 7."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.output = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        h, masked = x.view(-1, 8, 8), (x[:, :1] == 7).expand(-1, 8)
        h, _ = self.attention(h, h, h, key_padding_mask=masked)
        return self.output(torch.nan_to_num(h).mean(1))


class Divided(Prepared):
    """The same of a quotient, in a branch that is not taken."""

    def forward(self, x: Tensor) -> Tensor:
        size = self.mlp[0](x).sum(1, keepdim=True) * (x[:, :1] != 7)
        return super().forward(x) + torch.where(size == 0, 0.0, 1e-9 / size)


@pytest.mark.parametrize(
    ("asked", "module"),
    each_with_one(product(["all", "global"], [None, 95]), [Rooted, Attending, Divided]),
)
def test_gradients_that_are_not_finite_are_told_by_row(asked: Any, module: Any) -> None:
    pool = X[60:160].copy()
    pool[83, 0] = 7
    mask, max_candidates = asked
    options = {"mask": mask, "n_mask_samples": None, "max_candidates": max_candidates}
    with pytest.raises(ValueError, match="gradients are NaN or infinite for row 83 of X_pool"):
        picks(net_of(module()), pool, **options)


@pytest.mark.parametrize("argument", ["X_labeled", "X_target"])
def test_gradients_of_other_samples_that_are_not_finite(argument: str) -> None:
    odd = X[:60].copy()
    odd[5, 0] = 7
    with pytest.raises(ValueError, match=f"infinite for row 5 of {argument}"):
        FisherMaskSampler(**SOME)(net_of(Rooted()), X[60:160], 8, **{argument: odd})


@pytest.mark.parametrize(
    "make",
    [
        lambda more: net_of(Prepared(), **more),
        lambda more: nets.fitted(nets.binary_net(**more)),
        lambda more: nets.fitted(nets.probabilities_net(**more)),
    ],
    ids=["logits", "one logit", "probabilities"],
)
def test_outputs_without_a_nonlinearity(make: Callable[[dict[str, Any]], Any]) -> None:
    assert_same(picks(make({"predict_nonlinearity": None})), picks(make({})))


class Squeezed(Prepared):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).squeeze()


class Summed(Prepared):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).sum(1).squeeze()


class OverTheBatch(Prepared):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).mean(0)


@pytest.mark.parametrize(
    ("module", "shape"), [(Squeezed, "10,"), (Summed, ""), (OverTheBatch, "10,")]
)
def test_a_squeeze_of_one_sample(module: Any, shape: str) -> None:
    words = rf"found \({shape}\). One sample was tried .* squeeze\(-1\)"
    with pytest.raises(ValueError, match=words):
        picks(net_of(module()))


def test_a_softmax_before_cross_entropy_is_told() -> None:
    net = net_of(nn.Sequential(Prepared(), nn.Softmax(1)))
    with pytest.warns(UserWarning, match="CrossEntropyLoss applies a softmax"):
        picks(net)


LOGITS, LOGARITHMS = (
    NeuralNetClassifier(module, **nets.options())  # with NLLLoss
    for module in (nets.mlp(), nets.mlp(10, nn.LogSoftmax(1)))
)
UNFIT = {
    "probabilities for logits": (
        nets.probabilities_net(criterion=nn.CrossEntropyLoss),
        "CrossEntropyLoss applies a softmax",
    ),
    "logits for probabilities": (LOGITS, "are no probabilities"),
    "their logarithms": (LOGARITHMS, "are no probabilities"),
}
FITS: dict[str, Callable[[Any], Any]] = {
    "sampler": lambda net: FisherMaskSampler(net).fit(X[:100], Y[:100]),
    "Dataset": lambda net: FisherMaskSampler(net).fit(
        TensorDataset(torch.tensor(X[:100])), Y[:100]
    ),
    "learner": lambda net: ActiveLearner(net, X_training=X[:100], y_training=Y[:100]),
    "pipeline": lambda net: ActiveLearner(make_pipeline(FunctionTransformer(), net)).fit(
        X[:100], Y[:100]
    ),
}


@pytest.mark.parametrize(("net", "words"), UNFIT.values(), ids=UNFIT)
@pytest.mark.parametrize("fit", FITS.values(), ids=FITS)
def test_a_criterion_for_other_outputs_is_told_by_fit(fit: Any, net: Any, words: str) -> None:
    with pytest.warns(UserWarning, match=words):
        fit(clone(net))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("make", [nets.logits_net, nets.probabilities_net])
def test_fit_draws_nothing_to_look_at_outputs(make: Any) -> None:
    make().fit(X[:100], Y[:100])
    after = torch.get_rng_state()
    ActiveLearner(make(), X_training=X[:100], y_training=Y[:100])
    assert torch.equal(after, torch.get_rng_state())


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.output = nn.Linear(64, 10)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.output(torch.cat([left, right], 1))


def turned(inputs: dict[str, Any]) -> dict[str, Any]:
    return dict(reversed(inputs.items()))


@pytest.mark.parametrize("share", ["auto", 1.0, 0.5])
def test_inputs_by_name_may_come_in_any_order(share: Any) -> None:
    net, sampler = net_of(TwoInputs), FisherMaskSampler(**SOME | {"coverage_share": share})
    pool, labeled, target = (
        {"left": X[rows, :9], "right": X[rows, 9:]}
        for rows in (slice(60, 160), slice(20), slice(20, 50))
    )
    expected = sampler(net, pool, 8, X_labeled=labeled)
    assert_same(sampler(net, pool, 8, X_labeled=turned(labeled)), expected)
    assert_same(sampler(net, turned(pool), 8, X_labeled=labeled), expected)
    expected = sampler(net, pool, 8, X_target=target)
    assert_same(sampler(net, pool, 8, X_target=turned(target)), expected)


def test_columns_may_come_in_any_order() -> None:
    class Columns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.output = nn.Linear(64, 10)

        def forward(self, **columns: Tensor) -> Tensor:
            return self.output(torch.cat([columns[f"c{i}"] for i in range(64)], 1))

    frame = pd.DataFrame(X[:160], columns=[f"c{i}" for i in range(64)])
    net = net_of(Columns)
    expected = picks(net, frame[60:], frame[:20], coverage_share=0.5)
    turned = frame[:20][frame.columns[::-1]]
    assert_same(picks(net, frame[60:], turned, coverage_share=0.5), expected)
