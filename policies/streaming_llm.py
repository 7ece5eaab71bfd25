"""StreamingLLM: Efficient Streaming Language Models with Attention Sinks.

https://arxiv.org/abs/2309.17453
"""

from kvpolicy import Policy, Recency, Sinks, TopK

__all__ = ["streaming_llm"]


def streaming_llm(budget: int, *, sinks: int = 4, interval: int | None = 64, recent: int = 64) -> Policy:
    """Return StreamingLLM: keep the first few tokens and the most recent ones.

    Keys keep the rotation of their true positions; the paper assigns positions inside the cache.

    Args:
        budget: slots kept per KV head.
        sinks: first tokens that always stay.
        interval: decoded tokens between two evictions.
        recent: the last tokens, which always stay.

    Source: https://arxiv.org/abs/2309.17453, section 3.2.

    >>> streaming_llm(1024)
    Policy(Recency() >> Sinks(4) >> TopK(1024))
    """
    return Policy(Recency() >> Sinks(sinks) >> TopK(budget), interval=interval, recent=recent)
