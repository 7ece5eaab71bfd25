"""DefensiveKV: Taming the Fragility of KV Cache Eviction in LLM Inference.

https://arxiv.org/abs/2510.13334
"""

from kvpolicy import Adaptive, MassGuard, OutputNorm, Policy, TopK, WorstAttention

__all__ = ["defensivekv"]


def defensivekv(
    budget: int, *, share: float = 0.9, window: int = 32, pool: int = 5, interval: int | None = None
) -> Policy:
    """Return DefensiveKV: keep what any of the last queries attends to, weighed by what it does to the output.

    The largest attention over queries and group, and not its mean, raised to its mean over the tokens, times
    the norm of the projected value; the tokens with 90 % of the attention stay before all others. Heads share
    their layer's slots. Compresses the prompt once and lets the cache grow afterwards; with an ``interval`` it
    goes on while decoding. It reads the output projections of the model, so that it runs in transformers alone.

    Args:
        budget: slots kept per KV head, on average over the heads of a layer.
        share: of the attention, whose tokens are protected.
        window: queries asked, and tokens that always stay.
        pool: width of the average over neighbouring positions.
        interval: decoded tokens between two evictions; None, as published, evicts once.

    Source: https://arxiv.org/abs/2510.13334; formula and defaults were read in the official code,
    https://github.com/FFY0/DefensiveKV. There the share is lessened by the attention that the tokens just
    before the window receive; here it is taken as it is. Layer-DefensiveKV, which shares slots over layers by what
    it sees, is not here: memory is allocated before any token is seen.

    >>> defensivekv(1024)
    Policy(WorstAttention() >> OutputNorm(relative=True) >> MassGuard() >> TopK(Adaptive(1024, floor=0.0)), ...)
    """
    chain = WorstAttention(window, pool) >> OutputNorm(relative=True) >> MassGuard(share, window)
    return Policy(chain >> TopK(Adaptive(budget, 0.0)), interval=interval, recent=window)
