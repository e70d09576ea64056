"""What the package uses of others although it is not public: does it still work?"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from numbers import Real
from typing import Any

import pytest
import torch

from tests import nets


def refuses_a_parameter(ours: Any) -> bool:
    constraint = {"x": [ours.Interval(Real, 0, 1, closed="both"), ours.StrOptions({"auto"})]}
    with pytest.raises(ValueError, match="The 'x' parameter of Name must be"):
        ours.validate_parameter_constraints(constraint, {"x": 2.0}, "Name")
    return ours.HasMethods("fit").is_satisfied_by(nets.logits_net())


def finds_the_compiled_module(ours: Any) -> bool:
    module = nets.mlp()
    return ours.as_written(torch.compile(module, backend="eager")) is module


def finds_the_criterion(ours: Any) -> bool:
    return ours.criteria_of(nets.logits_net().initialize()) == ["criterion_"]


def finds_the_softmax(ours: Any) -> bool:
    net = nets.logits_net().initialize()
    p = ours.predict_nonlinearity_of(net)(torch.ones(2, 4))
    return torch.equal(p, torch.full((2, 4), 0.25))


def finds_client_and_limit(ours: Any) -> bool:
    distributed = pytest.importorskip("distributed", reason="needs Dask, which is an extra")
    array = import_module("dask.array").ones(3)
    options = {"n_workers": 1, "threads_per_worker": 1, "dashboard_address": ":0"}
    with distributed.Client(processes=False, memory_limit="1GB", **options) as client:
        limits = client.run(lambda dask_worker: ours.memory_limit_of(dask_worker))
        found = ours.client_that_computes(array) is client
    return found and list(limits.values()) == [10**9]


@pytest.mark.parametrize(
    ("package", "works"),
    [
        ("scikit-learn", refuses_a_parameter),
        ("torch", finds_the_compiled_module),
        ("skorch", finds_the_criterion),
        ("skorch", finds_the_softmax),
        ("distributed", finds_client_and_limit),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_what_is_not_public_still_works(package: str, works: Callable[[Any], bool]) -> None:
    try:
        found = works(import_module("skfishermask.compat"))
    except (ImportError, AttributeError, TypeError) as error:
        pytest.fail(f"{package} {version(package)} took it away: {error}")
    assert found, f"{package} {version(package)} does it otherwise"
