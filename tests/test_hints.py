"""What a newcomer tries first: it works, or an error says what was found and what to do."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from sklearn.compose import make_column_transformer
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, OneHotEncoder, StandardScaler
from skorch import NeuralNetClassifier
from skorch.dataset import ValidSplit
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

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


class Images(Dataset[Any]):
    """Samples as they are given, of which some cannot be read; files as torchvision names them."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items
        self.samples = [(f"folder/{i}.jpg", 0) for i in range(len(items))]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> tuple[Any, int]:
        if isinstance(self.items[i], OSError):
            raise self.items[i]
        return self.items[i], 0


def images(odd: Any = None, n: int = 30) -> Images:
    """Three-channel images that the flattening net can read, of which the 24th may be odd."""
    items: list[Any] = [torch.tensor(x[:48]).reshape(3, 4, 4) for x in X[:n]]
    return Images(items if odd is None else [*items[:23], odd, *items[24:]])


def image_net(**more: Any) -> NeuralNetClassifier:
    return net(FlatImages, **more)


class FlatImages(nn.Sequential):
    def __init__(self, n_classes: int = 10) -> None:
        # The first layer knows its channels, as one of a real net does.
        super().__init__(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(64, n_classes))


def fit(X: Any, y: Any = None, estimator: Any = None) -> Any:
    y = Y[: len(X)] if y is None else y
    return lambda: FisherMaskSampler(estimator or image_net(), batch_size=8).fit(X, y)


def query(X: Any) -> Any:
    return lambda: fit(images())().query(X, 3)


GREY, LARGE = torch.zeros(1, 4, 4), torch.zeros(3, 8, 4)
MISSPELT = ["cat"] * 5 + ["dog"] * 4 + ["dgo"]
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
    "a path": (query("photos"), TypeError, "samples in X_pool, found str: the files must be read"),
    "a list of paths": (query([Path("a")]), TypeError, "found list: the files must be read first"),
    "names of files": (query(["a.jpg"]), ValueError, "names of image files, give a Dataset"),
    "paths to fit": (fit([Path("a")], [1]), TypeError, "samples in X, found list: the files must"),
    "a grey image": (
        query(images(GREY)),
        RuntimeError,
        r"Row 23 of X_pool \(folder/23.jpg\) has shape \(1, 4, 4\), the first one \(3, 4, 4\)",
    ),
    "a large image in a part of a pool": (
        query(Subset(images(LARGE), [*range(5, 30)])),
        RuntimeError,
        r"Row 18 of X_pool \(folder/23.jpg\) has shape \(3, 8, 4\), .*Resize",
    ),
    "a file that is cut off": (
        query(images(OSError("truncated"))),
        OSError,
        r"Row 23 of X_pool \(folder/23.jpg\) cannot be read: OSError: truncated",
    ),
    "one to fit": (
        fit(images(OSError("truncated"))),
        OSError,
        r"Row 23 of X \(folder/23.jpg\) cannot be read: OSError: truncated",
    ),
    "a grey image to fit": (
        fit(images(GREY)),
        ValueError,
        r"must take: .*\n?Row 23 of X \(folder/23.jpg\) has shape",
    ),
    "an image of PIL": (
        query(Images([Image.new("RGB", (4, 4))] * 9)),
        TypeError,
        r"Row 0 of X_pool \(folder/0.jpg\) is an image of PIL: .*ToTensor",
    ),
    "images of bytes": (
        query(Images([torch.zeros(3, 4, 4, dtype=torch.uint8)] * 9)),
        ValueError,
        r"uint8: X / 255",
    ),
    "images of bytes to fit": (
        fit(np.zeros((9, 3, 4, 4), dtype="uint8")),
        ValueError,
        r"uint8: X / 255",
    ),
    "channels last": (
        query(np.zeros((9, 5, 6, 3), dtype="float32")),
        ValueError,
        r"channels come first: X.transpose\(0, 3, 1, 2\)",
    ),
    "a misspelt label": (
        fit(images(n=10), MISSPELT, image_net(module__n_classes=2)),
        ValueError,
        r"output for each of 3 classes. Those in y, the rarest first: 'dgo' \(1\), 'dog' \(4\), ",
    ),
    "None among labels": (
        fit(X[:3], [1, None, 2]),
        ValueError,
        "no label for 1 of 3 samples, the first is row 1",
    ),
    "NaN among names": (
        fit(X[:3], ["a", float("nan"), "b"]),
        ValueError,
        "y has no label for 1 of 3 samples",
    ),
    "a blank name": (fit(X[:3], np.array(["a", "b", " "])), ValueError, "first is row 2: leave"),
    "pandas' missing labels": (
        fit(X[:3], pd.Series(["a", pd.NA, None])),
        ValueError,
        "no label for 2 of 3 samples, the first is row 1",
    ),
    "a dataset without a net": (
        lambda: FisherMaskSampler().fit(images(), Y[:30]),
        ValueError,
        "default network takes arrays: .* for samples of a Images",
    ),
    "labels set aside": (
        fit(images(n=6), [0, 1, 2, 0, 1, 2], image_net(train_split=ValidSplit(5, stratified=True))),
        ValueError,
        "With few labels give it train_split=None",
    ),
    "one class": (
        lambda: FisherMaskSampler(net()).fit(X, np.zeros(len(X))),
        ValueError,
        "found 1 class: .*Label samples of another class first",
    ),
    "one class in a dataset": (
        lambda: FisherMaskSampler(net()).fit(
            TensorDataset(torch.tensor(X), torch.zeros(len(X), dtype=torch.int64)), None
        ),
        ValueError,
        r"found 1 class: \[0\]. Label samples of another class first",
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


def test_a_net_may_set_samples_of_a_dataset_aside_by_class() -> None:
    fitted = fit(images(), Y[:30] % 2, image_net(train_split=ValidSplit(3, stratified=True)))()
    assert len(fitted.query(images(), 3)[0]) == 3


class Noisy(Images):
    """Augmented at every reading."""

    def __getitem__(self, i: int) -> tuple[Any, int]:
        x, y = super().__getitem__(i)
        return x + torch.rand(1), y


@pytest.mark.parametrize("what", ["fit", "query", "coverage"])
@pytest.mark.parametrize("odd", [None, GREY])
def test_a_dataset_that_draws_leaves_the_generators_alone(what: str, odd: Any) -> None:
    """Also where it is read again, to explain an error."""
    sampler = FisherMaskSampler(image_net(), batch_size=8, random_state=0).fit(images(), Y[:30])
    noisy, fine = Noisy(images(odd).items), Noisy(images().items)
    before = torch.get_rng_state()
    error = pytest.raises((ValueError, RuntimeError), match=r"Row 23 of .* has shape")
    with nullcontext() if odd is None else error:
        if what == "fit":
            sampler.fit(noisy, Y[:30])
        else:
            given = {"X_target": fine} if what == "query" else {}
            sampler.set_params(coverage_share=0.5 if what == "coverage" else "auto")
            sampler.query(noisy, 3, X_labeled=noisy if odd is None else fine, **given)
    assert torch.equal(torch.get_rng_state(), before)
