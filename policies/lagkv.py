"""LagKV: Lag-Relative Information of the KV Cache Tells Which Tokens Are Important.

https://arxiv.org/abs/2504.04704
"""

from kvpolicy import LagRelative, Policy, Sinks, TopK

__all__ = ["lagkv"]


def lagkv(budget: int, *, lag: int = 128, sinks: int = 4, interval: int | None = 64, recent: int = 64) -> Policy:
    """Return LagKV: keep the tokens that stand out against the range of the tokens that follow them.

    No attention scores, hence no query window. The newest partition, 128 to 255 tokens, stays before all
    others: a budget below twice the lag keeps little else.

    Args:
        budget: slots kept per KV head.
        lag: tokens of a partition.
        sinks: first tokens that always stay.
        interval: decoded tokens between two evictions.
        recent: the last tokens, which always stay.

    Source: https://arxiv.org/abs/2504.04704, section 2; formula read in the official code,
    https://github.com/AI-Lab-China-Merchants-Bank/LagKV, defaults in LagKVPress of
    https://github.com/NVIDIA/kvpress. The official cache keeps a share of each partition once, and grows;
    here the budget is fixed, so that the tokens held are partitioned and scored anew at each eviction.

    >>> lagkv(1024)
    Policy(LagRelative() >> Sinks(4) >> TopK(1024))
    """
    return Policy(LagRelative(lag, sinks) >> Sinks(sinks) >> TopK(budget), interval=interval, recent=recent)
