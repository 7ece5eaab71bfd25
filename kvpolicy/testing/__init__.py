"""Check that a policy, yours or ours, keeps every invariant that engines rely on.

    from kvpolicy.testing import check_policy, check_stage, parametrize_with_checks

    check_policy(MyPolicy(budget=8))        # raises AssertionError, naming the check that fails
    check_stage(MyScorer())                 # a single stage, inside a policy

    for outcome in outcomes(MyPolicy(budget=8)):    # all of them, whatever fails; `kvpolicy check` prints these
        print(outcome.check, outcome.result, outcome.reason)

    @parametrize_with_checks({"mine": MyPolicy(budget=8)})
    def test_invariants(policy, check):     # each check is one test
        check(policy)

Views are drawn by hypothesis, which comes with ``pip install kvpolicy[testing]``.
"""

from kvpolicy.testing import strategies
from kvpolicy.testing.checks import CHECKS, check_policy, check_stage
from kvpolicy.testing.machine import cache_machine
from kvpolicy.testing.marks import parametrize_with_checks
from kvpolicy.testing.oracle import MaskedCache
from kvpolicy.testing.outcome import Outcome, examples, outcomes
from kvpolicy.testing.views import Data, RowSpec, ViewSpec, make_view, with_state

__all__ = [
    "CHECKS",
    "Data",
    "MaskedCache",
    "Outcome",
    "RowSpec",
    "ViewSpec",
    "cache_machine",
    "check_policy",
    "check_stage",
    "examples",
    "make_view",
    "outcomes",
    "parametrize_with_checks",
    "strategies",
    "with_state",
]
