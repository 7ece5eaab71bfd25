"""SnapKV: LLM Knows What You Are Looking for Before Generation.

https://arxiv.org/abs/2404.14469
"""

from kvpolicy import Attention, Policy, TopK

__all__ = ["snapkv"]


def snapkv(budget: int, *, window: int = 64, pool: int = 5, interval: int | None = None) -> Policy:
    """Return SnapKV: keep what the last queries of the prompt attend to, and those queries' tokens.

    Compresses the prompt once and lets the cache grow afterwards; with an ``interval`` it goes on
    while decoding. Pooling runs on into the last tokens, where the official code pools the older
    ones alone.

    Args:
        budget: slots kept per KV head, ``max_capacity_prompt`` of the official code.
        window: queries asked, and tokens that always stay; the official class uses 64.
        pool: width of the average pooling; the official code uses 5.
        interval: decoded tokens between two evictions; None, as published, evicts once.

    Source: https://arxiv.org/abs/2404.14469, section 4, and its official code.

    >>> snapkv(1024)
    Policy(Attention(over='all') >> TopK(1024), interval=None)
    """
    return Policy(Attention(window, pool, over="all") >> TopK(budget), interval=interval, recent=window)
