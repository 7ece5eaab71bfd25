"""Random Attention: uniform random eviction with a protected prompt, the baseline to beat.

https://arxiv.org/abs/2609.03430
"""

from kvpolicy import Constant, Policy, Prompt, Stochastic, TopK

__all__ = ["random_eviction"]


def random_eviction(
    budget: int,
    *,
    share: float | None = 0.5,
    seed: int = 0,
    redraw: bool = True,
    interval: int | None = 64,
    recent: int = 64,
) -> Policy:
    """Return Random Attention: keep the prompt, and a uniform sample of all else.

    The paper's method where the prompt fits into its share of the budget; the paper protects all of it, as
    ``share=None`` does.

    Args:
        budget: slots kept per KV head.
        share: of the budget, for the prompt; both ends of a longer prompt stay. None leaves the prompt all but
            the ``recent`` slots, as published.
        seed: of the sample.
        redraw: draw afresh at every eviction; otherwise the kept tokens are one uniform sample of
            the whole history.
        interval: decoded tokens between two evictions.
        recent: the last tokens, which always stay.

    Source: https://arxiv.org/abs/2609.03430, which protects the whole prompt.

    >>> random_eviction(1024)
    Policy(Constant() >> Prompt() >> Stochastic() >> TopK(1024))
    >>> random_eviction(1024, share=None)
    Policy(Constant() >> Prompt(share=0.9375) >> Stochastic() >> TopK(1024))
    """
    share = max(1, budget - recent) / budget if share is None else share
    return Policy(
        Constant() >> Prompt(share) >> Stochastic(1.0, seed, redraw) >> TopK(budget), interval=interval, recent=recent
    )
