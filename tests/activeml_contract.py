"""What scikit-activeml asks of a pool query strategy, as its guide for contributors describes it.

The class has the name and the entry points of the template in that project's tests, which no
release contains, so that a test module written for that project runs here as it is. The checks are
our own.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from copy import deepcopy
from typing import Any, ClassVar

import numpy as np
import pytest
from skactiveml.utils import is_labeled, unlabeled_indices
from sklearn.base import clone
from sklearn.naive_bayes import GaussianNB

EITHER = (TypeError, ValueError)
# Public state that a query which fails must not leave behind.
STATE = ("n_features_in_", "missing_label_", "random_state_")


class Dummy:
    """No value that any parameter takes."""


def assert_no_query_state(case: Any, strategy: Any) -> None:
    assert [name for name in STATE if hasattr(strategy, name)] == []


class TemplateSingleAnnotatorPoolQueryStrategy:
    """Checks for a strategy of classification; a subclass has a test for each parameter."""

    # The missing label, two classes and the dtype.
    kinds_of_labels: ClassVar[list[tuple[Any, list[Any], type]]] = [
        (np.nan, [1.0, 2.0], float),
        (0, [1, 2], int),
        (None, ["A", "B"], object),
        ("", ["A", "B"], str),
        (None, [1, 2], object),
    ]

    # Also where the base class has found a wrong argument, after it has stored others.
    leaves_no_state = False

    def setUp(
        self,
        qs_class: Any,
        init_default_params: dict[str, Any],
        query_default_params_clf: dict[str, Any],
    ) -> None:
        self.qs_class = qs_class
        self.init_default_params = {"missing_label": np.nan, "random_state": 42}
        self.init_default_params |= init_default_params
        self.query_default_params_clf = query_default_params_clf

    def make(self, **more: Any) -> Any:
        return self.qs_class(**deepcopy(self.init_default_params) | more)

    def asked(self, **more: Any) -> dict[str, Any]:
        return deepcopy(self.query_default_params_clf) | more

    @property
    def missing_label(self) -> Any:
        return self.init_default_params["missing_label"]

    @property
    def unlabeled(self) -> np.ndarray:
        return unlabeled_indices(self.query_default_params_clf["y"], self.missing_label)

    def _test_param(self, where: str, name: str, cases: list[tuple[Any, Any]], **more: Any) -> None:
        for value, error in cases:
            init, query = ({name: value}, {}) if where == "init" else ({}, {name: value})
            strategy, asked = self.make(**more | init), self.asked(**query)
            if error is None:
                strategy.query(**asked)
            else:
                with pytest.raises(error):
                    strategy.query(**asked)
                if self.leaves_no_state or name in ("target_type", "clf", "fit_clf"):
                    assert_no_query_state(self, strategy)

    # Parameters

    def test_param_test_availability(self) -> None:
        for method, kind in ((self.qs_class.__init__, "init"), (self.qs_class.query, "query")):
            for name in set(inspect.signature(method).parameters) - {"self"}:
                assert hasattr(self, f"test_{kind}_param_{name}"), name

    def test_init_param_test_assignments(self) -> None:
        for name in set(inspect.signature(self.qs_class.__init__).parameters) - {"self"}:
            value = Dummy()
            assert getattr(self.make(**{name: value}), name) is value

    def test_init_param_random_state(self, test_cases: Any = ()) -> None:
        cases = [*test_cases, (np.nan, ValueError), ("state", ValueError), (1, None)]
        self._test_param("init", "random_state", cases)

    def test_init_param_missing_label(self, test_cases: Any = ()) -> None:
        cases = [*test_cases, (self.missing_label, None), (Dummy, TypeError)]
        self._test_param("init", "missing_label", cases)

    def test_init_param_target_type(self) -> None:
        strategy = self.make()
        assert strategy.target_type == "auto"
        assert isinstance(strategy._target_capabilities, frozenset)
        assert strategy._target_capabilities
        assert "multi-output" not in {target for _, target, _ in strategy._target_capabilities}
        self._test_param("init", "target_type", [("invalid", ValueError), ("single-output", None)])

    def test_query_param_X(self, test_cases: Any = ()) -> None:
        X = self.query_default_params_clf["X"]
        cases = [("string", EITHER), (Dummy, EITHER), (X, None), (np.vstack([X, X]), ValueError)]
        self._test_param("query", "X", [*test_cases, *cases])

    def test_query_param_y(self, test_cases: Any = ()) -> None:
        y = self.query_default_params_clf["y"]
        cases = [(np.nan, TypeError), (Dummy, TypeError), (y, None)]
        self._test_param("query", "y", [*test_cases, *cases, (np.vstack([y, y]), ValueError)])
        for missing, classes, dtype in self.kinds_of_labels:
            labels = np.full(len(y), missing, dtype=dtype)
            labels = labels.astype("U1") if dtype is str else labels
            labels[:2] = classes
            clf = clone(self.query_default_params_clf["clf"])
            clf.set_params(missing_label=missing, classes=classes)
            self.make(missing_label=missing).query(**self.asked(y=labels, clf=clf))

    def test_query_param_candidates(self, test_cases: Any = ()) -> None:
        cases = [(np.nan, ValueError), (Dummy, TypeError), ([self.unlabeled[0]], None)]
        self._test_param("query", "candidates", [*test_cases, *cases])

    def test_query_param_sample_weight(self, test_cases: Any = ()) -> None:
        n = len(self.query_default_params_clf["y"])
        cases = [(np.nan, EITHER), (Dummy, EITHER), (None, None)]
        cases += [(np.ones(n), None), (np.ones(n + 1), ValueError)]
        self._test_param("query", "sample_weight", [*test_cases, *cases])

    def test_query_param_batch_size(self, test_cases: Any = ()) -> None:
        cases = [(0, ValueError), (1.2, TypeError), (1, None)]
        self._test_param("query", "batch_size", [*test_cases, *cases])

    def test_query_param_return_utilities(self, test_cases: Any = ()) -> None:
        cases = [("string", TypeError), (Dummy, TypeError), (True, None)]
        self._test_param("query", "return_utilities", [*test_cases, *cases])

    def test_query_param_fit_clf(self, test_cases: Any = ()) -> None:
        assert inspect.signature(self.qs_class.query).parameters["fit_clf"].default is True
        cases = [(np.nan, TypeError), ("state", TypeError)]
        self._test_param("query", "fit_clf", [*test_cases, *cases])
        for fit_clf in (True, False):
            clf = clone(self.query_default_params_clf["clf"])
            asked = self.asked()
            if not fit_clf:
                clf.fit(asked["X"], asked["y"])
            before = described(clf)
            self.make().query(**asked | {"clf": clf, "fit_clf": fit_clf})
            assert described(clf) == before

    def test_query_param_clf(self, test_cases: Any = ()) -> None:
        wrong = [(value, TypeError) for value in (np.nan, "state", Dummy(), GaussianNB())]
        self._test_param("query", "clf", [*test_cases, *wrong])

    # Queries

    def test_query_reproducibility(self) -> None:
        state = {"random_state": np.random.RandomState(0)}
        first, second = self.make(**state), self.make(**state)
        asked = self.asked(return_utilities=True)
        answers = [strategy.query(**asked) for strategy in (first, first, second)]
        for indices, utilities in answers[1:]:
            np.testing.assert_array_equal(indices, answers[0][0])
            np.testing.assert_allclose(utilities, answers[0][1])

    def test_query_al_cycles(self) -> None:
        y_true = np.array(self.query_default_params_clf["y"])
        is_known = is_labeled(y_true, self.missing_label)
        y_true[~is_known] = y_true[is_known][0]
        for n_labeled in (0, 1, int((~is_known).sum()) - 1):
            y = np.full_like(y_true, self.missing_label)
            y[:n_labeled] = y_true[:n_labeled]
            [index] = self.make().query(**self.asked(y=y))
            assert not is_labeled(y, self.missing_label)[index]

    def test_query_batch_variation(self) -> None:
        n = len(self.unlabeled)
        size = min(5, n)
        indices, utilities = self.make().query(**self.asked(batch_size=size, return_utilities=True))
        n_samples = len(self.query_default_params_clf["X"])
        assert len(set(indices.tolist())) == size > 1
        assert utilities.shape == (size, n_samples)
        missing = np.isnan(utilities).sum(1)
        assert missing.tolist() == [n_samples - n + i for i in range(size)]
        with pytest.warns(UserWarning, match="batch_size"):
            indices = self.make().query(**self.asked(batch_size=n + 1))
        assert sorted(indices) == self.unlabeled.tolist()

    def test_query_candidate_variation(self) -> None:
        X = self.query_default_params_clf["X"]

        def utilities(candidates: Any) -> np.ndarray:
            found: np.ndarray = self.make().query(
                **self.asked(candidates=candidates, return_utilities=True)
            )[1]
            return found

        of_all, one = utilities(None), self.unlabeled[:1]
        np.testing.assert_allclose(utilities(self.unlabeled), of_all)
        np.testing.assert_allclose(utilities(X[self.unlabeled])[0], of_all[0][self.unlabeled])
        assert np.flatnonzero(~np.isnan(utilities(one)[0])).tolist() == one.tolist()

    def test_query_exhausted_candidate_pool(self) -> None:
        X, y = (self.query_default_params_clf[name] for name in ("X", "y"))
        known = np.where(is_labeled(y, self.missing_label), y, y[~np.isnan(y)][0])
        asked = self.asked(y=known, return_utilities=True)
        with pytest.warns(UserWarning, match="batch_size|exhausted"):
            indices, utilities = self.make().query(**asked)
        assert indices.shape == (0,)
        assert np.issubdtype(indices.dtype, np.integer)
        assert utilities.shape == (0, len(X))


def described(estimator: Any) -> list[str]:
    """Describe all attributes of an estimator, those of estimators inside included."""
    return [*_described(estimator, {})]


def _described(value: Any, seen: dict[int, Any]) -> Iterator[str]:
    if hasattr(value, "state_dict") and not isinstance(value, type):
        value = value.state_dict()
    if id(value) in seen:
        return
    seen[id(value)] = value  # Kept: a new value may get the number of one that is gone.
    if isinstance(value, dict):
        for name, part in sorted(value.items(), key=lambda item: str(item[0])):
            yield f"{name}:"
            yield from _described(part, seen)
    elif hasattr(value, "get_params") and not isinstance(value, type):
        yield from _described(vars(value), seen)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield repr(value)
