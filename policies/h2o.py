"""H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models.

https://arxiv.org/abs/2306.14048
"""

from kvpolicy import AccumulatedAttention, Policy, TopK
from kvpolicy.scorers.every_query import window_for

__all__ = ["h2o"]


def h2o(budget: int, *, recent: int | None = None, interval: int | None = 64) -> Policy:
    """Return H2O: keep the tokens with the most accumulated attention, and the most recent ones.

    Args:
        budget: slots kept per KV head.
        recent: the last tokens, which always stay; half of the budget, as published, where None.
        interval: decoded tokens between two evictions; 1 as published; None evicts at the end of a turn only.

    Source: https://arxiv.org/abs/2306.14048, section 4; equal shares of heavy hitters and recent
    tokens as in its experiments.

    >>> h2o(1024)
    Policy(AccumulatedAttention() >> TopK(1024), recent=512)
    """
    recent = max(1, budget // 2) if recent is None else recent
    return Policy(AccumulatedAttention(window_for(interval)) >> TopK(budget), interval=interval, recent=recent)
