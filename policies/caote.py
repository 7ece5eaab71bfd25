"""CAOTE: KV Cache Selection for LLMs via Attention Output Error-Based Token Eviction.

https://arxiv.org/abs/2504.14051
"""

from kvpolicy import AccumulatedAttention, OutputError, Policy, Scorer, TopK
from kvpolicy.scorers.every_query import window_for

__all__ = ["caote"]


def caote(
    budget: int, *, scorer: Scorer | None = None, fast: bool = False, interval: int | None = 64, recent: int = 64
) -> Policy:
    """Return CAOTE: keep the tokens without which attention's output would change most.

    The formula, its normalisation and FastCAOTE were read second-hand, in notes on the paper; no official
    code was found. The change is that of one token alone, though many leave at once, as in the paper's
    prompts. Weights are averaged over the query heads of a group first.

    Args:
        budget: slots kept per KV head.
        scorer: gives the weights; where None, ``AccumulatedAttention()``, the paper's H2O.
            ``LastQuery()`` is its TOVA, ``Attention(over='all')`` its SnapKV.
        fast: measure values from their plain mean, as FastCAOTE, instead of the output.
        interval: decoded tokens between two evictions; None evicts at the end of a turn only.
        recent: the last tokens, which always stay.

    Source: https://arxiv.org/abs/2504.14051, section 3 (theorem 3.2).

    >>> caote(1024)
    Policy(AccumulatedAttention() >> OutputError() >> TopK(1024))
    """
    scorer = AccumulatedAttention(window_for(interval)) if scorer is None else scorer
    return Policy(scorer >> OutputError(fast) >> TopK(budget), interval=interval, recent=recent)
