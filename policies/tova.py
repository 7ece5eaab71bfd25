"""TOVA: Transformers are Multi-State RNNs.

https://arxiv.org/abs/2401.06104
"""

from kvpolicy import LastQuery, Policy, TopK

__all__ = ["tova"]


def tova(budget: int, *, interval: int | None = 64) -> Policy:
    """Return TOVA: drop what the newest query attends to least, one set for all heads of a layer.

    Args:
        budget: slots kept per KV head, ``cache_size`` of the official code.
        interval: decoded tokens between two evictions; 1 as published.

    Source: https://arxiv.org/abs/2401.06104, section 3.2.

    >>> tova(1024)
    Policy(LastQuery() >> TopK(1024), recent=1)
    """
    return Policy(LastQuery() >> TopK(budget), interval=interval, recent=1)
