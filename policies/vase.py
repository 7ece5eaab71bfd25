"""VaSE: Value-Aware Stochastic KV Cache Eviction for Reasoning Models.

https://arxiv.org/abs/2606.03928
"""

from kvpolicy import Leverage, Policy, Sinks, Stochastic, TopK, ValueGuard

__all__ = ["vase", "vase_dkv"]


def vase(
    budget: int,
    *,
    share: float = 0.25,
    tau: float = 1.0,
    seed: int = 0,
    redraw: bool = True,
    interval: int | None = 64,
    recent: int = 64,
) -> Policy:
    """Return VaSE-AttnV: protect the largest values, sample the rest by their attention.

    A quarter of the budget is guarded for the range of its value states, the four sinks among it.
    The rest is sampled without replacement in proportion to the smoothed attention of the newest
    64 queries, afresh at every eviction; the last 64 tokens always stay.

    Differs from the official code where that is accidental: neighbours for smoothing are neighbours
    in position, where the code smooths in the order of its last selection; evictions are counted
    from the end of the prompt, which is cut too, where the code evicts at lengths that 64 divides
    and never at the end of the prompt; scores are float32, where the code rounds to bfloat16.

    Args:
        budget: slots kept per KV head, ``T`` of the paper; its experiments use 1024 to 6144.
        share: of the budget, for the largest values; the paper's scripts use a quarter.
        tau: temperature of the sample.
        seed: of the sample.
        redraw: draw afresh at every eviction.
        interval: decoded tokens between two evictions.
        recent: the last tokens, which always stay.

    Source: https://arxiv.org/abs/2606.03928, VaSE-AttnV.

    >>> vase(1024)
    Policy(ValueGuard() >> Stochastic() >> TopK(1024))
    """
    return Policy(ValueGuard(share) >> Stochastic(tau, seed, redraw) >> TopK(budget), interval=interval, recent=recent)


def vase_dkv(budget: int, *, rank: int = 20, seed: int = 0, interval: int | None = 64, recent: int = 64) -> Policy:
    """Return VaSE-DKV: the leverage scores of CurDKV under a projection drawn anew at each eviction.

    No attention scores, hence no query window: the cheapest variant.

    Args:
        budget: slots kept per KV head, ``T`` of the paper.
        rank: columns of the random projection.
        seed: of the projection.
        interval: decoded tokens between two evictions.
        recent: the last tokens, which always stay.

    Source: https://arxiv.org/abs/2606.03928, VaSE-DKV, after https://arxiv.org/abs/2509.15038.

    >>> vase_dkv(1024)
    Policy(Leverage() >> Sinks(4) >> TopK(1024))
    """
    return Policy(Leverage(rank, seed=seed) >> Sinks(4) >> TopK(budget), interval=interval, recent=recent)
