"""CurDKV: Value-Guided KV Compression for LLMs via Approximated CUR Decomposition.

https://arxiv.org/abs/2509.15038
"""

from kvpolicy import Leverage, Policy, Sinks, TopK

__all__ = ["curdkv"]


def curdkv(
    budget: int,
    *,
    rank: int | None = None,
    local: int | None = 16,
    seed: int = 0,
    sinks: int = 4,
    interval: int | None = None,
    recent: int = 64,
) -> Policy:
    """Return CurDKV: keep the tokens with the largest products of key and value leverage, and the first ones.

    Leverage is the squared norm, over the sum of those of 16 neighbours. Compresses the prompt once and lets
    the cache grow afterwards; with an ``interval`` it goes on while decoding.

    Args:
        budget: slots kept per KV head.
        rank: columns of a random projection of keys and values, which then stays; None projects nothing.
        local: tokens of a block whose sum divides each squared norm; None leaves it out.
        seed: of the projection.
        sinks: first tokens that always stay.
        interval: decoded tokens between two evictions; None, as published, evicts once.
        recent: the last tokens, which always stay; the code has no such rule.

    Source: https://arxiv.org/abs/2509.15038, section 3; formula and defaults were read in CURPress of
    https://github.com/NVIDIA/kvpress, not in code of the authors. There blocks are counted from the first
    token of the prompt; here from the oldest one held, which is the same at the first eviction.
    ``curdkv(b, rank=20, local=None, interval=64)`` is the baseline of VaSE's authors (``cur_fixed_gauss``,
    https://github.com/terarachang/VaSE).

    >>> curdkv(1024)
    Policy(Leverage(rank=None, resample=False, local=16) >> Sinks(4) >> TopK(1024), interval=None)
    """
    scorer = Leverage(rank, resample=False, seed=seed, local=local)
    return Policy(scorer >> Sinks(sinks) >> TopK(budget), interval=interval, recent=recent)
