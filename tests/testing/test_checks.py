"""The checks themselves: what is right passes, and each fault is found by the check that names it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import pytest
from hypothesis import settings

from kvpolicy import (
    Constant,
    EvictionPolicy,
    KeyNorm,
    Policy,
    Recency,
    Sinks,
    Stochastic,
    TopK,
    ValueGuard,
    ValueNorm,
)
from kvpolicy.testing import CHECKS, check_policy, check_stage, parametrize_with_checks
from kvpolicy.testing.checks import Check
from tests.testing import broken, profiles


@pytest.fixture
def unshrunk() -> Iterator[None]:
    """Examples as they are drawn: here every failure is expected."""
    settings.load_profile("unshrunk")
    yield
    profiles.load()


def failing(make: Callable[[], EvictionPolicy], names: Iterable[str]) -> set[str]:
    """Which of these checks fail."""
    failed: set[str] = set()
    for name in names:
        try:
            CHECKS[f"check_{name}"](make())
        except AssertionError:
            failed.add(name)
    return failed


@parametrize_with_checks([broken.KeepLargestValues, broken.KeepLargestValues(budget=3, recent=0)])
def test_a_policy_without_the_algebra_passes(policy: EvictionPolicy, check: Check) -> None:
    check(policy)


@pytest.mark.usefixtures("unshrunk")
@pytest.mark.parametrize(
    ("make", "found"),
    [
        (broken.DropsRecent, "recent"),
        (broken.NamesVictimsTwice, "victims"),
        (broken.ReadsSlotOrder, "slot_order store oracle"),
        (broken.LeaksState, "policy_unchanged deterministic caches_apart"),
        (broken.OneTooFew, "budget edges"),
        (broken.Random, "global_random_state deterministic"),
        (broken.RandomButSeeded, "global_random_state"),
        (broken.WritesToTheView, "nothing_modified"),
        (broken.KeepsFreeSlots, "valid"),
        (broken.ReadsRowIndex, "row_order neighbours seeds"),
        (broken.ComparesRows, "neighbours"),
        (broken.ForgetsHeadOffset, "head_shards"),
        (broken.CrashesOnNan, "not_finite"),
        (broken.EmptiesOnNan, "not_finite"),
        (broken.ReadsFreeSlots, "free_slots"),
        (broken.PlansTooLittle, "plan"),
        (broken.ReordersState, "store slot_order"),
        (broken.ChangesStateType, "state"),
        (broken.NotCopied, "copies"),
        (lambda: Policy(KeyNorm() >> Sinks(3) >> broken.IgnoresGuards(), recent=2), "guards"),
        (lambda: Policy(broken.TextLeavesOut(2.0) >> TopK(8), recent=2), "text"),
    ],
)
def test_each_fault_is_found(make: Callable[[], EvictionPolicy], found: str) -> None:
    assert failing(make, found.split()) == set(found.split())


@pytest.mark.usefixtures("unshrunk")
@pytest.mark.parametrize(
    ("make", "found"),
    [
        (broken.NamesVictimsTwice, {"victims", "edges", "not_finite"}),
        (broken.WritesToTheView, {"nothing_modified"}),
    ],
)
def test_nothing_else_is_found(make: Callable[[], EvictionPolicy], found: set[str]) -> None:
    assert failing(make, [name.removeprefix("check_") for name in CHECKS]) == found


def test_a_failure_says_how_to_see_it_again() -> None:
    with pytest.raises(AssertionError, match="check_budget") as caught:
        CHECKS["check_budget"](broken.OneTooFew())
    assert "keeps" in str(caught.value)
    assert any("ViewSpec(" in note for note in caught.value.__notes__)


def test_check_policy_names_the_first_failure() -> None:
    with pytest.raises(AssertionError, match=r"^check_recent\("):
        check_policy(broken.DropsRecent)


def test_an_expected_failure_must_fail() -> None:
    reason = {"check_copies": "it holds a function"}
    check_policy(broken.NotCopied, expected_failures=reason)
    with pytest.raises(AssertionError, match="check_copies was expected to fail"):
        check_policy(broken.KeepLargestValues, expected_failures=reason)


@pytest.mark.parametrize(
    ("failures", "said"),
    [({"check_nothing": "why"}, "is no check"), ({"check_plan": ""}, "say why")],
)
def test_expected_failures_are_checked(failures: dict[str, str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parametrize_with_checks([broken.KeepLargestValues], expected_failures=failures)


@parametrize_with_checks(
    {"not copied": broken.NotCopied},
    expected_failures={"check_copies": "it holds a function"},
)
def test_an_expected_failure_is_marked(policy: EvictionPolicy, check: Check) -> None:
    check(policy)


def marks_of(policies: Iterable[EvictionPolicy]) -> list[str]:
    mark = parametrize_with_checks(
        policies, expected_failures=lambda policy: {} if isinstance(policy, Policy) else {"check_text": "no"}
    )
    return [str(one.id) for one in mark.mark.args[1] if one.marks]


def test_ids_can_be_read() -> None:
    mine = broken.KeepLargestValues()
    assert marks_of([Policy(KeyNorm() >> TopK(80)), mine, mine]) == [
        "KeepLargestValues-text",
        "KeepLargestValues#2-text",
    ]
    mark = parametrize_with_checks([Policy(KeyNorm() >> TopK(80))])
    assert "KeyNorm() >> TopK(80)-budget" in [str(one.id) for one in mark.mark.args[1]]


@pytest.mark.parametrize(
    "stage",
    [broken.OldestFirst(), ValueNorm("l1"), ValueGuard(), Stochastic(2.0), TopK(8), Constant()],
    ids=repr,
)
def test_stages_pass(stage: KeyNorm) -> None:
    check_stage(stage)


def test_a_broken_stage_is_found() -> None:
    with pytest.raises(AssertionError, match="check_slot_order"):
        check_stage(broken.NegatedSlots())
    with pytest.raises(AssertionError, match="check_guards"):
        check_policy(Policy(KeyNorm() >> Sinks(2) >> broken.IgnoresGuards(), recent=2))


def test_only_stages_are_stages() -> None:
    with pytest.raises(TypeError, match="a scorer, a transform or a selector"):
        check_stage(cast(Any, Recency))


def test_a_policy_that_cannot_plan_says_so() -> None:
    with pytest.raises(AssertionError, match=r"check_plan.*BudgetError"):
        check_policy(Policy(KeyNorm() >> TopK(8)))
