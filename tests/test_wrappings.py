"""Any wrapping of a net, composed at random: the batch is the oracle's, or the query is refused.

The oracle knows nothing of wrappings: it differentiates the net's own ``predict_proba`` by
differences, parameter by parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from skorch import NeuralNetClassifier
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

from skfishermask import PUBLISHED, FisherMaskSampler
from tests import oracles

N_LABELED, N_POOL, N_PICKS = 6, 24, 4
# What each part of a net may be; the first is plain, and is drawn as often as all others together.
CHOICES: dict[str, tuple[str, ...]] = {
    "module": ("plain", "lora", "reused", "tied", "weight norm", "batch norm", "dropout", "table"),
    "block": ("plain", "reentrant", "not reentrant", "in place"),
    "input": ("plain", "cast", "written to", "double"),
    "frozen": ("nothing", "first layer", "all"),
    "state": ("nothing", "counter", "average", "weights", "plain attribute"),
    "hooks": ("none", "forward", "before", "parameter", "accumulated", "backward", "on a tensor"),
    "infer": ("plain", "scaled", "head", "twice", "hot"),
    "iterator": ("plain", "function", "class", "loader", "collate", "get_iterator", "drop last"),
    "dataset": ("plain", "scaled", "float32"),
    "outputs": ("logits", "probabilities", "tuple", "own nonlinearity"),
    "predict": ("plain", "sharpened", "step"),
    "before": ("nothing", "scaler", "stateless"),
    "container": ("array", "tensor", "named", "samples", "float32"),
    "mode": ("evaluation", "training"),
}


class Table(nn.Module):
    """A column of small integers that came as floats, and a row of a table for each."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Embedding(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.rows(x[:, 0].abs().clamp(max=4).long())


class Wrapped(nn.Module):
    """A few smooth layers in float64, put together as they were drawn."""

    def __init__(self, how: dict[str, str]) -> None:
        super().__init__()
        self.how, self.kept = how, None
        self.first, self.last = nn.Linear(4, 3), nn.Linear(3, 3)
        self.block = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
        self.table = Table() if how["module"] == "table" else None
        self.norm = nn.BatchNorm1d(3) if how["module"] == "batch norm" else nn.Identity()
        self.drop = nn.Dropout(0.5) if how["module"] == "dropout" else nn.Identity()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("average", torch.zeros(3))
        self.double()
        if how["module"] == "tied":
            self.block[0].bias = self.first.bias
        if how["module"] == "weight norm":
            parametrizations.weight_norm(self.block[0])
        if how["module"] == "lora":
            self.base = nn.Linear(4, 3).bfloat16().requires_grad_(False)
            self.down, self.up = nn.Linear(4, 2, bias=False), nn.Linear(2, 3, bias=False)
            self.down.double(), self.up.double()
        if how["frozen"] == "first layer":
            self.first.requires_grad_(False)
        elif how["frozen"] == "all":
            self.requires_grad_(False)
        self._add_hooks()

    def _add_hooks(self) -> None:
        match self.how["hooks"]:
            case "forward":
                self.first.register_forward_hook(lambda module, inputs, output: 2 * output)
            case "before":
                self.last.register_forward_pre_hook(lambda module, inputs: (inputs[0] / 2,))
            case "parameter":
                for p in self.parameters():
                    if p.requires_grad:
                        p.register_hook(lambda g: 3 * g)
            case "accumulated":
                for p in self.parameters():
                    if p.requires_grad:
                        p.register_post_accumulate_grad_hook(lambda p: p.grad.zero_())
            case "backward":
                self.block.register_full_backward_hook(lambda m, g, of_output: (5 * g[0],))

    def forward(self, x: Tensor) -> Tensor:
        how = self.how
        match how["input"]:
            case "written to":
                x.sub_(0.3)
            case "cast":
                x = x.float().bfloat16()
        x = x.to(self.last.weight.dtype)
        h = self.first(x)
        if how["module"] == "lora":
            h = h + self.base(x.bfloat16()).double() + self.up(self.down(x))
        if self.table is not None:
            h = h + self.table(x)
        h = self.drop(self.norm(torch.tanh(h)))
        self._change_state(h)
        if how["hooks"] == "on a tensor" and h.requires_grad:
            h.register_hook(lambda g: 3 * g)
        match how["block"]:
            case "reentrant":
                h = checkpoint(self.block, h, use_reentrant=True)
            case "not reentrant":
                h = checkpoint(self.block, h, use_reentrant=False)
            case "in place":
                h = self.block[0](h).mul_(0.7).tanh_()
            case _:
                h = self.block(h)
        if how["module"] == "reused":
            h = self.block(h)
        z = self.last(h)
        match how["outputs"]:
            case "probabilities":
                return z.softmax(1)
            case "tuple":
                return z, h
        return z

    def _change_state(self, h: Tensor) -> None:
        match self.how["state"]:
            case "counter":
                self.calls += 1
            case "average":
                self.average = 0.9 * self.average + 0.1 * h.detach().mean(0)
            case "weights":
                self.last.weight.data = self.last.weight.data.clone()
            case "plain attribute":
                self.kept = h


class Scaled(Dataset):
    def __init__(self, X: Any, y: Any = None, scale: float = 2.0) -> None:
        self.X, self.scale = X["x"] if isinstance(X, dict) else X, scale

    def __len__(self) -> int:
        return len(self.X)

    def __getitem__(self, i: int) -> Any:
        return self.X[i] / self.scale, 0


class Single(Scaled):
    def __getitem__(self, i: int) -> Any:
        return np.float32(self.X[i]), 0


def generated(dataset: Any, batch_size: int) -> Iterator[Any]:
    for x, y in DataLoader(dataset, batch_size=batch_size):
        yield changed(x, lambda t: t + 0.25), y


def changed(x: Any, change: Callable[[Tensor], Tensor]) -> Any:
    return {key: change(value) for key, value in x.items()} if isinstance(x, dict) else change(x)


class Batched:
    def __init__(self, dataset: Any, batch_size: int) -> None:
        self.dataset, self.batch_size = dataset, batch_size

    def __iter__(self) -> Iterator[Any]:
        return generated(self.dataset, self.batch_size)


class Loader(DataLoader):
    def __iter__(self) -> Iterator[Any]:
        return ((changed(x, lambda t: t - 0.25), y) for x, y in super().__iter__())


def collated(samples: list[Any]) -> Any:
    x, y = default_collate(samples)
    return changed(x, lambda t: 0.9 * t), y


class Inferring(NeuralNetClassifier):
    def initialize_module(self) -> Any:
        super().initialize_module()
        if self.module_.how["infer"] == "head":
            self.head_ = nn.Linear(3, 3).double()
        return self

    def infer(self, x: Any, **fit_params: Any) -> Any:
        how, infer = self.module_.how, super().infer
        if how["infer"] == "scaled":
            return infer(changed(x, lambda t: 0.5 * t), **fit_params)
        output = infer(x, **fit_params)
        z = output[0] if isinstance(output, tuple) else output
        match how["infer"]:
            case "twice":
                turned = infer(changed(x, lambda t: -t), **fit_params)
                return (z + (turned[0] if isinstance(turned, tuple) else turned)) / 2
            case "head":
                z = self.head_(z)
            case "hot":
                z = z / 3
        return z.softmax(1) if how["outputs"] == "probabilities" else (z, output)


class OwnIterator(NeuralNetClassifier):
    def get_iterator(self, dataset: Any, training: bool = False) -> Any:
        return Loader(dataset, batch_size=5)


class Sharpened(NeuralNetClassifier):
    def predict_proba(self, X: Any) -> Any:
        p = super().predict_proba(X) ** 2
        return p / p.sum(1, keepdims=True)


class Stepping(NeuralNetClassifier):
    def evaluation_step(self, batch: Any, training: bool = False) -> Any:
        return super().evaluation_step((changed(batch[0], lambda t: t + 1), batch[1]), training)


def net_of(how: dict[str, str]) -> Any:
    """The net that was drawn, initialized."""

    kinds = [
        *([Inferring] if how["infer"] != "plain" else []),
        *([OwnIterator] if how["iterator"] == "get_iterator" else []),
        *({"sharpened": [Sharpened], "step": [Stepping]}.get(how["predict"], [])),
    ]
    kind = type("Net", (*kinds, NeuralNetClassifier), {})
    options: dict[str, Any] = {
        "criterion": nn.NLLLoss if how["outputs"] == "probabilities" else nn.CrossEntropyLoss
    }
    if how["outputs"] == "own nonlinearity":
        options["predict_nonlinearity"] = lambda z: (2 * z).softmax(-1)
    match how["iterator"]:
        case "function":
            options["iterator_valid"] = generated
        case "class":
            options["iterator_valid"] = Batched
        case "loader":
            options["iterator_valid"] = Loader
        case "collate":
            options["iterator_valid__collate_fn"] = collated
        case "drop last":
            options |= {"iterator_valid__drop_last": True, "iterator_valid__batch_size": 6}
    if how["dataset"] != "plain":
        options["dataset"] = Scaled if how["dataset"] == "scaled" else Single
    net = kind(Wrapped(how), train_split=None, verbose=0, batch_size=16, **options).initialize()
    if how["module"] == "batch norm":
        net.module_.norm(torch.randn(30, 3).double())
    return net.module_.train(how["mode"] == "training") and net


def samples_of(how: dict[str, str], X: np.ndarray) -> Any:
    match how["container"]:
        case "tensor":
            return torch.as_tensor(X)
        case "named":
            return {"x": X}
        case "samples":
            return TensorDataset(torch.as_tensor(X), torch.zeros(len(X), dtype=torch.int64))
        case "float32":
            return X.astype("float32")
    return X


def halve(X: Any) -> Any:
    return X / 2


def draw(seed: int) -> dict[str, str]:
    rng = np.random.default_rng(seed)
    how = {name: rng.choice([kinds[0]] * len(kinds) + [*kinds]) for name, kinds in CHOICES.items()}
    if how["module"] == "lora" and how["frozen"] == "all":
        how["frozen"] = "first layer"  # there are no small differences in bfloat16
    if how["container"] in ("named", "samples"):
        how["before"] = "nothing"
        how["dataset"] = "plain" if how["container"] == "samples" else how["dataset"]
    return {name: str(kind) for name, kind in how.items()}


def embedding(net: Any, classifier: Any, X: Any) -> Tensor:
    """V with V^T V = sum_c p_c g_c g_c^T, (n, C, P), by differences of ``predict_proba``."""
    module = nn.ModuleList([net.module_, *([net.head_] if hasattr(net, "head_") else [])])
    parameters = [p for p in module.parameters() if p.requires_grad]
    parameters = parameters or [p for p in module.parameters() if p.is_floating_point()]
    p0 = classifier.predict_proba(X)
    columns = []
    for parameter in parameters:
        for i in range(parameter.numel()):
            value, logs = float(parameter.flatten()[i]), []
            for step in (1e-4, -1e-4, 0):
                # Afresh: a forward pass may put other memory in the place of the parameter's.
                parameter.data.view(-1)[i] = value + step
                logs += [np.log(classifier.predict_proba(X))] if step else []
            columns.append((logs[0] - logs[1]) / 2e-4)
    return torch.as_tensor(np.stack(columns, 2) * np.sqrt(p0)[:, :, None])


def oracle(net: Any, classifier: Any, every: Any) -> tuple[list[int], list[float]]:
    V = embedding(net, classifier, every)
    flat, of_labeled = V.flatten(0, 1), V[N_POOL:].flatten(0, 1)
    return oracles.select_batch_oracle(
        V[:N_POOL],
        N_PICKS,
        flat.T @ flat / len(V),
        fisher_labeled=of_labeled.T @ of_labeled / N_LABELED,
        n_labeled=N_LABELED,
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "seed",
    [seed if seed < 15 else pytest.param(seed, marks=pytest.mark.slow) for seed in range(30)],
)
def test_the_batch_is_the_oracles_or_refused(seed: int) -> None:
    how, rng = draw(seed), np.random.default_rng(seed)
    X = rng.normal(size=(N_POOL + N_LABELED, 4)).round(3)
    torch.manual_seed(seed)
    net = classifier = net_of(how)
    if how["before"] != "nothing":
        step = StandardScaler() if how["before"] == "scaler" else FunctionTransformer(halve)
        classifier = make_pipeline(step.fit(X), net)
    sampler = FisherMaskSampler(
        **PUBLISHED | {"mask": "all", "embedding_dtype": "float64", "random_state": 0}
    )
    pool, labeled = samples_of(how, X[:N_POOL]), samples_of(how, X[N_POOL:])
    if how["predict"] != "plain":
        with pytest.raises(ValueError, match="not read what the net predicts with: for row"):
            sampler(classifier, pool, N_PICKS, X_labeled=labeled)
        return
    found, gains = sampler(classifier, pool, N_PICKS, X_labeled=labeled)
    expected, expected_gains = oracle(net, classifier, samples_of(how, X))
    drawn = {name: kind for name, kind in how.items() if kind != CHOICES[name][0]}
    assert found.tolist() == expected, drawn
    np.testing.assert_allclose(gains, expected_gains, rtol=1e-4, err_msg=str(drawn))
