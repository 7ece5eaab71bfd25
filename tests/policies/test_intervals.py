"""Every recipe takes every interval, and none: what it derives of one follows."""

from __future__ import annotations

import inspect

import pytest

from kvpolicy import ModelSpec, ParameterError, policies
from tests.docs.test_zoo_pages import CALLS

RECIPES = [name for name in policies.__all__ if name not in CALLS]


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("interval", [None, 200])
def test_any_interval_is_planned(name: str, interval: int | None) -> None:
    recipe = getattr(policies, name)
    assert "interval" in inspect.signature(recipe).parameters
    policy = recipe(1024, interval=interval)
    assert policy.interval == interval
    policy.plan(ModelSpec(4, max_new_tokens=8))


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("interval", [0, "64"])
def test_what_is_no_interval_is_refused(name: str, interval: object) -> None:
    with pytest.raises(ParameterError, match="Policy.*interval"):
        getattr(policies, name)(1024, interval=interval)
