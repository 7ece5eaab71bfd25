"""Every check, and the functions that run them all."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import TypeAlias

from kvpolicy.policy import EvictionPolicy, Policy
from kvpolicy.scorers import KeyNorm, ValueNorm
from kvpolicy.selectors import TopK
from kvpolicy.stage import Chain, Scorer, Selector, Stage, Transform, describe
from kvpolicy.testing import caches, keeping, purity, symmetry
from kvpolicy.testing.running import Check

__all__ = ["CHECKS", "Check", "PolicyOrFactory", "check_policy", "check_stage", "fresh", "policies_around"]

#: A policy, or a function (a class, too) that makes one.
PolicyOrFactory: TypeAlias = EvictionPolicy | Callable[[], EvictionPolicy]

_ALL: tuple[Check, ...] = (
    keeping.check_plan,
    purity.check_state,
    keeping.check_valid,
    keeping.check_budget,
    keeping.check_victims,
    keeping.check_recent,
    keeping.check_guards,
    keeping.check_edges,
    purity.check_deterministic,
    purity.check_global_random_state,
    purity.check_nothing_modified,
    purity.check_policy_unchanged,
    purity.check_copies,
    purity.check_text,
    purity.check_seeds,
    symmetry.check_slot_order,
    symmetry.check_row_order,
    symmetry.check_neighbours,
    symmetry.check_layers_together,
    symmetry.check_head_shards,
    symmetry.check_capacity,
    symmetry.check_free_slots,
    keeping.check_not_finite,
    caches.check_store,
    caches.check_oracle,
    caches.check_caches_apart,
)

#: Every check by its name, in the order in which they run.
CHECKS: Mapping[str, Check] = {one.__name__: one for one in _ALL}


def check_policy(policy: PolicyOrFactory, *, expected_failures: Mapping[str, str] | None = None) -> None:
    """Run every check on a policy.

    Views have the budget, the recent tokens and the window of the policy's plan, so that a policy
    with a budget of about ten, recent of three and an interval of four is checked most quickly.
    The number of examples is that of hypothesis's current profile.

    Args:
        policy: a policy, or a function that makes one; each check gets a new one, or a copy.
        expected_failures: names of checks that cannot hold, each with the reason; they must fail.

    Raises:
        AssertionError: a check fails, which is named, or one that should fail does not.

    >>> from kvpolicy import KeyNorm, Policy, TopK
    >>> check_policy(Policy(KeyNorm() >> TopK(8), interval=4, recent=2))
    """
    expected = known(expected_failures or {})
    for name, check in CHECKS.items():
        if name not in expected:
            check(fresh(policy))
            continue
        try:
            check(fresh(policy))
        except AssertionError:
            continue
        raise AssertionError(f"{name} was expected to fail ({expected[name]}), and passes")


def check_stage(stage: Stage, *, budget: int = 12, recent: int = 3, interval: int | None = 4) -> None:
    """Run every check on policies around a single stage.

    A scorer is followed by ``TopK``; a transform, which may treat weights and logits differently,
    stands once behind each kind; a selector stands behind ``KeyNorm()``.

    Args:
        stage: a scorer, a transform or a selector.
        budget: of the policies; a selector brings its own.
        recent: of the policies.
        interval: of the policies.

    Raises:
        AssertionError: a check fails, which is named.
        TypeError: this is no stage.
    """
    for policy in policies_around(stage, budget=budget, recent=recent, interval=interval):
        check_policy(policy)


def policies_around(stage: Stage, *, budget: int = 12, recent: int = 3, interval: int | None = 4) -> tuple[Policy, ...]:
    """Return the policies that :func:`check_stage` checks a stage in, with the same arguments."""
    chains: list[Chain] = []
    if isinstance(stage, Scorer):
        chains = [stage >> TopK(budget)]
    elif isinstance(stage, Transform):
        chains = [ValueNorm() >> stage >> TopK(budget), KeyNorm() >> stage >> TopK(budget)]
    elif isinstance(stage, Selector):
        chains = [KeyNorm() >> stage]
    if not chains:
        raise TypeError(f"check_stage({describe(stage)}): a scorer, a transform or a selector")
    return tuple(Policy(chain, interval=interval, recent=recent) for chain in chains)


def fresh(policy: PolicyOrFactory) -> EvictionPolicy:
    """Return a policy that nobody has asked yet: a new one, or a copy where it can be copied."""
    if isinstance(policy, type) or not isinstance(policy, EvictionPolicy):
        return policy()
    try:
        return copy.deepcopy(policy)
    except Exception:  # check_copies says so
        return policy


def known(expected_failures: Mapping[str, str]) -> Mapping[str, str]:
    """Return the expected failures.

    Raises:
        ValueError: one of them is no check, or has no reason.
    """
    for name, reason in expected_failures.items():
        if name not in CHECKS:
            raise ValueError(f"{name!r} is no check; they are {', '.join(CHECKS)}")
        if not reason:
            raise ValueError(f"{name} is expected to fail: say why")
    return expected_failures
