"""Scissorhands: Exploiting the Persistence of Importance Hypothesis for LLM KV Cache Compression at Test Time.

https://arxiv.org/abs/2305.17118
"""

from kvpolicy import AttentionCount, Policy, TopK

__all__ = ["scissorhands"]


def scissorhands(budget: int, *, window: int = 400, interval: int | None = 64, recent: int = 10) -> Policy:
    """Return Scissorhands: keep the tokens that seldom had less than uniform attention lately.

    Read second-hand, in other people's code (the count of the steps of a history window below uniform
    attention; 400 queries in the official code of VATP); no official code was found. The paper drops half of
    the cache at once: write ``interval=budget``. Queries older than the last eviction are asked again
    over the slots held now.

    Args:
        budget: slots kept per KV head.
        window: newest queries that are asked, the history window.
        interval: decoded tokens between two evictions.
        recent: the last tokens, which always stay.

    Source: https://arxiv.org/abs/2305.17118, section 4.

    >>> scissorhands(1024)
    Policy(AttentionCount(window=400) >> TopK(1024), recent=10)
    """
    return Policy(AttentionCount(window) >> TopK(budget), interval=interval, recent=recent)
