"""What recipes take and refuse: every interval and none, weights from 0 to 1."""

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
    with pytest.raises(ParameterError, match=r"Policy.*interval"):
        getattr(policies, name)(1024, interval=interval)


@pytest.mark.parametrize("name", ["gkv", "rkv"])
@pytest.mark.parametrize("importance", [2.0, -1, "half"])
def test_an_importance_beyond_all_is_refused(name: str, importance: object) -> None:
    """Redundancy would have a weight below 0: what repeats others would stay."""
    with pytest.raises(ParameterError, match=rf"{name}\(importance="):
        getattr(policies, name)(64, importance=importance)
    for whole in (0, 1):
        getattr(policies, name)(1024, importance=whole).plan(ModelSpec(2))
