"""The steps of a query, against the dense method and by its metrics."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from skorch import NeuralNetClassifier
from torch import Tensor, nn

from skfishermask import FisherMaskSampler, fisher_embedding, select_batch
from skfishermask import query as steps
from skfishermask.fisher import fisher_matrix
from skfishermask.jacobian import reader
from tests import nets, oracles
from tests.nets import SMALL

X, Y = nets.digits()
X_LABELED, Y_LABELED, X_POOL = X[:60], Y[:60], X[60:160]


@cache
def double_net() -> tuple[Any, Tensor, Tensor]:
    """Return a net in float64, and the oracle's scores and class probabilities of X[:190]."""
    net = nets.fitted(nets.logits_net())
    net.module_.double()
    return net, *oracles.scores(net.module_, torch.as_tensor(X[:190]))


def oracle_query(
    k: int, n_instances: int, n_labeled: int, **options: Any
) -> tuple[list[int], list[float]]:
    """The whole method, slowly: scores of every sample, dense matrices, float64."""
    target, oversample = options.get("target", "pool"), options.get("oversample", 1.0)
    use_labeled, n_samples = options.get("use_labeled", True), n_labeled + len(X_POOL)
    net, g, p = double_net()
    rows = slice(60 - n_labeled, 190 if "X_target" in options else 160)
    g, p = g[rows], p[rows]
    diagonal = oracles.diagonal(g[:n_samples], p[:n_samples])
    n_output = sum(t.numel() for t in list(net.module_.parameters())[-2:])
    best = diagonal[:-n_output].argsort(descending=True, stable=True)[: k - n_output]
    kept = torch.cat([best.sort().values, torch.arange(len(diagonal) - n_output, len(diagonal))])
    V = p.sqrt()[:, :, None] * g[:, :, kept]
    V, V_target = V[:n_samples], V[n_samples:]
    fisher = (V.mT @ V).mean(0) if target == "pool" else torch.eye(k).double()
    if len(V_target):
        fisher = (V_target.mT @ V_target).mean(0)
    labeled = {}
    if n_labeled and use_labeled:
        labeled = {"fisher_labeled": (V[:n_labeled].mT @ V[:n_labeled]).mean(0)}
        labeled["n_labeled"] = n_labeled
    return oracles.select_batch_oracle(
        V[n_labeled:],
        n_instances,
        fisher,
        regularization=options.get("regularization", 1.0),
        oversample=oversample,
        **labeled,
    )


OPTIONS = [
    {},
    {"target": "identity"},
    {"use_labeled": False},
    {"regularization": 0.01},
    {"oversample": 2.0},
    {"X_target": X[160:190]},
    {"X_target": X[160:190], "target": "identity", "use_labeled": False},
]


@pytest.mark.parametrize(
    ("options", "labeled"),
    [
        pytest.param(
            options,
            labeled,
            id=f"{' '.join(options) or 'plain'} {labeled}",
            # With labelled samples all of them, without every other one.
            marks=() if labeled or i % 2 == 0 else pytest.mark.slow,
        )
        for i, options in enumerate(OPTIONS)
        for labeled in (True, False)
    ],
)
def test_a_query_chooses_what_the_dense_oracle_chooses(options: dict, labeled: bool) -> None:
    # float64 from end to end, so that the choice is comparable pick by pick.
    net, *_ = double_net()
    X_labeled = X_LABELED if labeled else None
    given = {name: value for name, value in options.items() if name != "X_target"}
    sampler = FisherMaskSampler(**SMALL, **given)
    X_target = options.get("X_target")
    pool, labels, aims = (
        None if A is None else A.astype("float64") for A in (X_POOL, X_labeled, X_target)
    )
    indices, gains = sampler(net, pool, 12, X_labeled=labels, X_target=aims)
    expected, expected_gains = oracle_query(160, 12, 60 if labeled else 0, **options)
    assert len(sampler.mask_) == 160
    if options.get("oversample"):
        assert set(indices) == set(expected)
    else:
        assert indices.tolist() == expected
        # The embedding is stored in float32.
        np.testing.assert_allclose(gains, expected_gains, rtol=1e-4)


def test_the_choice_does_not_depend_on_the_batch_size(net: Any) -> None:
    chosen = [
        FisherMaskSampler(batch_size=size, **SMALL)(net, X_POOL[:30], 5, X_labeled=X[:10])[0]
        for size in (None, 1, 7, 1000)
    ]
    for other in chosen[1:]:
        assert other.tolist() == chosen[0].tolist()


def test_the_choice_does_not_depend_on_the_order_of_the_pool(net: Any) -> None:
    order = np.random.default_rng(1).permutation(len(X_POOL))
    chosen, _ = FisherMaskSampler(**SMALL)(net, X_POOL, 10, X_labeled=X_LABELED)
    permuted, _ = FisherMaskSampler(**SMALL)(net, X_POOL[order], 10, X_labeled=X_LABELED)
    assert order[permuted].tolist() == chosen.tolist()


def test_random_state(net: Any) -> None:
    options = {"mask": "random", "max_candidates": 50, "n_mask_samples": 40, "mask_fraction": 160}
    a, b, c = (
        FisherMaskSampler(random_state=seed, **options)(net, X_POOL, 10)[0] for seed in (0, 0, 1)
    )
    assert a.tolist() == b.tolist()
    assert a.tolist() != c.tolist()
    sampler = FisherMaskSampler(random_state=np.random.RandomState(0), **options)
    assert sampler(net, X_POOL, 10)[0].tolist() == a.tolist()
    assert sampler(net, X_POOL, 10)[0].tolist() != a.tolist()


@pytest.mark.parametrize(
    ("mask", "k"),
    [("global", 160), ("per_layer", 160), ("random", 160), ("output_layer", 130), ("all", 910)],
)
def test_masks(net: Any, mask: str, k: int) -> None:
    sampler = FisherMaskSampler(mask=mask, **SMALL)
    indices, _ = sampler(net, X_POOL, 5)
    assert len(set(indices.tolist())) == 5
    assert len(sampler.mask_) == k
    assert (sampler.fisher_diagonal_ is None) == (mask in ("random", "output_layer", "all"))


def test_relative_mask(net: Any) -> None:
    sampler = FisherMaskSampler(mask="relative", **(SMALL | {"mask_fraction": 1.0}))
    sampler(net, X_POOL, 5)
    assert 130 < len(sampler.mask_) <= 130 + 20 + 1


def test_what_a_query_tells(net: Any) -> None:
    sampler = FisherMaskSampler(**SMALL | {"embedding_dtype": "bfloat16", "n_directions": 4})
    sampler(net, X_POOL, 5, X_labeled=X_LABELED)
    info = sampler.query_info_
    assert info.pop("seconds").keys() == {
        "diagonal",
        "embedding",
        "fisher",
        "selection",
        "total",
    }
    assert info == {
        "n_candidates": 100,
        "n_labeled": 60,
        "n_directions": 4,
        "mask_size": 160,
        "embedding_bytes": 100 * 4 * 160 * 2,
        "embedding_storage": "memory",
        "dimensions": 160,
        "objective": info["objective"],
        "candidates_read": info["candidates_read"],
        "coverage_share": 0,
        "coverage_inputs": None,
    }
    before, after = info["objective"]
    assert before > after > 0
    # Every pick but the last is passed on to all, at most once each.
    assert info["candidates_read"] in range(100, 4 * 100 + 1)


@pytest.mark.parametrize("options", [{}, {"target": "identity"}, {"oversample": 2.0}], ids=str)
@pytest.mark.parametrize("n_pool", [8, 100])
def test_the_objective_falls_by_the_gains(net: Any, n_pool: int, options: dict[str, Any]) -> None:
    # In as many dimensions as pool and labelled samples have rows, or in all.
    sampler = FisherMaskSampler(**SMALL | {"mask_fraction": 700} | options)
    _, gains = sampler(net, X_POOL[:n_pool], 4, X_labeled=X_LABELED)
    info = sampler.query_info_
    assert info["dimensions"] == min(700, (n_pool + 60) * 9)
    before, after = info["objective"]
    if "oversample" not in options:
        assert before - after == pytest.approx(gains.sum(), rel=1e-9)


def test_few_rows_with_target_samples_choose_as_in_all_dimensions(net: Any) -> None:
    X_pool, X_target = X_POOL[:8], X[300:306]
    sampler = FisherMaskSampler(**SMALL | {"mask_fraction": 700})
    indices, gains = sampler(net, X_pool, 4, X_labeled=X[:5], X_target=X_target)
    assert sampler.query_info_["dimensions"] == (8 + 5 + 6) * 9

    def embedded(samples: np.ndarray) -> Tensor:
        return fisher_embedding(net.module_, [torch.as_tensor(samples)], sampler.mask_).double()

    fisher, labeled = fisher_matrix(embedded(X_target)), fisher_matrix(embedded(X[:5]))
    expected = select_batch(embedded(X_pool), 4, fisher, fisher_labeled=labeled, n_labeled=5)
    assert indices.tolist() == expected[0].tolist()
    np.testing.assert_allclose(gains, expected[1], rtol=1e-5)
    M = torch.eye(700).double() + 5 / 9 * labeled
    before, after = sampler.query_info_["objective"]
    assert before == pytest.approx(float(torch.linalg.solve(M, fisher).trace()), rel=1e-5)
    assert after == pytest.approx(before - gains.sum(), rel=1e-9)


def test_target_samples_that_are_none(net: Any) -> None:
    sampler = FisherMaskSampler(**SMALL)
    with pytest.raises(ValueError, match="Expected X_target with at least one sample"):
        sampler(net, X_POOL, 3, X_target=X[:0])
    with pytest.raises(ValueError, match=r"but the target samples have shape \(5,\)"):
        sampler(net, X_POOL, 3, X_target=X[:3, :5])
    with pytest.raises(ValueError, match="X_target contains NaN or infinity, first in row 2"):
        sampler(net, X_POOL, 3, X_target=np.where(np.arange(4)[:, None] == 2, np.nan, X[:4]))


def test_share_of_the_trace(net: Any) -> None:
    sampler = FisherMaskSampler(**SMALL | {"n_directions": 0.8})
    sampler(net, X_POOL, 5)
    assert 1 < sampler.query_info_["n_directions"] < 9


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_keeps_most_of_the_choice(net: Any, dtype: str) -> None:
    exact, gains = FisherMaskSampler(**SMALL)(net, X_POOL, 20)
    half, half_gains = FisherMaskSampler(embedding_dtype=dtype, **SMALL)(net, X_POOL, 20)
    assert len(set(exact) & set(half)) >= 15
    assert half_gains.sum() == pytest.approx(gains.sum(), rel=0.01)


def test_max_candidates(net: Any) -> None:
    sampler = FisherMaskSampler(**SMALL | {"max_candidates": 30})
    indices, _ = sampler(net, X_POOL, 30)
    assert sampler.query_info_["n_candidates"] == 30
    assert len(set(indices.tolist())) == 30
    assert indices.max() > 30  # A random subset, not the first rows.


def test_a_net_that_is_fitted_again_is_read_afresh() -> None:
    net = nets.fitted(nets.logits_net())
    sampler = FisherMaskSampler(**SMALL)
    first, _ = sampler(net, X_POOL, 10)
    torch.manual_seed(5)
    net.set_params(module=nets.mlp()).fit(X[300:400], Y[300:400])
    second, _ = sampler(net, X_POOL, 10)
    assert first.tolist() != second.tolist()


@pytest.mark.parametrize(
    "options",
    [{}, {"mask": "output_layer"}, {"n_mask_samples": 30, "max_candidates": 80}],
    ids=lambda options: " ".join(options) or "plain",
)
@pytest.mark.parametrize("where", ["X_pool", "X_labeled"])
def test_a_network_output_that_is_not_finite_names_the_row(options: dict, where: str) -> None:
    class Sick(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = nets.mlp()

        def forward(self, x: Tensor) -> Tensor:
            return self.mlp(x) / (x[:, :1] != 7)

    net = NeuralNetClassifier(
        Sick, criterion=nn.CrossEntropyLoss, **nets.options(batch_size=128)
    ).initialize()
    data = {"X_pool": X_POOL.copy(), "X_labeled": X_LABELED.copy()}
    data[where][41:, 0] = 7  # Enough of them that a drawn subset holds some.
    with pytest.raises(ValueError, match=rf"NaN or infinite for row \d+ of {where}") as caught:
        FisherMaskSampler(**SMALL | options)(net, data["X_pool"], 3, X_labeled=data["X_labeled"])
    row = int(str(caught.value).split("row ")[1].split(" ")[0])
    assert data[where][row, 0] == 7
    if "max_candidates" not in options:
        assert row == 41


@pytest.mark.cuda
def test_cpu_and_cuda_choose_the_same() -> None:
    chosen = []
    for device in ("cpu", "cuda"):
        net = nets.fitted(nets.logits_net())
        net.device = device
        net.module_.to(device)
        indices, _ = FisherMaskSampler(**SMALL)(net, X_POOL, 10, X_labeled=X_LABELED)
        chosen.append(indices.tolist())
    assert chosen[0] == chosen[1]


class Square(torch.autograd.Function):
    """Written in Python, so that the graph does not show what it does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * gradient


class Counting(nn.Module):
    """Counts the samples that pass forward."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 8), nn.Linear(8, 10)
        self.unused = nn.Linear(2, 2) if how == "unused parameters" else None
        self.how, self.n_forward = how, 0

    def forward(self, x: Tensor) -> Tensor:
        self.n_forward += len(x)
        h = torch.tanh(self.first(x))
        return self.last(Square.apply(h) if self.how == "function in Python" else h)


# Samples forward and backward. Each of three sets of samples is compared with predict_proba:
# 3 x 2 x 16. What the graph hides is looked for with 4, once.
COSTS = {"plain": (96, 0), "unused parameters": (100, 4), "function in Python": (100, 8)}


@pytest.mark.parametrize(("how", "costs"), COSTS.items(), ids=COSTS)
def test_both_checks_together_cost_less_than_a_batch(
    how: str, costs: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Samples that pass forward and backward, beside a query without the checks."""
    torch.manual_seed(0)
    net = nets.fitted(
        NeuralNetClassifier(
            Counting(how), criterion=nn.CrossEntropyLoss, **nets.options(batch_size=128)
        )
    )
    n_backward = 0

    def count(name: str) -> None:
        run = getattr(torch.autograd, name)

        def counting(outputs: Any, *arguments: Any, **options: Any) -> Any:
            nonlocal n_backward
            n_backward += len(outputs[0] if isinstance(outputs, tuple) else outputs)
            return run(outputs, *arguments, **options)

        monkeypatch.setattr(torch.autograd, name, counting)

    count("grad")
    count("backward")
    counts = []
    for checks in (False, True):
        with monkeypatch.context() as patched:
            if not checks:
                patched.setattr(steps, "check_as_predicted", lambda net, source: None)
                patched.setattr(reader, "hides_gradients", lambda *args: False)
            own = copy.deepcopy(net)  # of which nothing is known
            own.module_.n_forward = n_backward = 0
            sampler = FisherMaskSampler(mask_fraction=60, coverage_share=0, random_state=0)
            sampler(own, X[100:600], 5, X_labeled=X[:100], X_target=X[600:700])
        counts.append((own.module_.n_forward, n_backward))
    assert tuple(np.subtract(counts[1], counts[0])) == costs
    assert max(costs) <= net.batch_size


def test_what_is_found_out_about_a_graph_serves_this_query_and_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    probe, lengths = reader.probe_layouts, []

    def counting(outputs: Tensor, *arguments: Any) -> Any:
        lengths.append(len(outputs))
        return probe(outputs, *arguments)

    monkeypatch.setattr(reader, "probe_layouts", counting)
    net = nets.fitted(nets.logits_net())
    state = set(vars(net.module_))
    batches = []
    for expected in ([4], []):
        lengths.clear()
        sampler = FisherMaskSampler(**SMALL)
        batches.append(sampler(net, X[100:200], 5, X_labeled=X[:60], X_target=X[600:650])[0])
        assert lengths == expected
    np.testing.assert_array_equal(*batches)
    assert set(vars(net.module_)) == state
    net.module_[1] = nn.Tanh()
    FisherMaskSampler(**SMALL)(net, X[100:200], 5, X_labeled=X[:60])
    assert lengths == [4]
