"""Random sequences of everything that can happen to a store, against a model in plain Python."""

from __future__ import annotations

import os

import pytest
from hypothesis import Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from kvpolicy import (
    AccumulatedAttention,
    Adaptive,
    Attention,
    KeyNorm,
    OutputNorm,
    PerLayer,
    Policy,
    Recency,
    Recurrence,
    Sinks,
    Stochastic,
    TopK,
    UnsupportedError,
    ValueGuard,
)
from kvpolicy.store import Store
from kvpolicy.testing import cache_machine
from tests.testing import broken

TestStore = cache_machine(
    (
        Policy(Recency() >> Sinks(1) >> TopK(6), interval=4, recent=2),
        Policy(KeyNorm() >> ValueGuard(sinks=1) >> Stochastic() >> TopK(7), interval=5, recent=3),
        Policy(AccumulatedAttention(3) + KeyNorm() >> Stochastic(0.5) >> TopK(6), interval=3, recent=2),
        Policy(Attention(4, pool=3) >> ValueGuard() >> TopK(8), interval=None, recent=1),
        Policy(Recurrence(4) >> OutputNorm() >> TopK(PerLayer((6, None, 6))), interval=4, recent=2),
    )
).TestCase
THOROUGH = os.environ.get("KVPOLICY_HYPOTHESIS") == "thorough"
TestStore.settings = settings(
    max_examples=2000 if THOROUGH else 60, stateful_step_count=40 if THOROUGH else 20, deadline=None
)

UNSHRUNK = settings(max_examples=40, stateful_step_count=15, deadline=None, phases=[Phase.generate])


@pytest.mark.parametrize("make", [broken.OneTooFew, broken.KeepsFreeSlots, broken.DropsRecent])
def test_a_broken_policy_is_found(make: type[broken.KeepLargestValues]) -> None:
    with pytest.raises(Exception, match=r"slots|recent"):
        run_state_machine_as_test(cache_machine(make), settings=UNSHRUNK)


def test_a_store_that_forgets_to_copy_the_state_of_a_row_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model alone sees it: such a store agrees with itself."""
    policy = Policy(AccumulatedAttention(3) >> TopK(6), interval=3, recent=2)
    whole = Store._copy_rows

    def partly(self: Store, source: Store, requests: list[int]) -> None:
        before = [t.clone() for band in self.bands for t in band.tensors()]
        whole(self, source, requests)
        for held, old in zip([t for band in self.bands for t in band.tensors()], before, strict=True):
            held.copy_(old)

    monkeypatch.setattr(Store, "_copy_rows", partly)
    with pytest.raises(AssertionError):
        run_state_machine_as_test(cache_machine(policy), settings=UNSHRUNK)


def test_what_cannot_be_followed_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="check_store and check_oracle"):
        cache_machine(Policy(KeyNorm() >> TopK(Adaptive(8)), recent=2))
