"""RaaS: Reasoning-Aware Attention Sparsity for Efficient LLM Reasoning.

https://arxiv.org/abs/2502.11147
"""

from kvpolicy import LastAttended, Policy, Prompt, TopK
from kvpolicy.scorers.every_query import window_for

__all__ = ["raas"]


def raas(
    budget: int, *, share: float = 0.5, prompt: float | None = None, interval: int | None = 64, recent: int = 64
) -> Policy:
    """Return RaaS: keep the prompt, and the tokens that were among the most attended ones most recently.

    The timestamps were read in the official repository, which stamps the higher half of the pages that a
    query reads; that the prompt stays, and a threshold of 0.0001 in place of the half, second-hand.
    There pages of 16 tokens are stamped and evicted at each step; here single tokens, at each interval, by
    the same timestamps.

    Args:
        budget: slots kept per KV head.
        share: of the slots that a query sees, which it stamps: those with the highest probabilities.
        prompt: share of the budget that the prompt may have; all but the ``recent`` where None, as published.
        interval: decoded tokens between two evictions; 1 as published; None evicts at the end of a turn only.
        recent: the last tokens, which always stay.

    Source: https://arxiv.org/abs/2502.11147, section 3, and https://github.com/DerekHJH/RaaS.

    >>> raas(1024)
    Policy(LastAttended(share=0.5) >> Prompt(share=0.9375) >> TopK(1024))
    """
    prompt = max(1, budget - recent) / budget if prompt is None else prompt
    score = LastAttended(window_for(interval), share=share)
    return Policy(score >> Prompt(prompt) >> TopK(budget), interval=interval, recent=recent)
