"""Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation for Efficient LLM Inference.

https://arxiv.org/abs/2407.11550
"""

from kvpolicy import Adaptive, Attention, Policy, TopK

__all__ = ["adakv"]


def adakv(budget: int, *, floor: float = 0.5, window: int = 32, pool: int = 7, interval: int | None = None) -> Policy:
    """Return Ada-KV: keep what the last queries of the prompt attend to, heads of spread attention keeping more.

    SnapKV's scores; the slots of a layer are shared over its heads by them. Compresses the prompt once and
    lets the cache grow afterwards; with an ``interval`` it goes on while decoding.

    Args:
        budget: slots kept per KV head on average over the heads of a layer, ``base_capacity`` of the official code.
        floor: share of what the last tokens leave that every head keeps, ``floor_alpha``.
        window: queries asked, and tokens that always stay.
        pool: width of the maximum over neighbouring positions.
        interval: decoded tokens between two evictions; None, as published, evicts once.

    Source: https://arxiv.org/abs/2407.11550, section 4; window, pooling and kernel read in the official
    code, https://github.com/FFY0/AdaKV, whose experiments set a floor of 0.5 (second-hand; 0.2 in the paper and
    in kvpress). The official code takes query heads apart, here those of a group share a KV head's slots; pooling
    runs on into the last tokens, where the code pools the older ones alone.

    >>> adakv(1024)
    Policy(Attention(window=32, pool=7, over='all', pooling='max') >> TopK(Adaptive(1024, floor=0.5)), ...)
    """
    attention = Attention(window, pool, over="all", pooling="max")
    return Policy(attention >> TopK(Adaptive(budget, floor)), interval=interval, recent=window)
