"""VATP: Attention Score is not All You Need for Token Importance Indicator in KV Cache Reduction.

https://arxiv.org/abs/2406.12335
"""

from kvpolicy import AccumulatedAttention, Policy, Sinks, TopK, ValueNorm
from kvpolicy.scorers.every_query import window_for

__all__ = ["vatp"]


def vatp(budget: int, *, sinks: int = 20, recent: int | None = None, interval: int | None = 64) -> Policy:
    """Return VATP: keep the tokens with the most accumulated attention times the size of their values.

    Read in the official code: H2O's sums of attention times the sum of the magnitudes of a value's
    elements, the first tokens forced. There every query of the prompt counts and each step evicts, by
    a mask; here the newest 64 queries of a prompt count, and tokens are dropped.

    Args:
        budget: slots kept per KV head.
        sinks: first tokens that always stay; the commands of the official code use 20.
        recent: the last tokens, which always stay; half of the budget, as in the official code, where None.
        interval: decoded tokens between two evictions; 1 as published; None evicts at the end of a turn only.

    Source: https://arxiv.org/abs/2406.12335, section 3, and https://github.com/guozhiyu/vatp.

    >>> vatp(1024)
    Policy(AccumulatedAttention() * ValueNorm(norm='l1') >> Sinks(20) >> TopK(1024), recent=512)
    """
    recent = max(1, budget // 2) if recent is None else recent
    score = AccumulatedAttention(window_for(interval)) * ValueNorm("l1")
    return Policy(score >> Sinks(sinks) >> TopK(budget), interval=interval, recent=recent)
