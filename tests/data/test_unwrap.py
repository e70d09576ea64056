from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from modAL.models import ActiveLearner as ModALActiveLearner
from modAL.models import Committee, DeepActiveLearner
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.calibration import CalibratedClassifierCV
from sklearn.ensemble import (
    BaggingClassifier,
    RandomForestClassifier,
    StackingClassifier,
    VotingClassifier,
)
from sklearn.exceptions import NotFittedError
from sklearn.frozen import FrozenEstimator
from sklearn.model_selection import GridSearchCV
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import FunctionTransformer, MinMaxScaler, Normalizer, StandardScaler
from sklearn.semi_supervised import SelfTrainingClassifier

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


class Stateless(TransformerMixin, BaseEstimator):
    """A transformer without anything fitted, and without a word about that."""

    def fit(self, X: Any, y: Any = None) -> Any:
        return self

    def transform(self, X: Any) -> Any:
        return X / 2


class Resampler(BaseEstimator):
    """Repeats samples in training, as those of imbalanced-learn do; it cannot transform."""

    def fit_resample(self, X: Any, y: Any) -> Any:
        return np.concatenate([X, X[:9]]), np.concatenate([y, y[:9]])


class ResamplingPipeline(Pipeline):
    """As the Pipeline of imbalanced-learn: a resampler works in fit alone."""

    def fit(self, X: Any, y: Any = None) -> Any:
        for _, step in self.steps[:-1]:
            if hasattr(step, "fit_resample"):
                X, y = step.fit_resample(X, y)
            else:
                X = step.fit_transform(X, y)
        self.steps[-1][1].fit(X, y)
        return self

    def predict_proba(self, X: Any) -> Any:
        for _, step in self.steps[:-1]:
            X = step.transform(X) if hasattr(step, "transform") else X
        return self.steps[-1][1].predict_proba(X)


def resampling() -> Any:
    steps = [("scale", MinMaxScaler()), ("more", Resampler()), ("net", nets.logits_net())]
    return nets.fitted(ResamplingPipeline(steps))


NESTED = {
    "stateless step": lambda: nets.fitted(make_pipeline(Stateless(), nets.logits_net())),
    "stateless last": lambda: nets.fitted(pipeline(Stateless(), nets.logits_net())),
    "normalizer": lambda: nets.fitted(make_pipeline(Normalizer(), nets.logits_net())),
    "function": lambda: nets.fitted(make_pipeline(FunctionTransformer(), nets.logits_net())),
    "passthrough": lambda: nets.fitted(make_pipeline("passthrough", nets.logits_net())),
    "resampler": resampling,
    "frozen": lambda: FrozenEstimator(nets.fitted(nets.logits_net())),
    "frozen pipeline": lambda: FrozenEstimator(nets.fitted(pipeline(nets.logits_net()))),
    "frozen in a pipeline": lambda: nets.fitted(
        pipeline(FrozenEstimator(nets.fitted(nets.logits_net())))
    ),
    "meta-estimator": lambda: nets.fitted(SelfTrainingClassifier(nets.logits_net())),
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
        (Committee([learner(nets.logits_net())], strategy), "found Committee. A query .* members"),
        (
            nets.fitted(CalibratedClassifierCV(nets.logits_net(), cv=2), 100),
            "found CalibratedClassifierCV. Give the net itself",
        ),
        (nets.fitted(OneVsRestClassifier(nets.logits_net()), 100), "found OneVsRestClassifier"),
        (
            nets.fitted(pipeline(CalibratedClassifierCV(nets.logits_net(), cv=2)), 100),
            "found CalibratedClassifierCV inside Pipeline",
        ),
        (
            nets.fitted(VotingClassifier([("net", nets.logits_net())], voting="soft")),
            "found VotingClassifier. Give the net itself",
        ),
        (
            nets.fitted(StackingClassifier([("net", nets.logits_net())], cv=2), 100),
            "found StackingClassifier",
        ),
        (
            nets.fitted(BaggingClassifier(nets.logits_net(), n_estimators=2)),
            "found BaggingClassifier",
        ),
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
