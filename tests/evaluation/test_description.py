"""What tells strategies, estimators and data of a run from others."""

from __future__ import annotations

import functools
import importlib
import json
import os
import re
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from modAL.uncertainty import entropy_sampling
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, make_scorer
from sklearn.pipeline import make_pipeline
from torch import nn

from skfishermask import FisherMaskSampler
from skfishermask.evaluation.description import describe, fingerprint
from tests.nets import logits_net

THRESHOLD = 0.5


def closure(value: Any) -> Callable[..., Any]:
    def strategy(learner: Any, X_pool: Any, n_instances: int = 1) -> Any:
        return value

    return strategy


def default(value: Any) -> Callable[..., Any]:
    def strategy(learner: Any, X_pool: Any, n_instances: int = 1, *, keyword: Any = value) -> Any:
        return keyword

    return strategy


def of_a_global(value: Any) -> Callable[..., Any]:
    names = {"THRESHOLD": value}
    exec("def strategy(learner, X_pool): return lambda: THRESHOLD", names)
    return names["strategy"]


def of_a_function(value: Any) -> Callable[..., Any]:
    names: dict[str, Any] = {}
    exec(f"def inner(): return {value!r}\ndef strategy(): return inner()", names)
    return names["strategy"]


class Share:
    def __init__(self, value: Any) -> None:
        self.value = value

    def __call__(self, learner: Any, X_pool: Any, n_instances: int = 1) -> Any:
        return self.value

    def query(self, learner: Any, X_pool: Any, n_instances: int = 1) -> Any:
        return self.value


class Slotted:
    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


@dataclass(frozen=True)
class Data:
    value: Any


def redefined(value: Any) -> Any:
    class Strategy:
        @staticmethod
        def inner() -> Any:
            return value

        def __call__(self, learner: Any, X_pool: Any, n_instances: int = 1) -> Any:
            return self.inner()

    return Strategy()


def of_a_class(value: Any) -> Any:
    return type("Strategy", (), {"share": value})()


def attribute(value: Any) -> Callable[..., Any]:
    strategy = closure(0)
    strategy.share = value  # type: ignore[attr-defined]
    return strategy


def cycle(value: Any) -> Any:
    made = Share(value)
    made.itself = made  # type: ignore[attr-defined]
    return made


def module(value: Any) -> nn.Module:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.5))
    made[1].p = value
    return made


MAKERS: list[Callable[[Any], Any]] = [
    closure,
    default,
    of_a_global,
    of_a_function,
    Share,
    Slotted,
    Data,
    redefined,
    of_a_class,
    attribute,
    cycle,
    module,
    lambda value: Share(value).query,
    lambda value: lambda learner, X_pool: value,
    lambda value: functools.partial(closure(value), n_instances=3),
    lambda value: functools.partial(closure(0), keyword=value),
    lambda value: functools.wraps(closure(value))(lambda *args: closure(value)(*args)),
    lambda value: FisherMaskSampler(regularization=value),
    lambda value: make_pipeline(SimpleImputer(fill_value=value), LogisticRegression()),
    lambda value: make_scorer(f1_score, labels=[value]),
    lambda value: {"a": [value, {1}]},
    lambda value: np.array([[1.0, value]]),
    lambda value: torch.tensor([1.0, value], dtype=torch.bfloat16),
    lambda value: pd.DataFrame({"a": [value]}),
    lambda value: logits_net(lr=value),
    lambda value: closure(np.random.default_rng(int(100 * value))),
]


@pytest.mark.parametrize("make", MAKERS, ids=range(len(MAKERS)))
def test_code_and_values_tell_apart(make: Callable[[Any], Any]) -> None:
    one, again, other = (json.dumps(describe(make(value))) for value in (0.25, 0.25, 0.5))
    assert one == again
    assert one != other
    assert not re.search(r"0x[0-9a-f]{6}", one)


def test_code_tells_apart() -> None:
    bodies = ["x + 1", "x + 2", "x - 1", "-x", "max(x)", "min(x)", "x.max()", "x.min()", "x[0]"]
    made = [json.dumps(describe(eval(f"lambda x: {body}"))) for body in bodies]
    assert len(set(made)) == len(bodies)
    assert made[0] == json.dumps(describe(eval("lambda x:  x  +  1")))


@pytest.mark.parametrize("value", [1, 1.0, True, "1", b"1", None, [1], (1,), {1: 1}, {"1": 1}])
def test_kinds_of_values_tell_apart(value: Any) -> None:
    others = [1, 1.0, True, "1", b"1", None, [1], (1,), {1: 1}, {"1": 1}, np.int64(1), np.ones(1)]
    found = json.dumps(describe(closure(value)))
    assert sum(found == json.dumps(describe(closure(other))) for other in others) == 1


def test_what_is_read_back_is_equal() -> None:
    """Also NaN, which differs from itself."""
    for value in (float("nan"), float("inf"), 0.1, "ü", 1 + 2j, range(3), frozenset({"b", "a"})):
        for thing in (SimpleImputer(missing_values=value), closure(value)):
            found = describe(thing)
            assert json.loads(json.dumps(found)) == found == describe(thing)


def test_installed_functions_count_by_name() -> None:
    assert "entropy_sampling" in str(describe(entropy_sampling))
    assert describe(np.exp) != describe(np.log)
    assert describe(torch.float32) != describe(torch.float64)


def test_packages_of_any_environment_count_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An environment can be stacked upon another."""
    code = "import threading\nlock = threading.Lock()\ndef strategy(*args):\n    return lock\n"
    for name, folder in (("of_a_package", "lib/site-packages"), ("of_a_user", "own")):
        path = tmp_path / folder / f"{name}.py"
        path.parent.mkdir(parents=True)
        path.write_text(code)
        monkeypatch.syspath_prepend(path.parent)
    installed, own = map(importlib.import_module, ("of_a_package", "of_a_user"))
    assert "of_a_package.strategy" in str(describe(installed.strategy))
    with pytest.raises(TypeError, match="no value"):
        describe(own.strategy)


@pytest.mark.parametrize(
    "value", [threading.Lock(), (i for i in range(3)), sys.__stdin__], ids=type
)
def test_what_has_no_value_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match=r"tell query_strategy from any other, but .* no value"):
        describe(Share(value), "query_strategy")


def test_the_same_in_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the order of sets and the addresses are others."""
    (tmp_path / "described.py").write_text(
        textwrap.dedent(
            """
            import numpy as np
            from skfishermask.evaluation.description import describe

            class Strategy:
                names = {"one", "two", "three", "four"}

                def __init__(self): self.values = frozenset({"a", "b", "c", "d"})

                def __call__(self, learner, X_pool, n_instances=1):
                    return len(X_pool) in {"x", "y", "z"} or helper(self) or np.exp(0)

            def helper(strategy): return strategy.values, {"u", "v", "w"}

            DESCRIPTION = describe(Strategy())
            """
        )
    )
    monkeypatch.syspath_prepend(tmp_path)
    expected = importlib.import_module("described").DESCRIPTION
    other_seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    elsewhere = subprocess.run(
        [sys.executable, "-c", "import described, json; print(json.dumps(described.DESCRIPTION))"],
        env={"PYTHONHASHSEED": other_seed, "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert json.loads(elsewhere) == expected


def test_every_row_of_an_array_in_memory_counts() -> None:
    X = np.random.default_rng(0).normal(size=(500, 3))
    Z = X.copy()
    Z[101, 1] += 1e-9
    assert fingerprint(X) == fingerprint(X.copy()) != fingerprint(Z)
    assert fingerprint(torch.as_tensor(X)) != fingerprint(torch.as_tensor(Z))
