from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from modAL.models import ActiveLearner as ModALActiveLearner
from modAL.models import Committee, DeepActiveLearner
from sklearn.ensemble import RandomForestClassifier
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler, StandardScaler

from skfishermask.data.unwrap import unwrap
from skfishermask.modal import ActiveLearner
from tests import nets

X, Y = nets.digits()


def strategy(*_: Any) -> None:
    raise AssertionError("not called")


def search(estimator: Any) -> GridSearchCV:
    name = "max_epochs" if hasattr(estimator, "max_epochs") else "neuralnetclassifier__max_epochs"
    return GridSearchCV(estimator, {name: [1, 2]}, cv=2)


def pipeline(*steps: Any) -> Any:
    return make_pipeline(MinMaxScaler(), *steps)


def learner(estimator: Any, cls: type = ActiveLearner) -> Any:
    return cls(estimator, strategy, X[:40], Y[:40])


NESTED = {
    "net": lambda: nets.fitted(nets.logits_net()),
    "pipeline": lambda: nets.fitted(pipeline(nets.logits_net())),
    "pipeline of one": lambda: nets.fitted(make_pipeline(nets.logits_net())),
    "pipeline in a pipeline": lambda: nets.fitted(
        make_pipeline(StandardScaler(), pipeline(nets.logits_net()))
    ),
    "search": lambda: nets.fitted(search(nets.logits_net())),
    "search over a pipeline": lambda: nets.fitted(search(pipeline(nets.logits_net()))),
    "pipeline with a search": lambda: nets.fitted(pipeline(search(nets.logits_net()))),
    "modAL": lambda: learner(nets.logits_net(), ModALActiveLearner),
    "ours": lambda: learner(nets.logits_net()),
    "ours with a pipeline": lambda: learner(pipeline(nets.logits_net())),
    "ours with a search": lambda: learner(search(pipeline(nets.logits_net()))),
}


@pytest.mark.parametrize("make", NESTED.values(), ids=NESTED)
def test_the_net_and_what_it_sees(make: Any) -> None:
    classifier = make()
    unwrapped = unwrap(classifier)
    np.testing.assert_allclose(
        unwrapped.net.predict_proba(unwrapped.transform(X[:30]).astype("float32")),
        classifier.predict_proba(X[:30]),
        rtol=1e-5,
    )
    is_learner = hasattr(classifier, "query_strategy")
    assert unwrapped.X_training is (classifier.X_training if is_learner else None)


def test_deep_active_learner_keeps_no_data() -> None:
    deep = DeepActiveLearner(nets.logits_net(), strategy)
    assert unwrap(deep).X_training is None
    assert unwrap(deep).net is deep.estimator


@pytest.mark.parametrize(
    ("classifier", "message"),
    [
        (RandomForestClassifier(), "found RandomForestClassifier"),
        (
            nets.fitted(pipeline(RandomForestClassifier(n_estimators=2))),
            "found RandomForestClassifier inside Pipeline",
        ),
        (
            learner(RandomForestClassifier(n_estimators=2)),
            "found RandomForestClassifier inside ActiveLearner",
        ),
        (Committee([learner(nets.logits_net())], strategy), "found Committee"),
        (nets.mlp(), "found Sequential"),
        (None, "found NoneType"),
        ("net", "found str"),
    ],
)
def test_no_classifier_inside(classifier: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        unwrap(classifier)


@pytest.mark.parametrize(
    "classifier",
    [
        nets.logits_net(),
        pipeline(nets.logits_net()),
        search(nets.logits_net()),
        ActiveLearner(nets.logits_net(), strategy),
        ActiveLearner(pipeline(nets.logits_net()), strategy),
    ],
    ids=["net", "pipeline", "search", "learner", "learner of a pipeline"],
)
def test_not_fitted(classifier: Any) -> None:
    with pytest.raises(NotFittedError):
        unwrap(classifier)
