"""The sampler's conventions: classifiers that it takes, labelled samples, errors."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from modAL.models import ActiveLearner as ModALActiveLearner
from modAL.models import Committee, DeepActiveLearner
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler, StandardScaler
from sklearn.utils._param_validation import InvalidParameterError
from torch import Tensor

from skfishermask import FisherMaskSampler, fisher_mask_sampling
from skfishermask.modal import ActiveLearner
from tests import nets
from tests.nets import SMALL

X, Y = nets.digits()
X_LABELED, Y_LABELED, X_POOL = X[:60], Y[:60], X[60:160]


def counting(strategy: Callable, calls: list) -> Callable:
    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return strategy(*args, **kwargs)

    return counted


@pytest.mark.parametrize(
    ("n_instances", "cls", "form"),
    [
        (1, ModALActiveLearner, "function"),
        (2, ModALActiveLearner, "object"),  # modAL takes two bare indices for indices and metrics
        (2, ModALActiveLearner, "function"),
        (3, ModALActiveLearner, "object"),
        (1, ActiveLearner, "object"),
        (2, ActiveLearner, "function"),
        (3, ActiveLearner, "object"),
    ],
)
def test_modal_learners_get_as_many_distinct_samples_from_one_call(
    n_instances: int, cls: type, form: str
) -> None:
    strategy = (
        FisherMaskSampler(**SMALL) if form == "object" else partial(fisher_mask_sampling, **SMALL)
    )
    calls: list = []
    net, pool = nets.logits_net(max_epochs=2), X_POOL[:40]
    learner = cls(net, counting(strategy, calls), X_LABELED, Y_LABELED)
    indices, instances = learner.query(pool, n_instances=n_instances)
    assert len(calls) == 1
    assert indices.shape == (n_instances,)
    assert len(set(indices.tolist())) == n_instances
    np.testing.assert_array_equal(instances, pool[indices])
    *_, gains = learner.query(pool, n_instances=n_instances, return_metrics=True)
    assert gains.shape == (n_instances,)
    assert (gains > 0).all()


def test_every_way_to_ask_chooses_the_same(net: Any) -> None:
    sampler, pool = FisherMaskSampler(**SMALL), X_POOL[:80]
    expected, gains = sampler(net, pool, 10, X_labeled=X_LABELED)
    assert expected.dtype == np.int64
    assert gains.dtype == np.float64

    def ask(classifier: Any, **more: Any) -> list[int]:
        return FisherMaskSampler(**SMALL)(classifier, pool, 10, **more)[0].tolist()

    learner = ActiveLearner(net, sampler)
    learner.X_training = X_LABELED
    search = GridSearchCV(net, {}, cv=2)
    search.best_estimator_ = net
    deep = DeepActiveLearner(clone(net), sampler)
    deep.estimator = net
    assert ask(learner) == expected.tolist()
    assert ask(search, X_labeled=X_LABELED) == expected.tolist()
    assert ask(make_pipeline(net), X_labeled=X_LABELED) == expected.tolist()
    assert ask(deep, X_labeled=X_LABELED) == expected.tolist()
    assert ask(deep) == ask(net)
    assert ask(net) != expected.tolist()  # The labelled samples matter.
    by_function = fisher_mask_sampling(net, pool, 10, X_labeled=X_LABELED, **SMALL)
    assert by_function[0].tolist() == expected.tolist()
    np.testing.assert_array_equal(by_function[1], gains)


def test_a_pipeline_transforms_pool_and_training_data() -> None:
    learner = ActiveLearner(
        make_pipeline(MinMaxScaler(), nets.logits_net()),
        FisherMaskSampler(**SMALL),
        X_LABELED,
        Y_LABELED,
    )
    indices, instances = learner.query(X_POOL, n_instances=5)
    scaler, inner = learner.estimator[0], learner.estimator[-1]
    expected, _ = FisherMaskSampler(**SMALL)(
        inner, scaler.transform(X_POOL), 5, X_labeled=scaler.transform(X_LABELED)
    )
    assert indices.tolist() == expected.tolist()
    np.testing.assert_array_equal(instances, X_POOL[indices])  # As the user gave them.


@pytest.mark.parametrize("make", [nets.probabilities_net, nets.binary_net])
def test_other_output_conventions(make: Any) -> None:
    net = nets.fitted(make())
    sampler = FisherMaskSampler(mask_fraction=80, n_directions=None, random_state=0)
    indices, gains = sampler(net, X_POOL, 8, X_labeled=X_LABELED)
    assert len(set(indices.tolist())) == 8
    assert (gains > 0).all()
    assert sampler.query_info_["n_directions"] == (9 if make is nets.probabilities_net else 1)


def test_probabilities_choose_as_logits_do(net: Any) -> None:
    same = nets.probabilities_net().initialize()
    same.module_.load_state_dict(net.module_.state_dict())
    with_logits, _ = FisherMaskSampler(**SMALL)(net, X_POOL, 10)
    with_probabilities, _ = FisherMaskSampler(**SMALL)(same, X_POOL, 10)
    assert with_logits.tolist() == with_probabilities.tolist()


@pytest.mark.parametrize(
    ("n_instances", "message"),
    [
        (0, "between 1 and the 100 samples of the pool, got 0"),
        (-3, "got -3"),
        (101, "got 101"),
        (1.0, "must be an int, got 1.0"),
        (True, "must be an int, got True"),
        ("5", "must be an int, got '5'"),
    ],
)
def test_wrong_n_instances(net: Any, n_instances: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FisherMaskSampler()(net, X_POOL, n_instances)


def test_numpy_integers_are_integers(net: Any) -> None:
    assert len(FisherMaskSampler(**SMALL)(net, X_POOL, np.int64(2))[0]) == 2


@pytest.mark.parametrize(
    ("pool", "options", "kind", "message"),
    [
        (X_POOL[:0], {}, ValueError, "empty"),
        (X_POOL, {"max_candidates": 2}, ValueError, "fewer candidates than n_instances=3"),
        (
            X_POOL * np.float32("nan"),
            {},
            ValueError,
            "X_pool contains NaN .* first in row 0",
        ),
        (X_POOL, {"mask": "best"}, InvalidParameterError, "'mask' parameter"),
        (X_POOL, {"mask_fraction": 1.5}, InvalidParameterError, "'mask_fraction' parameter"),
        (X_POOL, {"n_directions": 0}, InvalidParameterError, "'n_directions' parameter"),
        (X_POOL, {"oversample": 0.5}, InvalidParameterError, "'oversample' parameter"),
        (X_POOL, {"regularization": 0}, InvalidParameterError, "'regularization' parameter"),
        (X_POOL, {"memory_share": 0.0}, InvalidParameterError, "'memory_share' parameter"),
        (X_POOL, {"memory_share": 1.5}, InvalidParameterError, "'memory_share' parameter"),
        (X_POOL, {"scratch_folder": 3}, InvalidParameterError, "'scratch_folder' parameter"),
        (X_POOL, {"scratch_folder": "no/where"}, ValueError, "existing folder, got 'no/where'"),
        (X_POOL, {"random_state": "x"}, InvalidParameterError, "'random_state' parameter"),
        (X_POOL, {"mask_fraction": 5000}, ValueError, "between 1 and the 910 parameters"),
    ],
)
def test_errors(
    net: Any, pool: np.ndarray, options: dict, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        FisherMaskSampler(**options)(net, pool, 3)


def test_a_folder_that_is_read_only_is_refused_before_the_work(
    net: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"scratch_folder must be an existing folder, got .*file"):
        FisherMaskSampler(scratch_folder=tmp_path / "file")(net, X_POOL, 3)
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(ValueError, match="scratch_folder must be a folder to write to, got "):
        FisherMaskSampler(scratch_folder=tmp_path)(net, X_POOL, 3)


@pytest.mark.parametrize("more", [{}, {"coverage_share": 0.4}, {"target": "identity"}], ids=str)
def test_a_regularization_below_rounding_is_told_as_the_users_parameter(
    net: Any, more: dict[str, Any]
) -> None:
    asked = FisherMaskSampler(**SMALL | {"regularization": 1e-30} | more)
    with pytest.raises(ValueError, match=r"regularization=1e-30 is too small .* labelled samples"):
        asked(net, X_POOL, 5, X_labeled=X_LABELED[:5])


def test_not_fitted() -> None:
    with pytest.raises(NotFittedError):
        FisherMaskSampler()(nets.logits_net(), X_POOL, 3)


def test_no_trace_after_a_query_that_is_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    net = nets.fitted(nets.logits_net())
    net.module_.train()
    state = [p.detach().clone() for p in net.module_.parameters()]
    forward, calls = net.module_.forward, []

    def interrupted(x: Tensor) -> Tensor:
        calls.append(len(x))
        if len(calls) == 12:
            raise KeyboardInterrupt
        return forward(x)

    net.module_.forward = interrupted
    random_state = torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt):
        FisherMaskSampler(**SMALL)(net, X_POOL, 3)
    assert net.module_.training
    assert all(p.requires_grad for p in net.module_.parameters())
    assert all(map(torch.equal, state, net.module_.parameters()))
    assert not any(m._forward_hooks for m in net.module_.modules())
    assert torch.equal(random_state, torch.get_rng_state())


def test_parameters_are_plain_scikit_learn_parameters() -> None:
    sampler = FisherMaskSampler(oversample=2.0, mask="output_layer")
    copy = clone(sampler)
    assert copy is not sampler
    assert copy.get_params() == sampler.get_params()
    assert repr(sampler) == "FisherMaskSampler(mask='output_layer', oversample=2.0)"


def labels_are_known(sampler: FisherMaskSampler) -> int:
    return sampler.query_info_["n_labeled"]


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "inside a pipeline"])
def test_a_fitted_sampler_knows_its_labelled_samples(wrapped: bool) -> None:
    sampler = FisherMaskSampler(nets.logits_net(), **SMALL)
    fitted: Any = make_pipeline(StandardScaler(), sampler) if wrapped else sampler
    fitted.fit(X_LABELED, Y_LABELED)
    strategy = FisherMaskSampler(**SMALL)
    found, gains = strategy(fitted, X_POOL, 8)
    assert labels_are_known(strategy) == 60
    expected, expected_gains = strategy(fitted, X_POOL, 8, X_labeled=X_LABELED)
    assert found.tolist() == expected.tolist()
    np.testing.assert_allclose(gains, expected_gains, rtol=1e-6)


def test_query_takes_the_samples_of_fit_unless_others_are_given() -> None:
    sampler = FisherMaskSampler(nets.logits_net(), **SMALL).fit(X_LABELED, Y_LABELED)
    indices, _ = sampler.query(X_POOL, 8)
    assert labels_are_known(sampler) == 60
    assert indices.tolist() == sampler.query(X_POOL, 8, X_labeled=X_LABELED)[0].tolist()
    sampler.query(X_POOL, 8, X_labeled=X_LABELED[:7])
    assert labels_are_known(sampler) == 7


@pytest.mark.parametrize("empty", [X[:0], [], torch.as_tensor(X[:0]), pd.DataFrame(X[:0])])
def test_empty_labelled_samples_are_none(empty: Any) -> None:
    sampler = FisherMaskSampler(nets.logits_net(), **SMALL).fit(X_LABELED, Y_LABELED)
    indices, _ = sampler.query(X_POOL, 8, X_labeled=empty)
    assert labels_are_known(sampler) == 0
    expected, _ = FisherMaskSampler(**SMALL)(sampler.estimator_, X_POOL, 8)
    assert indices.tolist() == expected.tolist()


def test_a_committee_is_refused_and_asked_through_a_member() -> None:
    fishermask = FisherMaskSampler(**SMALL)
    learners = [ActiveLearner(nets.logits_net(lr=lr), fishermask) for lr in (0.1, 0.3)]

    def ask_first(committee: Committee, X_pool: Any, **more: Any) -> Any:
        return fishermask(committee.learner_list[0], X_pool, **more)

    committee = Committee(learners, ask_first)
    first, X_first = committee.query(X[:100], n_instances=30)
    assert first.tolist() == FisherMaskSampler(**SMALL).query(X[:100], 30)[0].tolist()
    committee.teach(X_first, Y[:100][first])
    chosen, _ = committee.query(X_POOL, n_instances=3)
    expected, _ = learners[0].query(X_POOL, n_instances=3)
    assert chosen.tolist() == expected.tolist()
    with pytest.raises(TypeError, match=r"found Committee.*committee\.learner_list\[0\]"):
        Committee(learners, fishermask).query(X_POOL, n_instances=3)
