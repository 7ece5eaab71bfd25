"""What each check says of a policy: :func:`outcomes`."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from hypothesis import Phase, settings

from kvpolicy.testing.checks import CHECKS, PolicyOrFactory, fresh, known

__all__ = ["Outcome", "examples", "outcomes"]

_PROFILE = "kvpolicy-outcomes"


@dataclass(frozen=True)
class Outcome:
    """Say what one check found.

    Attributes:
        check: its name.
        result: ``"passed"``, ``"failed"``, or ``"declared"``: it cannot hold, which was said before, and does not.
        reason: why it failed, or why it cannot hold; empty where it passed.
    """

    check: str
    result: Literal["passed", "failed", "declared"]
    reason: str = ""

    @property
    def good(self) -> bool:
        """Return whether this is as it should be."""
        return self.result != "failed"


def outcomes(
    policies: PolicyOrFactory | Sequence[PolicyOrFactory], *, expected_failures: Mapping[str, str] | None = None
) -> Iterator[Outcome]:
    """Yield what each check finds, in the order in which they run; a failure does not stop the others.

    Args:
        policies: a policy, or a function that makes one; or several, each of which must pass.
        expected_failures: names of checks that cannot hold, each with the reason; they must fail.

    Raises:
        ValueError: an expected failure is no check, or has no reason.

    >>> from kvpolicy import KeyNorm, Policy, TopK
    >>> with examples(5):
    ...     found = list(outcomes(Policy(KeyNorm() >> TopK(8), interval=4, recent=2)))
    >>> {one.result for one in found}
    {'passed'}
    """
    every = policies if isinstance(policies, Sequence) else [policies]
    expected = known(expected_failures or {})
    for name in CHECKS:
        reason = next((said for one in every if (said := _failure(name, one)) is not None), None)
        if name not in expected:
            yield Outcome(name, "passed") if reason is None else Outcome(name, "failed", reason)
        elif reason is None:
            yield Outcome(name, "failed", f"was expected to fail ({expected[name]}), and passes")
        else:
            yield Outcome(name, "declared", expected[name])


def _failure(name: str, policy: PolicyOrFactory) -> str | None:
    """Return what a check says of a policy, None where it passes."""
    try:
        CHECKS[name](fresh(policy))
    except AssertionError as error:
        return str(error)
    return None


@contextlib.contextmanager
def examples(count: int) -> Generator[None]:
    """Let hypothesis draw so many examples a check, the same each time, and write nothing to the disk."""
    before = settings.get_current_profile_name()
    quick = [phase for phase in Phase if phase != Phase.explain]
    settings.register_profile(
        _PROFILE, max_examples=count, derandomize=True, database=None, deadline=None, phases=quick
    )
    settings.load_profile(_PROFILE)
    try:
        yield
    finally:
        settings.load_profile(before)
