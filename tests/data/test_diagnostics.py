"""Samples and labels that do not fit: the message names the row, the file, and what to do."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from sklearn.compose import make_column_transformer
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, OneHotEncoder, StandardScaler
from skorch import NeuralNetClassifier
from skorch.dataset import ValidSplit
from torch import nn
from torch.utils.data import Dataset, Subset, TensorDataset

from skfishermask import FisherMaskSampler, active_learning_curve
from skfishermask.modal import ActiveLearner
from tests import nets

X, Y = nets.digits()
X, Y = X[:120], Y[:120]


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
    return NeuralNetClassifier(
        FlatImages, criterion=nn.CrossEntropyLoss, **nets.options(max_epochs=2, **more)
    )


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
CALLS: dict[str, tuple[Any, type[Exception], str]] = {
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
    "labels set aside": (
        fit(images(n=6), [0, 1, 2, 0, 1, 2], image_net(train_split=ValidSplit(5, stratified=True))),
        ValueError,
        "With few labels give it train_split=None",
    ),
    "one sample left to batch normalisation": (
        lambda: FisherMaskSampler(normalised()).fit(X[:33], Y[:33]),
        ValueError,
        "more than 1 value.*\n?.*last batch has one sample.*iterator_train__drop_last=True",
    ),
    "one sample left in a learner": (
        lambda: ActiveLearner(normalised(), X_training=X[:33], y_training=Y[:33]),
        ValueError,
        "iterator_train__drop_last=True, or another batch_size",
    ),
    "one sample left in a curve": (
        lambda: curve(normalised(), n_initial=33),
        ValueError,
        "iterator_train__drop_last=True, or another batch_size",
    ),
    "labels set aside in a curve": (
        lambda: curve(
            nets.logits_net(train_split=ValidSplit(5, stratified=True)), y=Y % 2, n_initial=6
        ),
        ValueError,
        "give it train_split=None",
    ),
    "bool in a curve": (
        lambda: curve(nets.logits_net(), y=Y > 4),
        RuntimeError,
        r'class numbers as int64: y.astype\("int64"\)',
    ),
    "int32 in a learner": (
        lambda: ActiveLearner(nets.logits_net(), X_training=X, y_training=Y.astype("int32")),
        RuntimeError,
        r'class numbers as int64: y.astype\("int64"\)',
    ),
    "an integer outside of a table to fit": (
        lambda: FisherMaskSampler(tagger()).fit(OUTSIDE, Y[:60] % 2),
        ValueError,
        r"integers from 0, in row \d+, to 77, in row 40",
    ),
    "a class without an output, of samples that are integers": (
        lambda: FisherMaskSampler(tagger()).fit(TOKENS, Y[:60] % 3),
        ValueError,
        r"(?s)^(?!.*integers from).*Target 2 is out of bounds",
    ),
    "an integer outside of a table": (
        lambda: FisherMaskSampler(tagger()).fit(TOKENS, Y[:60] % 2).query(OUTSIDE, 3),
        ValueError,
        r"cannot read X_pool: .*X_pool has integers from 0, in row \d+, to 77, in row 40: .*Embed",
    ),
    "an integer outside of a table in the first row": (
        lambda: FisherMaskSampler(tagger()).fit(TOKENS, Y[:60] % 2).query(OUTSIDE[40:], 3),
        ValueError,
        "It has integers from .* to 77, in row 0: a table",
    ),
    "an integer outside of a table to predict": (
        lambda: FisherMaskSampler(tagger()).fit(TOKENS, Y[:60] % 2).predict(OUTSIDE),
        ValueError,
        "to 77, in row 40",
    ),
    "None among texts to fit": (
        lambda: FisherMaskSampler(of_texts()).fit([*TEXTS, None], [0, 1] * 20),
        AttributeError,
        'Row 39 of X is None, others are text: make text of it, such as ""',
    ),
    "None among texts of a first batch": (
        lambda: FisherMaskSampler(of_texts()).query([*TEXTS, None], 3),
        AttributeError,
        "Row 39 of X_pool is None, others are text",
    ),
    "NaN among texts": (
        lambda: (
            FisherMaskSampler(of_texts())
            .fit(TEXTS, ([0, 1] * 20)[:39])
            .query(pd.Series([*TEXTS, np.nan]), 3)
        ),
        ValueError,
        "Row 39 of X_pool is nan, others are text",
    ),
    "one class": (
        lambda: FisherMaskSampler(nets.logits_net()).fit(X, np.zeros(len(X))),
        ValueError,
        "found 1 class: .*Label samples of another class first",
    ),
    "one class in a dataset": (
        lambda: FisherMaskSampler(nets.logits_net()).fit(
            TensorDataset(torch.tensor(X), torch.zeros(len(X), dtype=torch.int64)), None
        ),
        ValueError,
        r"found 1 class: \[0\]. Label samples of another class first",
    ),
}


TOKENS = np.random.default_rng(0).integers(0, 9, size=(60, 5))
OUTSIDE = np.where(np.arange(300).reshape(60, 5) == 203, 77, TOKENS)
TEXTS = ["good words", "bad words", "no words"] * 13


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.output = nn.Embedding(9, 4), nn.Linear(4, 2)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.output(self.table(tokens).mean(1))


def tagger() -> NeuralNetClassifier:
    return NeuralNetClassifier(
        Tagger, criterion=nn.CrossEntropyLoss, **nets.options(max_epochs=1, batch_size=8)
    )


def normalised() -> NeuralNetClassifier:
    module = nn.Sequential(nn.Linear(64, 5), nn.BatchNorm1d(5), nn.Linear(5, 10))
    return NeuralNetClassifier(
        module, criterion=nn.CrossEntropyLoss, **nets.options(max_epochs=1, batch_size=16)
    )


def of_texts() -> Any:
    return make_pipeline(TfidfVectorizer(), LogisticRegression())


def curve(estimator: Any, y: Any = Y, n_initial: int = 20) -> Any:
    few = {"n_initial": n_initial, "n_instances": 1, "n_queries": 1, "cv": 2}
    return active_learning_curve(estimator, X, y, query_strategy="random", **few)


@pytest.mark.parametrize(("call", "kind", "words"), CALLS.values(), ids=CALLS)
def test_what_is_wrong_is_named(call: Any, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        call()


FRAME = pd.DataFrame({"kind": ["a", "b"] * 30, "size": X[:60, 20].astype("float64")})


def scaled(*more: Any) -> Any:
    """A pipeline that makes float64 of a frame, as scikit-learn's transformers do."""
    columns = make_column_transformer((OneHotEncoder(), ["kind"]), (StandardScaler(), ["size"]))
    net = NeuralNetClassifier(
        nn.Linear(3, 10), criterion=nn.CrossEntropyLoss, **nets.options(max_epochs=1)
    )
    return make_pipeline(columns, *more, net)


def test_transformers_that_return_another_dtype() -> None:
    remedy = r"FunctionTransformer\(numpy\.float32\) before the net"
    few = {"n_initial": 20, "n_instances": 1, "n_queries": 1, "cv": 2}
    for fit in (
        lambda: ActiveLearner(scaled(), X_training=FRAME, y_training=Y[:60]),
        lambda: FisherMaskSampler(scaled()).fit(FRAME, Y[:60]),
        lambda: active_learning_curve(scaled(), FRAME, Y[:60], query_strategy="random", **few),
    ):
        with pytest.raises((RuntimeError, ValueError), match=remedy):
            fit()
    learner = ActiveLearner(
        scaled(FunctionTransformer(np.float32)),
        FisherMaskSampler(random_state=0),
        X_training=FRAME,
        y_training=Y[:60],
    )
    assert len(learner.query(FRAME, n_instances=3)[0]) == 3


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
