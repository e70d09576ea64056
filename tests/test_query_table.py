"""Queries as tables, and as tasks of Label Studio."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.linear_model import LogisticRegression
from skorch import NeuralNet, NeuralNetRegressor
from torch import nn
from torch.utils.data import Subset, TensorDataset

from skfishermask import FisherMaskSampler, label_studio_tasks, query_table
from skfishermask.modal import ActiveLearner
from tests import nets

X, Y = (data[:200] for data in nets.digits())
NAMES = np.array([f"digit {label}" for label in Y])
POOL = X[60:]


@pytest.fixture(scope="module")
def sampler() -> Any:
    return FisherMaskSampler(nets.logits_net(), **nets.SMALL).fit(X[:60], NAMES[:60])


def test_columns(sampler: Any) -> None:
    indices, instances, gains = sampler.query(POOL, 5, return_metrics=True)
    table = query_table(sampler, POOL, indices, gains, files=[f"{i}.png" for i in range(len(POOL))])
    assert table["rank"].tolist() == [1, 2, 3, 4, 5]
    assert table["row"].tolist() == indices.tolist()
    assert table["file"].tolist() == [f"{i}.png" for i in indices]
    assert table["gain"].tolist() == gains.tolist()
    assert table["predicted"].tolist() == sampler.predict(instances).tolist()
    largest = sampler.predict_proba(instances).max(axis=1)
    np.testing.assert_array_equal(table["uncertainty"], 1 - largest)
    assert pd.DataFrame(table).shape == (5, 6)


@pytest.mark.parametrize(
    "estimator",
    [
        nets.fitted(nets.logits_net()),
        ActiveLearner(LogisticRegression(), lambda *_: None, X[:60], NAMES[:60]),
    ],
    ids=["net", "learner"],
)
def test_whatever_predicts_may_be_given(estimator: Any) -> None:
    table = query_table(estimator, POOL, np.array([7, 3]))
    assert list(table) == ["rank", "row", "predicted", "uncertainty"]
    assert table["predicted"].tolist() == estimator.predict(POOL[[7, 3]]).tolist()


@pytest.mark.parametrize("estimator", [None, FisherMaskSampler(), FisherMaskSampler(nets.mlp())])
def test_a_first_batch_has_no_predictions(estimator: Any) -> None:
    assert list(query_table(estimator, POOL, [4, 2], [0.5, 0.25])) == ["rank", "row", "gain"]


class Folder(TensorDataset):
    """Knows its files, as torchvision's folders do."""

    samples = [(f"scans/{i}.png", 0) for i in range(len(POOL))]  # noqa: RUF012


def test_files_that_a_dataset_knows(sampler: Any) -> None:
    pool = Folder(torch.as_tensor(POOL), torch.zeros(len(POOL)))
    rows = [30, 40, 50, 60]
    table = query_table(sampler, Subset(pool, rows), np.array([2, 0]))
    assert table["file"].tolist() == ["scans/50.png", "scans/30.png"]
    assert table["predicted"].tolist() == sampler.predict(POOL[[50, 30]]).tolist()


def several(criterion: Any, kind: Any, n_outputs: int, y: np.ndarray) -> Any:
    net = kind(nets.mlp(n_outputs), criterion=criterion, **nets.options())
    return FisherMaskSampler(net, random_state=0).fit(X[:60], y)


def test_several_labels_and_numbers() -> None:
    present = np.stack([Y[:60] % 2, Y[:60] > 4], axis=1).astype("float32")
    estimator = several(nn.BCEWithLogitsLoss, NeuralNet, 2, present)
    table = query_table(estimator, POOL, np.array([1, 5]))
    p = estimator.predict_proba(POOL[[1, 5]])
    assert table["predicted"].tolist() == (p > 0.5).astype(int).tolist()
    np.testing.assert_allclose(table["uncertainty"], np.minimum(p, 1 - p).mean(axis=1))
    assert pd.DataFrame(table).shape == (2, 4)
    [choice] = label_studio_tasks(table, ["a", "b"])[1]["predictions"][0]["result"]
    assert choice["value"]["choices"] == [str(i) for i in range(2) if p[1, i] > 0.5]

    numbers = several(nn.MSELoss, NeuralNetRegressor, 1, Y[:60].astype("float32"))
    table = query_table(numbers, POOL, np.array([1, 5]))
    assert list(table) == ["rank", "row", "predicted"]
    np.testing.assert_array_equal(table["predicted"], numbers.predict(POOL[[1, 5]]))
    [prediction] = label_studio_tasks(table, ["a", "b"])[1]["predictions"]
    assert "score" not in prediction
    number = {"number": numbers.predict(POOL[[5]]).item()}
    assert prediction["result"] == [
        {"from_name": "label", "to_name": "image", "type": "number", "value": number}
    ]
    y = np.stack([Y[:60], Y[:60] % 2], axis=1).astype("float32")
    table = query_table(several(nn.MSELoss, NeuralNetRegressor, 2, y), POOL, np.array([1, 5]))
    with pytest.raises(ValueError, match=r'several numbers.*del table\["predicted"\]'):
        label_studio_tasks(table, ["a", "b"])


def test_numbers_that_are_classes_are_choices() -> None:
    estimator = FisherMaskSampler(nets.logits_net(), **nets.SMALL).fit(X[:60], Y[:60] / 1.0)
    [task] = label_studio_tasks(query_table(estimator, POOL, np.array([1])), ["a"])
    [result] = task["predictions"][0]["result"]
    assert result["value"] == {"choices": [str(estimator.predict(POOL[[1]])[0])]}


@pytest.mark.parametrize(
    ("sources", "found"),
    [(["a"], "found 1"), (list("abcdefg"), "found 7"), ("abc", "found 'abc'"), ([], "found 0")],
)
def test_a_source_for_each_row(sources: Any, found: str) -> None:
    table = query_table(None, POOL, np.array([5, 2, 9]))
    with pytest.raises(ValueError, match=f"each of the 3 rows of the table, {found}"):
        label_studio_tasks(table, sources)


def test_uncertainty_of_positions_is_their_mean() -> None:
    class Predicts(ClassifierMixin, BaseEstimator):
        def predict(self, X: Any) -> Any:
            return self.predict_proba(X).argmax(axis=1)

        def predict_proba(self, X: Any) -> Any:
            p = np.random.default_rng(0).random((len(X), 3, 4))
            return p / p.sum(axis=1, keepdims=True)

    table = query_table(Predicts(), POOL, np.array([1, 5]))
    p = Predicts().predict_proba(POOL[:2])
    np.testing.assert_allclose(table["uncertainty"], (1 - p.max(axis=1)).mean(axis=1))
    assert len(table["predicted"][0]) == 4
    with pytest.raises(ValueError, match="or of positions, are no choice of Label Studio"):
        label_studio_tasks(table, ["a", "b"])


def test_tasks_of_label_studio(sampler: Any, tmp_path: Path) -> None:
    indices, _, gains = sampler.query(POOL, 3, return_metrics=True)
    table = query_table(sampler, POOL, indices, gains, files=[f"{i}.png" for i in range(len(POOL))])
    file = tmp_path / "tasks.json"
    file.write_text(json.dumps(label_studio_tasks(table, from_name="digit")))
    tasks = json.loads(file.read_text())
    assert [task["data"]["rank"] for task in tasks] == [1, 2, 3]
    assert [task["data"]["image"] for task in tasks] == table["file"].tolist()
    for i, task in enumerate(tasks):
        [prediction] = task["predictions"]
        assert prediction["score"] == 1 - table["uncertainty"][i]
        assert prediction["result"] == [
            {
                "from_name": "digit",
                "to_name": "image",
                "type": "choices",
                "value": {"choices": [table["predicted"][i]]},
            }
        ]
    first = query_table(None, POOL, indices)
    assert label_studio_tasks(first, ["a", "b", "c"], to_name="text")[0] == {
        "data": {"rank": 1, "row": int(indices[0]), "text": "a"}
    }
    with pytest.raises(KeyError, match="file"):
        label_studio_tasks(first)
