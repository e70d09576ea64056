"""The contribution to scikit-activeml: its own tests, and that it picks what this library picks.

No release of scikit-activeml has the helper for targets of its development version, nor the
template of its tests. The helper below and tests/activeml_contract.py stand for them.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.utils import check_array

from skfishermask import PUBLISHED, FisherMaskSampler, select_batch
from tests import nets

pytest.importorskip("skactiveml", reason="scikit-activeml is not installed")

from skactiveml.classifier import SklearnClassifier
from skactiveml.utils import check_equal_missing_label, check_type

from tests import activeml_contract

CONTRIBUTION = Path(__file__).parents[2] / "contrib" / "scikit_activeml"
POOL = CONTRIBUTION / "skactiveml" / "pool"


def resolve(
    strategy: Any,
    estimator: Any,
    X: Any,
    y: Any,
    *,
    fit_estimator: bool,
    sample_weight: Any,
    estimator_name: str,
    fit_name: str,
    estimator_types: tuple[type, ...],
) -> tuple[Any, Any]:
    """Fit and check a classifier of single-output targets, as the development version's does."""
    check_type(estimator, estimator_name, *estimator_types)
    check_equal_missing_label(estimator.missing_label, strategy.missing_label)
    check_type(fit_estimator, fit_name, bool)
    if strategy.target_type not in ("auto", "single-output"):
        raise ValueError("`target_type`")
    check_array(y, ensure_2d=False, ensure_all_finite="allow-nan", dtype=None)
    if fit_estimator:
        weights = () if sample_weight is None else (sample_weight,)
        estimator = clone(estimator).fit(X, y, *weights)
    return estimator, SimpleNamespace(target_type="single-output")


def loaded(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def contribution() -> tuple[Any, ModuleType]:
    """Load the strategy and its test module, with what no release has yet."""
    names = {
        "skactiveml.pool._target": {"_fit_and_resolve_estimator_target_spec": resolve},
        "skactiveml.tests": {},
        "skactiveml.tests.template_query_strategy": vars(activeml_contract),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, members in names.items():
            module = ModuleType(name)
            vars(module).update({k: v for k, v in members.items() if not k.startswith("__")})
            patch.setitem(sys.modules, name, module)
        found = loaded("skactiveml.pool._bait", POOL / "_bait.py").Bait

        class Bait(found):
            """With checks of 1.0, which do not know the type of the target."""

            def _validate_data(self, *args: Any, target_type: str, **more: Any) -> Any:
                return super()._validate_data(*args, **more)

            def _transform_candidates(self, *args: Any, target_type: str) -> Any:
                return super()._transform_candidates(*args)

        patch.setattr("skactiveml.pool.Bait", Bait, raising=False)
        return Bait, loaded("test_bait", POOL / "tests" / "test_bait.py")


Bait, theirs = contribution()
TestBait = theirs.TestBait
X, Y = (data[:150] for data in nets.digits())
X = X[:, [10, 20, 28, 36, 43]].astype("float64")
Y = Y % 3
N_LABELED = 30


@pytest.mark.parametrize("oversample", [1.0, 2.0])
@pytest.mark.parametrize("regularization", [0.01, 1.0])
def test_picks_are_those_of_select_batch(oversample: float, regularization: float) -> None:
    y = np.where(np.arange(len(X)) < N_LABELED, Y, -1)
    clf = SklearnClassifier(LogisticRegression(), classes=[0, 1, 2], missing_label=-1).fit(X, y)
    strategy = Bait(
        oversample=oversample, regularization=regularization, missing_label=-1, random_state=0
    )
    found, utilities = strategy.query(X, y, clf, batch_size=7, return_utilities=True)

    p, x = torch.as_tensor(clf.predict_proba(X)), torch.as_tensor(X)
    R = p.sqrt()[:, :, None] * (torch.eye(3) - p[:, None, :])
    V = torch.einsum("nrc,nj->nrcj", R, x).flatten(2)
    fisher, of_labeled = (
        torch.einsum("nri,nrj->ij", part, part) / len(part) for part in (V, V[:N_LABELED])
    )
    positions, gains = select_batch(
        V[N_LABELED:],
        7,
        fisher,
        fisher_labeled=of_labeled,
        n_labeled=N_LABELED,
        regularization=regularization,
        oversample=oversample,
    )
    assert found.tolist() == (positions + N_LABELED).tolist()
    if oversample == 1:  # else the gains are those before others were removed
        np.testing.assert_allclose(utilities[np.arange(7), found], gains, rtol=1e-6)


def test_picks_are_those_of_the_sampler_around_the_same_classifier() -> None:
    model = LogisticRegression(fit_intercept=False).fit(X[:N_LABELED], Y[:N_LABELED])
    bait = FisherMaskSampler(mask="output_layer", oversample=2.0, **PUBLISHED)
    expected, _ = bait(model, X[N_LABELED:], 5, X_labeled=X[:N_LABELED])
    y = np.where(np.arange(len(X)) < N_LABELED, Y, -1)
    clf = SklearnClassifier(model, classes=[0, 1, 2], missing_label=-1).fit(X, y)
    found = Bait(missing_label=-1, random_state=0).query(X, y, clf, batch_size=5)
    assert found.tolist() == (expected + N_LABELED).tolist()


def test_the_example_and_the_reference_go_together() -> None:
    folder = CONTRIBUTION / "docs"
    [example] = json.loads((folder / "examples/1-pool-classification/_bait.json").read_text())
    assert example["class"] == "Bait"
    assert example["init_qs"] == "Bait()"
    [reference] = example["refs"]
    assert f"{{{reference}," in (folder / "refs.bib.entry").read_text()
    assert {name for name in example["sequence"] if name.startswith("text")} <= example.keys()
