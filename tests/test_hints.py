"""What a newcomer tries first: it works, or an error says what was found and what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.compose import make_column_transformer
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, OneHotEncoder, StandardScaler
from skorch import NeuralNetClassifier
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from skfishermask import (
    FisherMaskSampler,
    ParameterMask,
    active_learning_curve,
    fisher_diagonal,
    fisher_embedding,
)
from tests import nets

X, Y = nets.digits()
X, Y = X[:120], Y[:120]
NAMES = np.array([f"digit {label}" for label in Y])
TEXTS = [f"{'good' if label < 5 else 'bad'} word{i % 7}" for i, label in enumerate(Y)]
OPTIONS: dict[str, Any] = {"n_initial": 30, "n_instances": 2, "n_queries": 1, "cv": 2}
LOADER = DataLoader(TensorDataset(torch.tensor(X)), batch_size=8)


def net(module: Any = nets.mlp, **more: Any) -> NeuralNetClassifier:
    return NeuralNetClassifier(
        **nets.options(module=module, criterion=nn.CrossEntropyLoss, max_epochs=2, **more)
    )


def text_pipeline() -> Any:
    n_words = len(CountVectorizer().fit(TEXTS).vocabulary_)
    dense = FunctionTransformer(lambda counts: counts.toarray().astype("float32"))
    linear = {"module__in_features": n_words, "module__out_features": 2}
    return make_pipeline(CountVectorizer(), dense, net(nn.Linear, **linear))


def learner(estimator: Any, *strategy: Any, **data: Any) -> Any:
    modal = pytest.importorskip("skfishermask.modal", reason="modAL is not installed")
    data = data or {"X_training": X[:60], "y_training": Y[:60]}
    return modal.ActiveLearner(estimator, *strategy, **data)


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: make_pipeline(StandardScaler(), s)])
def test_a_learner_around_a_sampler_asks_it(wrap: Any) -> None:
    sampler = FisherMaskSampler(net(), n_directions=2, random_state=0)
    around = learner(wrap(sampler))
    assert around.query_strategy is sampler
    indices, _ = around.query(X[60:], n_instances=3)
    expected, _ = FisherMaskSampler(n_directions=2, random_state=0)(around, X[60:], 3)
    assert indices.tolist() == expected.tolist()


def test_a_learner_around_another_classifier_asks_by_uncertainty() -> None:
    around = learner(LogisticRegression())
    assert around.query_strategy.__name__ == "uncertainty_sampling"
    assert learner(FisherMaskSampler(net()), len).query_strategy is len


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_knows_the_weights_of_an_instance(tmp_path: Path, dtype: torch.dtype) -> None:
    def run(seed: int, n_queries: int) -> Any:
        torch.manual_seed(seed)
        options = OPTIONS | {"n_queries": n_queries, "random_state": 0, "checkpoint": tmp_path}
        module = nn.Sequential(nets.mlp(), nn.BatchNorm1d(10))
        module.register_buffer("unused", torch.tensor(seed).to(dtype))
        return active_learning_curve(net(module), X, Y, query_strategy="random", **options)

    run(0, 1)
    assert run(0, 2)["test_score"].shape == (2, 3)
    with pytest.raises(ValueError, match="another estimator"):
        run(1, 2)


@pytest.mark.parametrize("share", [np.float32(0.5), np.float64(0.5)])
def test_a_share_may_be_numpys(share: Any) -> None:
    module, batches = nets.mlp(), [torch.as_tensor(X)]
    mask = ParameterMask.from_diagonal(
        fisher_diagonal(module, batches), "global", 60, output_layer=[]
    )
    V = fisher_embedding(module, batches, mask, n_directions=share)
    torch.testing.assert_close(V, fisher_embedding(module, batches, mask, n_directions=0.5))


@pytest.mark.parametrize("texts", [TEXTS, np.array(TEXTS), pd.Series(TEXTS)], ids=type)
def test_a_learning_curve_of_texts(texts: Any) -> None:
    labels = np.where(Y < 5, "good", "bad")
    sampler = FisherMaskSampler(text_pipeline(), random_state=0)
    result = active_learning_curve(sampler, texts, labels, query_strategy=sampler, **OPTIONS)
    assert result["test_score"].shape == (2, 2)
    assert np.isfinite(result["test_score"]).all()


def test_a_learning_curve_of_columns_of_any_type() -> None:
    frame = pd.DataFrame({"word": TEXTS, "pixel": X[:, 20]})
    columns = make_column_transformer(
        (OneHotEncoder(handle_unknown="ignore"), ["word"]), remainder="passthrough"
    )
    model = make_pipeline(columns, LogisticRegression())
    result = active_learning_curve(model, frame, Y < 5, query_strategy="random", **OPTIONS)
    assert result["test_score"].shape == (2, 2)


def curve(estimator: Any = None, X: Any = X, y: Any = Y) -> Any:
    return active_learning_curve(estimator or net(), X, y, query_strategy="random", **OPTIONS)


def ask(pool: Any) -> Any:
    return FisherMaskSampler()(net().fit(X, Y), pool, 3)


MODULE = nets.mlp()
CALLS: dict[str, tuple[Any, type[Exception], str]] = {
    "a module in a learner": (lambda: learner(MODULE), TypeError, "Sequential, a torch module"),
    "a module in a curve": (lambda: curve(MODULE), TypeError, "Sequential, a torch module: wrap"),
    "a module's class": (
        lambda: FisherMaskSampler(nn.Linear).fit(X, Y),
        TypeError,
        "Linear, a class of torch modules: wrap it, as in NeuralNetClassifier",
    ),
    "a module in a pipeline": (
        lambda: FisherMaskSampler(make_pipeline(StandardScaler(), MODULE)).fit(X, Y),
        TypeError,
        "Sequential, a torch module: wrap it",
    ),
    "a loader in a learner": (
        lambda: learner(net(), X_training=LOADER, y_training=Y),
        TypeError,
        "found DataLoader: give its dataset",
    ),
    "texts without a pipeline": (
        lambda: FisherMaskSampler(net()).fit(TEXTS, Y),
        ValueError,
        r"Expected numbers in X, found strings.*make_pipeline\(vectorizer, net\)",
    ),
    "a pool of texts": (lambda: ask(TEXTS), ValueError, "numbers in X_pool, found strings.*make_p"),
    "names in a learner": (
        lambda: learner(net(), X_training=X, y_training=NAMES),
        TypeError,
        r"class numbers from 0, but y has 'digit 6'.*LabelEncoder.*FisherMaskSampler\(net\)",
    ),
    "a list of names in a learner": (
        lambda: learner(make_pipeline(StandardScaler(), net()), X_training=X, y_training=[*NAMES]),
        TypeError,
        "class numbers from 0, but y has 'digit 6'",
    ),
    "names in a curve": (
        lambda: curve(y=NAMES),
        TypeError,
        "class numbers from 0, but y has 'digit ",
    ),
    "a path": (lambda: ask("photos"), TypeError, "samples in X_pool, found str: the files must be"),
    "a list of paths": (lambda: ask([Path("a")]), TypeError, "found list: the files must be read"),
    "names of files": (lambda: ask(["a.jpg"]), ValueError, "names of image files, give a Dataset"),
    "paths to fit": (
        lambda: FisherMaskSampler(net()).fit([Path("a")], [1]),
        TypeError,
        "samples in X, found list: the files must",
    ),
    "weights of samples": (
        lambda: FisherMaskSampler(net()).fit(X, Y, sample_weight=np.ones(120)),
        TypeError,
        "The fit of NeuralNetClassifier takes no sample_weight. .*criterion__weight",
    ),
    "weights of samples in a pipeline": (
        lambda: FisherMaskSampler(make_pipeline(StandardScaler(), net())).fit(
            X, Y, sample_weight=np.ones(120)
        ),
        TypeError,
        "takes no sample_weight. .*criterion__weight",
    ),
    "weights of samples without a net": (
        lambda: FisherMaskSampler().fit(X, Y, sample_weight=np.ones(120)),
        TypeError,
        "takes no sample_weight. .*criterion__weight",
    ),
    "a dataset without a net": (
        lambda: FisherMaskSampler().fit(LOADER.dataset, Y),
        ValueError,
        "default network takes arrays: .* for samples of a TensorDataset",
    ),
}


@pytest.mark.parametrize(("call", "kind", "words"), CALLS.values(), ids=CALLS)
def test_it_says_what_to_do(call: Any, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        call()


def test_names_are_no_matter_to_what_encodes_them() -> None:
    around = learner(FisherMaskSampler(net()), X_training=X, y_training=NAMES)
    assert set(around.predict(X)) <= set(NAMES)
    assert np.isfinite(curve(FisherMaskSampler(net()), y=NAMES)["test_score"]).all()
