"""Checks that a policy keeps the same positions whatever cannot matter: slots, rows, neighbours, ranks."""

from __future__ import annotations

from collections.abc import Callable

import torch

from kvpolicy.policy import EvictionPolicy
from kvpolicy.testing.changes import (
    permuted_slots,
    refilled,
    selected_heads,
    selected_rows,
    widened,
)
from kvpolicy.testing.kept import Case, assert_same, select
from kvpolicy.testing.running import check, for_all
from kvpolicy.testing.strategies import view_specs_for
from kvpolicy.testing.views import ViewSpec

__all__ = [
    "check_capacity",
    "check_free_slots",
    "check_head_shards",
    "check_layers_together",
    "check_neighbours",
    "check_row_order",
    "check_slot_order",
]


@check
def check_slot_order(policy: EvictionPolicy) -> None:
    """Check that the same tokens in other slots give the same kept positions."""

    def test(case: Case, spec: ViewSpec) -> None:
        moved = permuted_slots(case.view, case.state, spec.generator)
        assert_same(policy, case, select(policy, *moved).kept, "moving tokens to other slots")

    _for_cases(policy, test, "check_slot_order")


@check
def check_row_order(policy: EvictionPolicy) -> None:
    """Check that the rows of a view in another order are treated the same."""

    def test(case: Case, spec: ViewSpec) -> None:
        backwards = list(reversed(range(case.view.shape[0])))
        answer = select(policy, *selected_rows(case.view, case.state, backwards)).kept
        assert_same(policy, case, tuple(reversed(answer)), "another order of rows")

    _for_cases(policy, test, "check_row_order")


@check
def check_neighbours(policy: EvictionPolicy) -> None:
    """Check that a row alone is treated as it is among others."""

    def test(case: Case, spec: ViewSpec) -> None:
        alone = [
            select(policy, *selected_rows(case.view, case.state, [row])).kept[0] for row in range(case.view.shape[0])
        ]
        assert_same(policy, case, tuple(alone), "the absence of the other rows")

    _for_cases(policy, test, "check_neighbours")


@check
def check_layers_together(policy: EvictionPolicy) -> None:
    """Check that layers are treated the same in one view as in a view each."""

    def test(case: Case, spec: ViewSpec) -> None:
        kept = list(case.kept)
        layers = case.view.layer.tolist()
        for layer in set(layers):
            rows = [row for row, of in enumerate(layers) if of == layer]
            answer = select(policy, *selected_rows(case.view, case.state, rows)).kept
            for row, positions in zip(rows, answer, strict=True):
                kept[row] = positions
        assert_same(policy, case, tuple(kept), "a view for each layer")

    _for_cases(policy, test, "check_layers_together")


@check
def check_head_shards(policy: EvictionPolicy) -> None:
    """Check that heads split over devices are treated the same as together.

    A policy that needs ``"cross_heads"`` is exempt: it asks for a reduction over devices.
    """
    if "cross_heads" in policy.needs:
        return

    def test(case: Case, spec: ViewSpec) -> None:
        heads = case.view.shape[1]
        cut = spec.generator % heads
        ranks = [part for part in ((0, cut), (cut, heads)) if part[0] < part[1]]
        answers = [select(policy, *selected_heads(case.view, case.state, *part)).kept for part in ranks]
        joined = tuple(sum(rows, ()) for rows in zip(*answers, strict=True))
        assert_same(policy, case, joined, f"splitting {heads} heads before head {cut}")

    _for_cases(policy, test, "check_head_shards")


@check
def check_capacity(policy: EvictionPolicy) -> None:
    """Check that further free slots change nothing."""

    def test(case: Case, spec: ViewSpec) -> None:
        wide = widened(case.view, case.state, 1 + spec.generator % 5)
        assert_same(policy, case, select(policy, *wide).kept, "adding free slots")

    _for_cases(policy, test, "check_capacity")


@check
def check_free_slots(policy: EvictionPolicy) -> None:
    """Check that nothing is read from slots that hold no token, where anything may stand."""

    def test(case: Case, spec: ViewSpec) -> None:
        for fill in (0.0, -300.0, torch.inf, torch.nan):
            other = refilled(case.view, fill)
            answer = select(policy, other, case.state).kept
            assert_same(policy, case, answer, f"{fill} in free slots")

    _for_cases(policy, test, "check_free_slots")


def _for_cases(policy: EvictionPolicy, test: Callable[[Case, ViewSpec], None], name: str) -> None:
    """Run a test on a policy's answers to many views."""
    for_all(view_specs_for(policy), lambda spec: test(select(policy, spec.view()), spec), name=name)
