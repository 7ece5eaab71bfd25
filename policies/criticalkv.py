"""CriticalKV: Identify Critical KV Cache in LLM Inference from an Output Perturbation Perspective.

https://arxiv.org/abs/2502.03805
"""

from kvpolicy import Attention, OutputNorm, Policy, ScoreGuard, TopK

__all__ = ["criticalkv"]


def criticalkv(
    budget: int,
    *,
    share: float = 0.5,
    epsilon: float = 1e-4,
    window: int = 64,
    pool: int = 5,
    interval: int | None = None,
) -> Policy:
    """Return CriticalKV: keep what is attended to most, then what changes the output of its layer most.

    Half of the slots by SnapKV's scores; the others by these times the norm of the projected value.
    Compresses the prompt once and lets the cache grow afterwards; with an ``interval`` it goes on while
    decoding. It reads the output projections of the model, so that it runs in transformers alone.

    Args:
        budget: slots kept per KV head.
        share: of what the last tokens leave of the budget, for the first choice.
        epsilon: added to the attention before it is multiplied.
        window: queries asked, and tokens that always stay.
        pool: width of the average over neighbouring positions.
        interval: decoded tokens between two evictions; None, as published, evicts once.

    Source: https://arxiv.org/abs/2502.03805, section 4; formula and defaults were read in CriticalKVPress of
    https://github.com/NVIDIA/kvpress, around its SnapKV. There the share is of the whole budget, the last tokens
    among its choice.

    >>> criticalkv(1024)
    Policy(Attention(over='all') >> ScoreGuard(0.5) >> OutputNorm(epsilon=0.0001) >> TopK(1024),
        interval=None)
    """
    chain = Attention(window, pool, over="all") >> ScoreGuard(share) >> OutputNorm(epsilon) >> TopK(budget)
    return Policy(chain, interval=interval, recent=window)
