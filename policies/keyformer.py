"""Keyformer: KV Cache Reduction through Key Tokens Selection for Efficient Generative Inference.

https://arxiv.org/abs/2403.09054
"""

from kvpolicy import PerturbedAttention, Policy, TopK
from kvpolicy.scorers.every_query import window_for

__all__ = ["keyformer"]


def keyformer(
    budget: int,
    *,
    recent: int | None = None,
    temperature: float = 1.0,
    highest: float = 2.0,
    growth: float = 0.01,
    seed: int = 0,
    interval: int | None = 64,
) -> Policy:
    """Return Keyformer: keep the tokens with the most accumulated attention under Gumbel noise, and the latest.

    Read in the official code, whose temperature grows by 0.01 with each token for ever; the paper lets it
    come to 2 at the last token (second-hand), and so does this at the hundredth. The code counts every query
    of the prompt and evicts at each step; here the newest 64 of a prompt count.

    Args:
        budget: slots kept per KV head; the official code keeps 60 % of the prompt's length.
        recent: the last tokens, which always stay; 30 % of the budget, as in the official code, where None.
        temperature: of the softmax over the prompt, ``tau_init``.
        highest: temperature at most, ``tau_end``.
        growth: of the temperature with each decoded token, ``tau_delta``.
        seed: of the noise.
        interval: decoded tokens between two evictions; 1 as published; None evicts at the end of a turn only.

    Source: https://arxiv.org/abs/2403.09054, section 3, and https://github.com/d-matrix-ai/keyformer-llm.

    >>> keyformer(1024)
    Policy(PerturbedAttention() >> TopK(1024), recent=307)
    """
    recent = max(1, budget * 3 // 10) if recent is None else recent
    score = PerturbedAttention(window_for(interval), temperature, highest, growth, seed)
    return Policy(score >> TopK(budget), interval=interval, recent=recent)
