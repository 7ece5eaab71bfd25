"""Budgets that differ over layers: sums are exact, and they never grow from a layer to the next."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpolicy import Allocator, BudgetError, ModelSpec, PerLayer, Policy, Pyramid, TopK, Uniform


def line(budget: int, beta: float, layers: int, recent: int) -> list[Fraction]:
    """Return the shares of PyramidKV: from ``max`` down to ``min`` in equal steps."""
    least = (budget - recent) / Fraction(beta)
    most = 2 * (budget - recent) - least
    return [recent + most - index * (most - least) / (layers - 1) for index in range(layers)]


@given(st.integers(1, 4096), st.integers(0, 300), st.integers(1, 90), st.sampled_from((1, 1.5, 2, 7, 20, 20.0, 1000)))
def test_a_pyramid_is_the_published_line_in_whole_numbers(shared: int, recent: int, layers: int, beta: float) -> None:
    budget = shared + recent
    found = Pyramid(budget, beta).budgets(layers, recent)
    whole = [one for one in found if isinstance(one, int)]
    assert len(whole) == layers
    assert sum(whole) == layers * budget  # what a uniform budget keeps
    assert all(before >= after for before, after in itertools.pairwise(whole))
    if layers > 1:
        exact = line(budget, beta, layers, recent)
        assert all(abs(one - share) < 1 for one, share in zip(whole, exact, strict=True))
        rounded_up = [index for index, one in enumerate(whole) if one > exact[index]]
        left = [index for index, one in enumerate(whole) if one < exact[index]]
        remainder = {index: exact[index] % 1 for index in (*rounded_up, *left)}
        for up in rounded_up:
            for down in left:
                assert (remainder[up], -up) > (remainder[down], -down)


def test_the_official_numbers_where_they_are_whole() -> None:
    # (C - w) // 20 = 100, 2 (C - w) - 100 = 3900 and a step of (3900 - 100) // 19 = 200
    assert Pyramid(2064).budgets(20, 64) == tuple(64 + 3900 - 200 * index for index in range(20))


@pytest.mark.parametrize("layers", [1, 2, 31])
def test_a_pyramid_that_is_not_steep_is_uniform(layers: int) -> None:
    assert Pyramid(1000, 1).budgets(layers, 64) == Uniform(1000).budgets(layers, 64)


def test_one_layer_has_the_budget() -> None:
    assert Pyramid(1000).budgets(1, 64) == (1000,)


@pytest.mark.parametrize(
    ("allocator", "layers", "message"),
    [
        (PerLayer((96, 80)), 3, r"PerLayer\(\(96, 80\)\) names 2 layers, and the model has 3 that may evict"),
        (PerLayer((96, None, 64)), 3, r"layer 2 of the 3 that may evict: a budget of 64 is not larger than recent=64"),
        (Pyramid(70), 4, r"layer 3 of the 4 that may evict: a budget of 64 is not larger than recent=64"),
        (Pyramid(64), 4, r"Pyramid\(64\) shares out what the last tokens leave, and recent=64 leaves nothing of 64"),
        (Uniform(64), 4, r"^a budget of 64 is not larger than recent=64"),
    ],
    ids=repr,
)
def test_budgets_that_do_not_fit_name_the_layer(allocator: Allocator, layers: int, message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        Policy(TopK(allocator)).plan(ModelSpec(layers))


def test_a_plan_leaves_layers_alone() -> None:
    plan = Policy(TopK(PerLayer([96, None, 80])), interval=8).plan(ModelSpec(3))
    assert [layer and (layer.budget, layer.capacity) for layer in plan.layers] == [(96, 104), None, (80, 88)]
