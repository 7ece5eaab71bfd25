"""NACL: A General and Effective KV Cache Eviction Framework for LLMs at Inference Time.

https://arxiv.org/abs/2408.03675
"""

from kvpolicy import Attention, BudgetError, Normalize, Policy, ScoreGuard, Sinks, Stochastic, TopK

__all__ = ["nacl"]


def nacl(
    budget: int,
    *,
    share: float = 0.6,
    window: int | None = None,
    sinks: int | None = None,
    recent: int | None = None,
    seed: int = 0,
    interval: int | None = None,
) -> Policy:
    """Return NACL: keep what proxy queries attend to most, and a sample of the rest by the softmax of the same scores.

    Read in the official code, which takes its numbers as parts of the prompt's length, a fifth of which it
    keeps in all; here they are the same parts of the budget, and 256 sinks, which the code keeps of 128
    thousand tokens, are one in a hundred of it. The code adds the probabilities of the proxies, where
    the mean is taken here, so that the sample is still closer to a uniform one; it leaves prompts below
    2048 tokens whole.

    Args:
        budget: slots kept per KV head.
        share: of the budget, for the tokens with the highest scores; the sample has what is left.
        window: proxies, the newest queries; a twentieth of the budget where None.
        sinks: first tokens that always stay; a hundredth of the budget where None.
        recent: the last tokens, which always stay; a twenty-fifth of the budget where None.
        seed: of the sample.
        interval: decoded tokens between two evictions; None, as published, evicts once.

    Raises:
        BudgetError: the share does not fit into what the last tokens leave of the budget.

    Source: https://arxiv.org/abs/2408.03675, section 3, and
    https://github.com/PaddlePaddle/Research (NLP/ACL2024-NACL).

    >>> nacl(1024)
    Policy(Attention(window=51, pool=1, over='all') >> Sinks(10) >> ScoreGuard(0.624390243902439)
        >> Normalize('softmax') >> Stochastic() >> TopK(1024), interval=None, recent=40)
    """
    window = max(1, budget // 20) if window is None else window
    sinks = max(1, budget // 100) if sinks is None else sinks
    recent = max(1, budget // 25) if recent is None else recent
    rest = budget - recent  # no room at all is refused by the plan, as everywhere
    if 0 < rest < share * budget:
        raise BudgetError(
            f"nacl({budget}, share={share}, recent={recent}): the share is {share * budget:g} slots, and the last "
            f"tokens leave {rest}; write a share of at most {rest * 100 // budget / 100}"
        )
    # What the guard takes a share of is the rest.
    top = ScoreGuard(share if rest <= 0 else share * budget / rest)
    scores = Attention(window, pool=1, over="all") >> Sinks(sinks) >> top
    sample = Normalize("softmax") >> Stochastic(seed=seed)
    return Policy(scores >> sample >> TopK(budget), interval=interval, recent=recent)
