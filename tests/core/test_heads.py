"""How a layer's slots are shared over its heads, against a pool that is filled one slot at a time."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvpolicy import Adaptive, BudgetError, ModelSpec, ParameterError, PerHead, Policy, Scores, Sinks, TopK, ValueGuard
from kvpolicy.scores import Tier
from kvpolicy.testing.strategies import views
from kvpolicy.view import View


def shared(scores: Scores, view: View, row: int, budget: int, floor: float) -> list[int]:
    """Share a row's slots by hand: the floor of each head first, then the best of all heads."""
    _, heads, size = view.shape
    least = view.recent + math.floor((budget - view.recent) * floor + 1e-9)
    pool = []
    for head in range(heads):
        slots = [s for s in range(size) if int(view.positions[row, head, s]) >= 0]
        best = sorted(
            slots,
            key=lambda s: (scores.tier[row, head, s], scores.values[row, head, s], view.positions[row, head, s]),
            reverse=True,
        )
        pool += [(rank < least, head, s) for rank, s in enumerate(best)]

    def order(one: tuple[bool, int, int]) -> tuple[bool, int, float, int, int]:
        sure, head, s = one
        tier, value = int(scores.tier[row, head, s]), float(scores.values[row, head, s])
        position = int(view.positions[row, head, s])
        return (sure, 0, 0.0, 0, 0) if sure else (sure, tier, value, position, -head)

    pool.sort(key=order, reverse=True)
    kept = pool[: int(view.budget[row].sum())]
    return [sum(head == one[1] for one in kept) for head in range(heads)]


@given(st.data())
def test_it_is_what_a_pool_of_all_heads_gives(data: st.DataObject) -> None:
    view = data.draw(views())
    _, heads, _ = view.shape
    budget = data.draw(st.integers(view.recent + 1, view.recent + 9))
    floor = data.draw(st.sampled_from((0.0, 0.3, 0.5, 1.0)))
    view = _with_budget(view, budget)
    values = torch.randint(0, 4, view.shape, generator=torch.Generator().manual_seed(heads)).float()  # many are equal
    scores = Scores.of(view, values, weights=True)
    scores = scores.guard(view.candidates & (view.positions < 2), Tier.SINK)
    found = Adaptive(budget, floor=floor).share(scores, view)
    for row in range(view.shape[0]):
        if int(view.lengths[row].sum()) >= int(view.budget[row].sum()) and int(view.lengths[row].min()) >= budget:
            assert found[row].tolist() == shared(scores, view, row, budget, floor)
            assert int(found[row].sum()) == budget * heads


def _with_budget(view: View, budget: int) -> View:
    import dataclasses

    return dataclasses.replace(view, budget=torch.full_like(view.budget, budget), max_budget=int(view.lengths.max()))


@pytest.mark.parametrize(
    "text",
    ["TopK(Adaptive(96))", "TopK(Adaptive(96, floor=0.5, refresh=3))", "TopK(PerHead((96, 80)))",
     "TopK(PerHead(((96, 80), (70, 90))))"],
)  # fmt: skip
def test_text_round_trips(text: str) -> None:
    policy = Policy.parse(text)
    assert Policy.parse(repr(policy)) == policy
    assert Policy.parse(policy.text(full=True)) == policy
    assert "head_budgets" in policy.needs


def test_lists_are_tuples() -> None:
    assert PerHead([[24, 20], [30, 40]]) == PerHead(((24, 20), (30, 40)))


def test_what_does_not_fit_names_the_head_or_the_floor() -> None:
    with pytest.raises(BudgetError, match="the KV head with the fewest slots: a budget of 8 is not larger than recent"):
        Policy(TopK(PerHead((24, 8))), recent=8).plan(ModelSpec(2))
    with pytest.raises(BudgetError, match=r"Adaptive\(24\) may leave a head with 11 slots: Sinks\(4\).*or the floor"):
        Policy(Sinks(4) >> TopK(Adaptive(24)), recent=8).plan(ModelSpec(2))
    with pytest.raises(ParameterError, match="PerLayer may leave layers alone"):
        PerHead((24, None))
    Policy(ValueGuard() >> TopK(Adaptive(24, floor=0.5)), recent=8).plan(ModelSpec(2))
