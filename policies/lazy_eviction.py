"""LazyEviction: Lagged KV Eviction with Attention Pattern Observation for Efficient Long Reasoning.

https://arxiv.org/abs/2506.15969
"""

from kvpolicy import Policy, Recurrence, TopK
from kvpolicy.scorers.every_query import window_for

__all__ = ["lazy_eviction"]


def lazy_eviction(
    budget: int, *, threshold: float = 1e-4, interval: int | None = 64, recent: int | None = None
) -> Policy:
    """Return LazyEviction: keep the tokens that may come back, having been silent no longer than before.

    Read in a copy of the official code. A second-hand account of the paper writes the two terms as
    ``2 sigmoid(-age / pause)`` and ``2 sigmoid(-1 / pause)``; these are the code's. The code never cuts a
    prompt and asks its queries nothing; here the newest of them are asked, and the prompt is cut.

    Args:
        budget: slots kept per KV head.
        threshold: probability from which a token counts as attended to, ``alpha``.
        interval: decoded tokens between two evictions, ``W``; the scripts use 101 to 363, by the task; None
            evicts at the end of a turn only.
        recent: the last tokens, which always stay; ``interval``, as published, where None, or 64 without one.

    Source: https://arxiv.org/abs/2506.15969, section 4, and https://github.com/Halo-949/LazyEviction.

    >>> lazy_eviction(1024)
    Policy(Recurrence(threshold=0.0001) >> TopK(1024))
    """
    recent = (interval or 64) if recent is None else recent
    score = Recurrence(window_for(interval), threshold=threshold)
    return Policy(score >> TopK(budget), interval=interval, recent=recent)
