"""The pytest decorator that makes each check of each policy one test."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import pytest

from kvpolicy.policy import EvictionPolicy, Policy
from kvpolicy.testing.checks import CHECKS, PolicyOrFactory, fresh, known

__all__ = ["parametrize_with_checks"]

Expected = Mapping[str, str] | Callable[[EvictionPolicy], Mapping[str, str]]


def parametrize_with_checks(
    policies: Iterable[PolicyOrFactory] | Mapping[str, PolicyOrFactory],
    *,
    expected_failures: Expected | None = None,
) -> pytest.MarkDecorator:
    """Give a test the arguments ``policy`` and ``check``, once for each policy and check.

    ::

        @parametrize_with_checks({"mine": Mine(budget=8)})
        def test_invariants(policy, check):
            check(policy)

    Args:
        policies: policies, or functions that make them; a mapping gives them names.
        expected_failures: names of checks that cannot hold, each with its reason, or a function
            that returns those of a policy. Such a check must fail.

    Raises:
        ValueError: an expected failure is no check, or has no reason.
    """
    named = policies if isinstance(policies, Mapping) else _names(policies)
    arguments = []
    for name, policy in named.items():
        reasons = known(_reasons(expected_failures, policy))
        for check_name, check in CHECKS.items():
            reason = reasons.get(check_name)
            marks = [] if reason is None else [_must_fail(reason)]
            short = check_name.removeprefix("check_")
            arguments.append(pytest.param(fresh(policy), check, id=f"{name}-{short}", marks=marks))
    return pytest.mark.parametrize(("policy", "check"), arguments)


def _must_fail(reason: str) -> pytest.MarkDecorator:
    return pytest.mark.xfail(strict=True, raises=AssertionError, reason=reason)


def _reasons(expected: Expected | None, policy: PolicyOrFactory) -> Mapping[str, str]:
    if expected is None or isinstance(expected, Mapping):
        return expected or {}
    return expected(fresh(policy))


def _names(policies: Iterable[PolicyOrFactory]) -> dict[str, PolicyOrFactory]:
    """Name policies by their chains, functions and other classes by their names."""
    named: dict[str, PolicyOrFactory] = {}
    for policy in policies:
        name = getattr(policy, "__name__", type(policy).__name__)
        name = repr(policy.chain) if isinstance(policy, Policy) else name
        if name in named:
            name = f"{name}#{len(named)}"
        named[name] = policy
    return named
