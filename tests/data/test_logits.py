"""A query reads what the net's own `infer` computes, with all modules that it uses."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Callable
from functools import cache
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV
from sklearn.utils._param_validation import InvalidParameterError
from skorch import NeuralNetBinaryClassifier, NeuralNetClassifier
from torch import Tensor, nn

from skfishermask import FisherMaskSampler, fisher_mask_sampling
from skfishermask.data.net import NetModule
from tests import nets
from tests.nets import SMALL

X, Y = nets.digits()
X_LABELED, Y_LABELED, X_POOL = X[:60], Y[:60], X[60:200]
# Layers of this module are those of `nets.mlp`, in two parts.
WEIGHTS = nets.fitted(nets.logits_net()).module_.state_dict()


def whole(scale: float = 1.0) -> nn.Sequential:
    module = nets.mlp()
    module.load_state_dict(WEIGHTS)
    return module if scale == 1 else nn.Sequential(Scaled(scale), *module)


class Scaled(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return x / self.scale


def net_of(
    module: Any, kind: type[NeuralNetClassifier] = NeuralNetClassifier, **more: Any
) -> NeuralNetClassifier:
    return kind(module, **nets.options(criterion=nn.CrossEntropyLoss) | more).initialize()


def picks(net: Any, pool: Any = X_POOL, **more: Any) -> Any:
    labeled = more.pop("X_labeled", X_LABELED)
    sampler = FisherMaskSampler(**SMALL | more)
    indices, gains = sampler(net, pool, 8, X_labeled=labeled)
    return indices.tolist(), gains, sampler


@cache
def plain() -> Any:
    """What is chosen by the network, in a net as simple as can be."""
    return picks(net_of(whole()))


def assert_same(found: Any, expected: Any) -> None:
    assert found[0] == expected[0]
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-4)


class Bytes(NeuralNetClassifier):
    """Takes pixels from 0 to 255."""

    def infer(self, x: Any, **fit_params: Any) -> Any:
        return super().infer(x / 255, **fit_params)


class Headed(NeuralNetClassifier):
    """An encoder, and a head of its own."""

    def initialize_module(self) -> Headed:
        super().initialize_module()
        self.head_ = nn.Linear(12, 10)
        return self

    def infer(self, x: Any, **fit_params: Any) -> Any:
        return self.head_(super().infer(x, **fit_params))


def headed(kind: type[Headed] = Headed, **more: Any) -> Headed:
    module = whole()
    net = net_of(nn.Sequential(*list(module)[:2]), kind, **more)
    net.head_.load_state_dict(module[2].state_dict())
    return net


def test_infer_that_scales_its_input() -> None:
    expected = picks(net_of(whole(255.0)), X_POOL * 255, X_labeled=X_LABELED * 255)
    found = picks(net_of(whole(), Bytes), X_POOL * 255, X_labeled=X_LABELED * 255)
    assert_same(found, expected)
    assert set(found[2].mask_.indices) <= set(dict(whole().named_parameters()))


def test_a_head_that_is_a_module_of_its_own() -> None:
    expected, found = plain(), picks(headed())
    assert_same(found, expected)
    names = {"module_.0.weight": "0.weight", "module_.0.bias": "0.bias"}
    names |= {"head_.weight": "2.weight", "head_.bias": "2.bias"}
    of_both = found[2].mask_.indices
    assert {"module_.0.weight", "head_.weight"} <= set(of_both) <= set(names)
    for name, index in of_both.items():
        assert index.tolist() == expected[2].mask_.indices[names[name]].tolist()


class Apart(Headed):
    """Its own `infer` is skorch's: what else the net has is not read."""

    infer = NeuralNetClassifier.infer


def test_modules_that_infer_does_not_use() -> None:
    net = net_of(whole(), Apart)
    assert_same(picks(net), plain())
    assert [name for name, _ in NetModule(net).named_parameters()] == list(WEIGHTS)


class Margin(nn.CrossEntropyLoss):
    """A loss that holds the classes' weights."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(12, 10)
        self.head.weight.data.copy_(WEIGHTS["2.weight"])
        self.head.bias.data.copy_(WEIGHTS["2.bias"])


class WithMargin(NeuralNetClassifier):
    def infer(self, x: Any, **fit_params: Any) -> Any:
        return self.criterion_.head(super().infer(x, **fit_params))


class Centred(NeuralNetClassifier):
    """Has the same loss, and does not need its weights to predict."""

    def infer(self, x: Any, **fit_params: Any) -> Any:
        return super().infer(x, **fit_params)


def test_weights_in_the_criterion_count_where_infer_uses_them() -> None:
    net = net_of(nn.Sequential(*list(whole())[:2]), WithMargin, criterion=Margin)
    found = picks(net)
    assert_same(found, plain())
    assert "criterion_.head.weight" in found[2].mask_.indices
    apart = picks(net_of(whole(), Centred, criterion=Margin))
    assert_same(apart, plain())
    assert "0.weight" in apart[2].mask_.indices


class Autocast(NeuralNetClassifier):
    def infer(self, x: Any, **fit_params: Any) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().infer(x, **fit_params).float()


def test_autocast_inside_infer() -> None:
    chosen, gains, _ = picks(net_of(whole(), Autocast))
    expected = plain()
    assert len(set(chosen) & set(expected[0])) >= 5
    assert gains.sum() == pytest.approx(expected[1].sum(), rel=0.05)


class ModelOutput(OrderedDict):
    """As in transformers: a dict with entries that are attributes too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class HuggingFace(nn.Module):
    def __init__(self, key: str = "logits", n_outputs: int = 10) -> None:
        super().__init__()
        self.mlp, self.key = whole(), key
        if n_outputs == 1:
            self.mlp[2] = nn.Linear(12, 1)

    def forward(self, x: Tensor) -> ModelOutput:
        # Where labels are given, the loss comes first.
        return ModelOutput(loss=x.mean(), **{self.key: self.mlp(x)})


@pytest.mark.parametrize("criterion", [nn.CrossEntropyLoss, nn.NLLLoss])
def test_outputs_with_logits(criterion: Any) -> None:
    # Such models have a loss of their own, so skorch's default is often left as it is.
    found = picks(net_of(HuggingFace(), criterion=criterion))
    assert_same(found, plain())


class BinaryHuggingFace(NeuralNetBinaryClassifier):
    # skorch's own takes tensors and tuples only.
    infer = NeuralNetClassifier.infer


@pytest.mark.parametrize("criterion", [nn.BCEWithLogitsLoss, nn.BCELoss])
def test_outputs_with_one_logit(criterion: Any) -> None:
    module = HuggingFace(n_outputs=1)
    net = net_of(module, BinaryHuggingFace, criterion=criterion)
    plain = net_of(module.mlp, NeuralNetBinaryClassifier, criterion=nn.BCEWithLogitsLoss)
    assert_same(picks(net), picks(plain))


def scores_of(output: Any) -> Tensor:
    return output["scores"]


@pytest.mark.parametrize("criterion", [nn.CrossEntropyLoss, nn.NLLLoss, nn.MultiMarginLoss])
def test_to_logits(criterion: Any) -> None:
    net = net_of(HuggingFace("scores"), criterion=criterion)
    assert_same(picks(net, to_logits=scores_of), plain())
    with pytest.raises(ValueError, match=r"found ModelOutput\. to_logits"):
        picks(net)


def test_to_logits_goes_before_all_rules() -> None:
    halved = net_of(whole(), predict_nonlinearity=lambda z: (3 * z).softmax(1))
    assert_same(picks(halved, to_logits=lambda z: z), plain())


def test_to_logits_in_every_form_of_the_sampler() -> None:
    expected, _, _ = plain()
    net = net_of(HuggingFace("scores"))
    by_function, _ = fisher_mask_sampling(
        net, X_POOL, 8, X_labeled=X_LABELED, to_logits=scores_of, **SMALL
    )
    assert by_function.tolist() == expected
    sampler = FisherMaskSampler(to_logits=scores_of, **SMALL)
    for copy in (
        clone(sampler),
        pickle.loads(pickle.dumps(sampler)),
        cloudpickle.loads(cloudpickle.dumps(sampler)),
        FisherMaskSampler(**SMALL).set_params(to_logits=scores_of),
    ):
        assert copy.get_params()["to_logits"] is scores_of
        assert copy(net, X_POOL, 8, X_labeled=X_LABELED)[0].tolist() == expected


def test_to_logits_in_a_grid_search() -> None:
    grid = {"to_logits": [None, scores_of], "estimator__lr": [0.1]}
    search = GridSearchCV(FisherMaskSampler(nets.logits_net(max_epochs=1)), grid, cv=2)
    search.fit(X_LABELED, Y_LABELED % 2)
    assert search.cv_results_["param_to_logits"].tolist() == [None, scores_of]


def test_to_logits_is_something_to_call() -> None:
    with pytest.raises(InvalidParameterError, match="'to_logits'"):
        picks(net_of(whole()), to_logits="logits")


def test_to_logits_gives_what_are_no_logits() -> None:
    with pytest.raises(ValueError, match=r"logits of shape \(1, C\)"):
        picks(net_of(whole()), to_logits=lambda z: z[:, 0])


class Sampled(NeuralNetClassifier):
    """Predicts with something on top."""

    def evaluation_step(self, batch: Any, training: bool = False) -> Any:
        return 2 * super().evaluation_step(batch, training)


class Watched(NeuralNetClassifier):
    """Predicts as any other, and counts."""

    n_steps = 0

    def evaluation_step(self, batch: Any, training: bool = False) -> Any:
        type(self).n_steps += 1
        return super().evaluation_step(batch, training)


class Picking(NeuralNetClassifier):
    """Of what `infer` gives, predictions are one entry."""

    def evaluation_step(self, batch: Any, training: bool = False) -> Any:
        return super().evaluation_step(batch, training)[self.module_.key]


def test_an_evaluation_step_that_says_otherwise() -> None:
    net = net_of(whole(), Sampled)
    net.module_.train()
    with pytest.raises(ValueError, match=r"output 0, it reads .* belongs in infer"):
        picks(net)
    assert net.module_.training
    assert net.criterion_.training
    # What both give is not looked at: they may agree in the logits.
    net = net_of(nn.Sequential(whole(), nn.Softmax(1)), Sampled, criterion=nn.NLLLoss)
    with pytest.raises(ValueError, match="evaluation_step"):
        picks(net)


@pytest.mark.parametrize("data", [X_POOL, {"input": X_POOL}], ids=["array", "dict"])
def test_an_evaluation_step_that_says_the_same(data: Any) -> None:
    Watched.n_steps = 0
    assert_same(picks(net_of(whole(), Watched), data), plain())
    assert Watched.n_steps == 2  # pool and labelled samples


def test_an_evaluation_step_that_picks_an_entry() -> None:
    expected = plain()
    assert_same(picks(net_of(HuggingFace(), Picking)), expected)
    assert_same(picks(net_of(HuggingFace("scores"), Picking), to_logits=scores_of), expected)


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = whole()

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.mlp(torch.cat([left, right], 1))


class Renamed(NeuralNetClassifier):
    """Has other names for its inputs."""

    def infer(self, x: Any, **fit_params: Any) -> Any:
        return super().infer({"left": x["x"], "right": x["inputs"]}, **fit_params)


@pytest.mark.parametrize(
    ("kind", "names"), [(NeuralNetClassifier, ("left", "right")), (Renamed, ("x", "inputs"))]
)
def test_dicts_reach_infer_as_dicts(kind: Any, names: tuple[str, str]) -> None:
    pool, labeled = (
        dict(zip(names, (data[:, :32], data[:, 32:]), strict=True)) for data in (X_POOL, X_LABELED)
    )
    found = picks(net_of(Keywords(), kind), pool, X_labeled=labeled)
    assert_same(found, plain())


class Loose(nn.Module):
    """Holds a parameter for which there is no rule, at the root."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 2, 64).repeat(2, 1))
        self.mlp = whole()

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x * self.scale[0])


NETS: dict[str, Callable[[], NeuralNetClassifier]] = {
    "one layer": lambda: net_of(nn.Linear(64, 10)),
    "layers": lambda: net_of(whole()),
    "a loose parameter": lambda: net_of(Loose()),
    "compiled": lambda: net_of(whole(), compile=True, compile__backend="eager"),
    "two names": lambda: net_of(nn.Sequential(nn.Linear(64, 64), *(nn.Linear(64, 64),) * 2)),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name == "compiled" else ()) for name in NETS],
)
def test_names_are_those_of_the_module(name: str) -> None:
    net = NETS[name]()
    before = set(vars(net))
    module = NetModule(net)
    expected = dict(net.module_.named_parameters())
    assert list(dict(module.named_parameters())) == list(expected)
    assert all(p is expected[name] for name, p in module.named_parameters())
    assert list(map(id, module.parameters())) == list(map(id, expected.values()))
    assert [name for name, _ in module.named_buffers()] == [
        name for name, _ in net.module_.named_buffers()
    ]
    x = torch.as_tensor(X[:3])
    assert torch.equal(module(x), net.module_(x))
    module.eval()
    assert not net.module_.training
    assert set(vars(net)) == before


@pytest.mark.parametrize("make", list(NETS.values())[:4], ids=list(NETS)[:4])
def test_all_parameters_are_read_through_the_net(make: Any) -> None:
    """By rules, and by what stands in for them."""
    from skfishermask.fisher import fisher_diagonal

    net = make()
    batches = [torch.as_tensor(X[:9])]
    expected = fisher_diagonal(getattr(net.module_, "_orig_mod", net.module_), batches)
    found = fisher_diagonal(NetModule(net), batches)
    for (name, a), (_, b) in zip(found.items(), expected.items(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_names_of_several_modules() -> None:
    names = [name for name, _ in NetModule(headed()).named_parameters()]
    assert names == ["module_.0.weight", "module_.0.bias", "head_.weight", "head_.bias"]


@pytest.mark.parametrize("share", [np.float32(0.8), np.float64(0.8)])
def test_a_share_of_numpys(share: Any) -> None:
    expected = picks(net_of(whole()), n_directions=0.8)
    found = picks(net_of(whole()), n_directions=share)
    assert_same(found, expected)
    assert 1 < found[2].query_info_["n_directions"] < 9
