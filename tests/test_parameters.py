"""The parameters of the method: declared and described once, frozen in a query."""

from __future__ import annotations

import inspect
import re
from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from skfishermask import FisherMaskSampler
from skfishermask.parameters import MethodParameters, Settings, check_parameters


def described(cls: Any) -> dict[str, str]:
    """Read the parameters and their defaults off a docstring."""
    text = inspect.getdoc(cls).split("\nParameters\n")[1].split("\nAttributes\n")[0]
    return dict(re.findall(r"^(\w+) : .*?, default=(.*)$", text, re.MULTILINE))


def test_parameters_are_described_with_their_defaults() -> None:
    parameters = inspect.signature(FisherMaskSampler).parameters
    found = described(FisherMaskSampler)
    assert found.keys() == parameters.keys()
    for name, default in found.items():
        assert default.replace('"', "'") == repr(parameters[name].default), name


def test_scikit_activeml_s_strategy_has_the_same_parameters() -> None:
    pytest.importorskip("skactiveml", reason="scikit-activeml is not installed")
    from skfishermask import activeml

    found, ours = described(activeml.FisherMask), described(FisherMaskSampler)
    assert found.keys() == activeml.FisherMask().get_params().keys()
    assert found.keys() - ours.keys() == {"missing_label", "net_batch_size", "target_type"}
    assert {name: found[name] for name in described(MethodParameters)} == described(
        MethodParameters
    )
    with pytest.raises(ValueError, match="'mask' parameter of FisherMask must be"):
        check_parameters(activeml.FisherMask(mask="best"))


def test_settings_stay_as_they_are() -> None:
    sampler = FisherMaskSampler(mask="all")
    settings = Settings(sampler, 7, 0)
    sampler.mask = "global"
    assert (settings.mask, settings.batch_size) == ("all", 7)
    with pytest.raises(FrozenInstanceError):
        settings.mask = "global"
