"""CAKE: Cascading and Adaptive KV Cache Eviction with Layer Preferences.

https://arxiv.org/abs/2503.12491
"""

from collections.abc import Sequence

from kvpolicy import Policy, Proportional, SpreadAttention, TopK

__all__ = ["cake"]


def cake(
    budget: int,
    *,
    preferences: Sequence[float] | None = None,
    gamma: float = 200.0,
    window: int = 32,
    pool: int = 5,
    interval: int | None = None,
) -> Policy:
    """Return CAKE: keep what the last queries attend to, steadily or now and then, more in layers that prefer more.

    Without ``preferences`` it is CAKE's scorer with the same budget in every layer, and not CAKE.
    Compresses the prompt once and lets the cache grow afterwards; with an ``interval`` it goes on
    while decoding.

    Args:
        budget: slots kept per KV head on average over the layers, ``cache_size`` of the official code.
        preferences: one number for each layer that may evict, measured beforehand with
            ``kvpolicy.adapters.hf.layer_preferences``; without them all layers have the same.
        gamma: weight of the variance over the queries.
        window: queries asked, and tokens that always stay.
        pool: width of the average over neighbouring positions.
        interval: decoded tokens between two evictions; None, as published, evicts once.

    Source: https://arxiv.org/abs/2503.12491, section 4; defaults of the official code,
    https://github.com/antgroup/cakekv; the formulas were read in the copy of it in
    https://github.com/FFY0/DefensiveKV. The official cache measures preferences on each prompt and
    cuts layers again as deeper ones come in; here memory is allocated once, before any token is seen, so they
    are measured beforehand, on texts like those to come.

    >>> cake(1024)
    Policy(SpreadAttention() >> TopK(1024), interval=None, recent=32)
    >>> cake(1024, preferences=(2.0, 1.0, 1.0))
    Policy(SpreadAttention() >> TopK(Proportional(1024, (2.0, 1.0, 1.0))), interval=None, recent=32)
    """
    shared = budget if preferences is None else Proportional(budget, tuple(preferences))
    return Policy(SpreadAttention(window, pool, gamma) >> TopK(shared), interval=interval, recent=window)
