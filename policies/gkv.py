"""G-KV: Decoding-Time KV Cache Eviction with Global Attention.

https://arxiv.org/abs/2512.00504
"""

from kvpolicy import DecayedAttention, Normalize, Policy, Redundancy, TopK, _check

__all__ = ["gkv"]


def gkv(
    budget: int,
    *,
    decay: float = 0.8,
    importance: float = 0.5,
    window: int = 16,
    interval: int | None = 128,
) -> Policy:
    """Return G-KV: keep what was attended to at this eviction or an earlier one, and repeats others least.

    Read in the official code. There the largest of a group's query heads counts, the resemblance is taken
    to all slots, and the newest of similar keys is spared; here the mean of the group, and the resemblance
    to the other candidates alone. The models that the paper trains are no part of it.

    Args:
        budget: slots kept per KV head; the official scripts use 2048.
        decay: what is left of a score at the next eviction, ``alpha``.
        importance: weight of attention, ``lambda``, from 0 to 1; redundancy has the rest.
        window: queries asked, and the last tokens, which always stay.
        interval: decoded tokens between two evictions.

    Raises:
        ParameterError: the importance is no number from 0 to 1.

    Source: https://arxiv.org/abs/2512.00504, section 3, and https://github.com/microsoft/G-KV.

    >>> gkv(1024)
    Policy((0.5 * DecayedAttention() + 0.5 * (Redundancy() >> Normalize('max'))) >> TopK(1024),
        interval=128, recent=16)
    """
    _check.number("gkv", "importance", importance, 0, 1)
    mixed = importance * DecayedAttention(window, decay) + (1 - importance) * (Redundancy() >> Normalize("max"))
    return Policy(mixed >> TopK(budget), interval=interval, recent=window)
