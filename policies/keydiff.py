"""KeyDiff: Key Similarity-Based KV Cache Eviction.

https://arxiv.org/abs/2504.15364
"""

from kvpolicy import KeyDifference, Policy, TopK

__all__ = ["keydiff"]


def keydiff(budget: int, *, interval: int | None = 64, recent: int = 64) -> Policy:
    """Return KeyDiff: keep the tokens whose keys point away from the mean direction.

    Args:
        budget: slots kept per KV head.
        interval: decoded tokens between two evictions.
        recent: the last tokens, which always stay.

    Source: https://arxiv.org/abs/2504.15364, section 3.

    >>> keydiff(1024)
    Policy(KeyDifference() >> TopK(1024))
    """
    return Policy(KeyDifference() >> TopK(budget), interval=interval, recent=recent)
