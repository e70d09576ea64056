from __future__ import annotations

import inspect

import pytest

from skfishermask import FisherMaskSampler
from skfishermask.data import SampleRole


@pytest.mark.parametrize("role", SampleRole)
def test_a_role_has_an_argument_of_the_sampler_and_a_noun(role: SampleRole) -> None:
    assert role.argument in inspect.signature(FisherMaskSampler.__call__).parameters
    assert role.noun in {"pool", "labelled samples", "target samples"}
    assert [other for other in SampleRole if other.noun == role.noun] == [role]
