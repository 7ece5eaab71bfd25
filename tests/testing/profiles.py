"""How many examples hypothesis draws: a few, the same each time; or very many."""

import os

from hypothesis import HealthCheck, Phase, settings

_QUIET = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]

settings.register_profile("fast", max_examples=10, derandomize=True, deadline=None)
settings.register_profile("thorough", max_examples=10_000, deadline=None, suppress_health_check=_QUIET)
settings.register_profile("unshrunk", settings.get_profile("fast"), max_examples=40, phases=[Phase.generate])


def load() -> None:
    """Load what KVPOLICY_HYPOTHESIS names."""
    settings.load_profile(os.environ.get("KVPOLICY_HYPOTHESIS", "fast"))
