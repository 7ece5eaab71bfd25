"""Policies drawn from the whole algebra keep every invariant.

A hundred of them, the same each time; ``KVPOLICY_POLICIES=2000`` draws two thousand.
"""

from __future__ import annotations

import os

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpolicy import Policy, registry
from kvpolicy.testing import strategies
from kvpolicy.testing.caches import same_as_masked, scripts
from kvpolicy.testing.changes import permuted_slots, refilled, selected_heads, selected_rows, widened
from kvpolicy.testing.keeping import assert_guarded
from kvpolicy.testing.kept import Case, assert_recent, assert_same, assert_sound, select
from kvpolicy.testing.strategies import NOT_FINITE, view_specs_for

COUNT = int(os.environ.get("KVPOLICY_POLICIES", "100"))


def drawn(share: float) -> settings:
    """So many of the policies: what takes longer is tried on fewer of them."""
    return settings(max_examples=max(1, round(COUNT * share)))


@drawn(1)
@given(st.data(), strategies.policies())
def test_any_policy_is_sound_and_symmetric(data: st.DataObject, policy: Policy) -> None:
    spec = data.draw(view_specs_for(policy))
    case = select(policy, spec.view())
    assert_sound(case.view, case.keep)
    assert_recent(case)
    assert_guarded(policy, case)
    _symmetric(policy, case, spec.generator)


def _symmetric(policy: Policy, case: Case, seed: int) -> None:
    """Assert that nothing changes with slots, rows, neighbours, devices or what free slots hold."""
    view, state, (rows, heads, _) = case.view, case.state, case.view.shape
    assert select(policy, view, state).kept == case.kept
    assert_same(policy, case, select(policy, *permuted_slots(view, state, seed)).kept, "other slots")
    assert_same(policy, case, select(policy, *widened(view, state, 2)).kept, "free slots")
    assert_same(policy, case, select(policy, refilled(view, torch.nan), state).kept, "nan in free slots")
    answer = select(policy, *selected_rows(view, state, list(reversed(range(rows))))).kept
    assert_same(policy, case, tuple(reversed(answer)), "other rows")
    alone = [select(policy, *selected_rows(view, state, [row])).kept[0] for row in range(rows)]
    assert_same(policy, case, tuple(alone), "no neighbours")
    if "cross_heads" not in policy.needs:
        answers = [select(policy, *selected_heads(view, state, h, h + 1)).kept for h in range(heads)]
        joined = tuple(sum(row, ()) for row in zip(*answers, strict=True))
        assert_same(policy, case, joined, "a device for each head")


@drawn(0.5)
@given(st.data(), strategies.policies())
def test_any_policy_survives_any_number(data: st.DataObject, policy: Policy) -> None:
    view = data.draw(view_specs_for(policy, data=NOT_FINITE)).view()
    assert_sound(view, select(policy, view).keep)


@drawn(0.25)
@given(st.data(), strategies.policies())
def test_any_policy_is_the_same_in_a_store(data: st.DataObject, policy: Policy) -> None:
    same_as_masked(policy, data.draw(scripts(policy)))


@drawn(1)
@given(strategies.policies())
def test_any_policy_is_read_from_its_text(policy: Policy) -> None:
    for text in (repr(policy), policy.text(full=True)):
        assert Policy.parse(text) == policy
        assert hash(Policy.parse(text)) == hash(policy)


@drawn(0.03)
@given(st.data(), strategies.policies())
def test_any_policy_is_one_graph(data: st.DataObject, policy: Policy) -> None:
    view = data.draw(view_specs_for(policy)).view()
    case = select(policy, view)
    torch._dynamo.reset()
    compiled = torch.compile(policy.select, fullgraph=True, dynamic=False, backend="eager")
    keep, after = compiled(view, case.state)
    assert torch.equal(keep.mask, case.keep.mask)
    for one, two in zip(after, case.after, strict=True):
        held, known = (() if state is None else (*state.slots, *state.rows) for state in (one, two))
        for x, y in zip(held, known, strict=True):
            torch.testing.assert_close(x, y, equal_nan=True)


def test_every_registered_stage_is_drawn() -> None:
    missing = {name for name, entry in registry.stages().items() if entry.distribution == "kvpolicy"}
    assert missing

    @settings(max_examples=400, database=None)
    @given(strategies.policies())
    def draw(policy: Policy) -> None:
        words = policy.text(full=True).replace("(", " ").split()
        missing.difference_update(words, {type(stage).__name__ for stage in policy.stages})
        missing.discard(type(policy.chain.selector.allocator).__name__)  # type: ignore[attr-defined]

    draw()
    assert not missing
