"""Every method of the zoo, small enough for short sequences."""

from __future__ import annotations

from kvpolicy import (
    AccumulatedAttention,
    Allocator,
    Attention,
    Constant,
    KeyDifference,
    KeyNorm,
    LastQuery,
    Leverage,
    Normalize,
    Policy,
    Prompt,
    Recency,
    Redundancy,
    Sinks,
    Stochastic,
    TopK,
    ValueGuard,
    ValueNorm,
    maximum,
)


def zoo(budget: int | Allocator, *, interval: int = 8, recent: int = 8, window: int = 16) -> dict[str, Policy]:
    """Return each method with the same budget, interval and recent tokens."""
    chains = {
        "vase": Attention(window) >> ValueGuard(sinks=2) >> Stochastic() >> TopK(budget),
        "vase_dkv": Leverage() >> Sinks(4) >> TopK(budget),
        "snapkv": Attention(window, over="all") >> TopK(budget),
        "h2o": AccumulatedAttention(window) >> TopK(budget),
        "tova": LastQuery() >> TopK(budget),
        "streaming_llm": Recency() >> Sinks(4) >> TopK(budget),
        "rkv": 0.5 * Attention(window) + 0.5 * Redundancy() >> TopK(budget),
        "knorm": KeyNorm() >> TopK(budget),
        "keydiff": KeyDifference() >> TopK(budget),
        "random_eviction": Constant() >> Prompt() >> Stochastic() >> TopK(budget),
        "random_kept_noise": Constant() >> Stochastic(redraw=False) >> TopK(budget),
        "mixture": maximum(Attention(window, reduce="max") >> Normalize("z"), ValueNorm("l2") >> Normalize("z"))
        + 0.5 * (AccumulatedAttention(window) >> Normalize("max"))
        >> Sinks(1)
        >> TopK(budget),
    }
    return {name: Policy(chain, interval=interval, recent=recent) for name, chain in chains.items()}
