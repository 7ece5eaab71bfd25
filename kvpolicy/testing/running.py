"""How a check runs: named failures, and examples from hypothesis."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeAlias, TypeVar

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Flaky
from hypothesis.strategies import SearchStrategy

from kvpolicy.policy import EvictionPolicy

__all__ = ["Check", "check", "for_all"]

#: A check takes a policy, returns nothing, and raises AssertionError.
Check: TypeAlias = Callable[[EvictionPolicy], None]
_T = TypeVar("_T")
_SLOW = (HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.nested_given)


def check(function: Check) -> Check:
    """Make a check out of a function: whatever it raises becomes an AssertionError with its name."""

    @functools.wraps(function)
    def named(policy: EvictionPolicy) -> None:
        try:
            function(policy)
        except Exception as error:
            said = str(error) if isinstance(error, AssertionError) else f"raised {error!r}"
            failure = AssertionError(f"{function.__name__}({_short(policy)}): {said}")
            for note in getattr(error, "__notes__", ()):
                failure.add_note(note)
            raise failure from error

    return named


def for_all(examples: SearchStrategy[_T], test: Callable[[_T], None], *, name: str, share: float = 1.0) -> None:
    """Run a test on many examples and raise what the simplest failing one raises.

    How many, whether they are the same each time, and whether failures are simplified, is said by
    hypothesis's current profile.

    Args:
        examples: what to draw.
        test: of one example.
        name: of the check; each name has examples of its own.
        share: of the number of examples, for a test that takes longer than others.

    Raises:
        AssertionError: the test fails sometimes only.
    """

    def run(example: _T) -> None:
        test(example)

    run.__name__ = run.__qualname__ = name
    current = settings()  # the profile that is loaded
    wrapped = settings(
        max_examples=max(1, round(share * current.max_examples)),
        deadline=None,
        report_multiple_bugs=False,
        phases=[phase for phase in current.phases if phase != Phase.explain],
        suppress_health_check=_SLOW,
        print_blob=False,
    )(given(example=examples)(run))
    try:
        wrapped()
    except Flaky as error:
        raise AssertionError("the same view fails once and passes once more") from error


def _short(policy: object) -> str:
    text = repr(policy)
    return text if len(text) <= 200 else text[:197] + "..."
