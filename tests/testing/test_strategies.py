"""Guards and selection against second implementations; views are what a store would show."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvpolicy import (
    ModelSpec,
    OutputProjection,
    Policy,
    Prompt,
    Scores,
    Sinks,
    Tier,
    TopK,
    ValueGuard,
    View,
    select_top,
)
from kvpolicy.eviction import LogitSpec, evict
from kvpolicy.row import Row
from kvpolicy.scorers import AccumulatedAttention, KeyNorm
from kvpolicy.store import Store
from kvpolicy.testing import RowSpec, ViewSpec, make_view, strategies, with_state
from kvpolicy.testing.keeping import tiers
from kvpolicy.testing.kept import assert_sound, select
from kvpolicy.testing.strategies import view_specs
from kvpolicy.testing.views import history, layer_spec

# Guards, against a second implementation


@given(view_specs(due=True, max_rows=2), st.integers(0, 3), st.sampled_from((0.25, 0.5, 1.0)))
def test_tiers_are_those_of_plain_python(spec: ViewSpec, n: int, share: float) -> None:
    policy = Policy(KeyNorm() >> Sinks(n) >> Prompt(share) >> ValueGuard(share, sinks=n) >> TopK(9), recent=1)
    case = select(policy, spec.view())
    found = tiers(policy, case).tolist()
    view = case.view
    for row, of in enumerate(spec.rows):
        budget = int(view.budget[row, 0])
        room = int(budget * share + 1e-9)
        first = of.prompt if of.prompt <= room else room - room // 2
        last = 0 if of.prompt <= room else room // 2
        for head in range(spec.heads):
            held = {int(p): s for s, p in enumerate(view.positions[row, head].tolist()) if p >= 0}
            size = {p: _range(view, row, head, s) for p, s in held.items()}
            old = [p for p in held if p < of.seen - spec.recent]
            large = sorted(old, key=lambda p: (p < n, 0.0 if p < n else size[p], p), reverse=True)[:room]
            expected = [Tier.FREE] * view.shape[2]
            for position, slot in held.items():
                tier = Tier.CANDIDATE if position in old else Tier.RECENT
                if position in old:
                    tier = max(tier, Tier.VALUE) if position in large else tier
                    edge = position < first or of.prompt - last <= position < of.prompt
                    tier = max(tier, Tier.PROMPT) if edge else tier
                    tier = Tier.SINK if position < n else tier
                expected[slot] = tier
            assert found[row][head] == expected


def _range(view: View, row: int, head: int, slot: int) -> float:
    values = view.values[row, head, slot].to(view.compute_dtype)
    return float((values.max() - values.min()).to(torch.float32))


@given(st.data(), view_specs())
def test_selection_is_a_sort(data: st.DataObject, spec: ViewSpec) -> None:
    view = spec.view()
    scores: Scores = data.draw(strategies.scores(view))
    kept = select_top(scores, view, view.budget)
    assert_sound(view, kept)
    values = torch.nan_to_num(scores.values, nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    for row in range(view.shape[0]):
        for head in range(view.shape[1]):
            slots = [s for s, p in enumerate(view.positions[row, head].tolist()) if p >= 0]
            key = {
                s: (int(scores.tier[row, head, s]), float(values[row, head, s]), int(view.positions[row, head, s]))
                for s in slots
            }
            best = sorted(slots, key=key.__getitem__, reverse=True)[: int(view.budget[row, head])]
            assert kept.mask[row, head].nonzero()[:, 0].tolist() == sorted(best)


# Views


@given(view_specs())
def test_views_agree_with_themselves(spec: ViewSpec) -> None:
    view = spec.view()
    for shown in (view, history(view)):
        _check_view(shown)
    assert (view.keys.dtype, view.values.dtype) == (spec.dtype, spec.dtype)
    again = spec.view()
    for field in dataclasses.fields(view):
        one, two = getattr(view, field.name), getattr(again, field.name)
        if isinstance(one, OutputProjection):
            assert one.rows == two.rows
            one, two = torch.stack(one.weights), torch.stack(two.weights)
        assert torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two


def _check_view(view: View) -> None:
    b, h, s = view.shape
    positions = view.positions.gather(-1, view.order.to(torch.int64)).tolist()
    assert torch.equal(view.order.sort(-1).values.long(), torch.arange(s).expand(b, h, s))
    assert view.max_budget == int(view.budget.max())
    assert view.max_victims == max(0, int((view.lengths - view.budget).max()))
    for row in range(b):
        seen, length = int(view.seen[row]), int(view.lengths[row, 0])
        recent = set(range(max(0, seen - view.recent), seen))
        for head in range(h):
            held = [p for p in positions[row][head] if p != -1]
            assert len(held) == length == int(view.lengths[row, head])
            assert positions[row][head] == sorted(set(held)) + [-1] * (s - length)
            assert all(p < seen for p in held)
            assert recent <= set(held)
            fresh = [slot for slot in view.fresh[row, head].tolist() if slot != -1]
            assert [int(view.positions[row, head, slot]) for slot in fresh] == held[length - len(fresh) :]
        if view.query_positions is not None:
            asked = [p for p in view.query_positions[row].tolist() if p != -1]
            absent = view.query_positions.shape[1] - len(asked)
            assert view.query_positions[row].tolist() == [-1] * absent + list(range(seen - len(asked), seen))


@pytest.mark.parametrize(
    "row",
    [
        RowSpec(length=3, fresh=4),
        RowSpec(length=4, fresh=3, evicted=2, evictions=1),
        RowSpec(evicted=1, fresh=0),
        RowSpec(evictions=1),
        RowSpec(prompt=9),
        RowSpec(length=-1, fresh=-1),
    ],
)
def test_what_no_store_could_show_is_refused(row: RowSpec) -> None:
    with pytest.raises(ValueError, match="RowSpec"):
        make_view(rows=(row,))
    with pytest.raises(TypeError, match="lenght"):
        make_view(lenght=3)


@pytest.mark.parametrize("scorer", [KeyNorm(), AccumulatedAttention(12)])
def test_state_is_what_a_store_holds(scorer: KeyNorm | AccumulatedAttention) -> None:
    policy = Policy(scorer >> TopK(20), interval=4, recent=2)
    plan = policy.plan(ModelSpec(num_layers=1)).layers[0]
    assert plan is not None
    row = RowSpec(length=12, fresh=3, budget=None, prompt=9)
    view = ViewSpec((row,), spare=12, recent=2, window=plan.window, shuffle=False, free="zero").view()
    store = Store(policy, plan, layer_spec(view), [0], [Row()])
    assert view.queries is not None or not plan.window
    for start, stop, decoding in ((0, 9, False), (9, 10, True), (10, 11, True), (11, 12, True)):
        new = slice(start, stop)
        store.append(0, view.keys[:, :, new], view.values[:, :, new], [stop - start])
        if view.queries is not None:
            behind = view.queries.shape[2] - 12
            store.observe(0, view.queries[:, :, max(0, behind + start) : behind + stop], [stop - start])
        store.advance([one.advanced(stop - start, decoding=decoding) for one in store.rows])
        if stop == 9:
            evict(store, [False], LogitSpec(view.scaling))
    held, made = store.bands[0].state[0], with_state(policy, view)[0]
    assert held is not None
    assert made is not None
    for one, two in zip((*held.slots, *held.rows), (*made.slots, *made.rows), strict=True):
        torch.testing.assert_close(one, two)
