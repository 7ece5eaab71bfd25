"""A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression.

https://arxiv.org/abs/2406.11430
"""

from kvpolicy import KeyNorm, Policy, TopK

__all__ = ["knorm"]


def knorm(budget: int, *, interval: int | None = 64, recent: int = 64) -> Policy:
    """Return the key-norm policy: keep the tokens whose keys are shortest.

    Args:
        budget: slots kept per KV head.
        interval: decoded tokens between two evictions.
        recent: the last tokens, which always stay.

    Source: https://arxiv.org/abs/2406.11430, section 3. The paper leaves its first layers alone.

    >>> knorm(1024)
    Policy(KeyNorm() >> TopK(1024))
    """
    return Policy(KeyNorm() >> TopK(budget), interval=interval, recent=recent)
