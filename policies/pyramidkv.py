"""PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling.

https://arxiv.org/abs/2406.02069
"""

from kvpolicy import Attention, Policy, Pyramid, TopK

__all__ = ["pyramidkv"]


def pyramidkv(budget: int, *, beta: float = 20, window: int = 64, pool: int = 5, interval: int | None = None) -> Policy:
    """Return PyramidKV: SnapKV's choice, with more slots for the first layers than for the last ones.

    Compresses the prompt once and lets the cache grow afterwards; with an ``interval`` it goes on
    while decoding. Pooling runs on into the last tokens, where the official code pools the older
    ones alone.

    Args:
        budget: slots kept per KV head on average over the layers, ``max_capacity_prompt`` of the
            official code.
        beta: how steep the pyramid is; the official code uses 20.
        window: queries asked, and tokens that always stay; the official class uses 64.
        pool: width of the average pooling; the official class uses 5.
        interval: decoded tokens between two evictions; None, as published, evicts once.

    Source: https://arxiv.org/abs/2406.02069, section 4, and its official code.

    >>> pyramidkv(1024)
    Policy(Attention(over='all') >> TopK(Pyramid(1024)), interval=None)
    """
    chain = Attention(window, pool, over="all") >> TopK(Pyramid(budget, beta))
    return Policy(chain, interval=interval, recent=window)
