"""Nexus Sampling: Forget Without Compromise, Streaming KV-Cache Eviction Under Fixed Budgets.

https://arxiv.org/abs/2606.23961
"""

from kvpolicy import Attention, Policy, Stochastic, TopK

__all__ = ["nexus"]


def nexus(budget: int, *, window: int = 64, seed: int = 0, interval: int | None = 64, recent: int = 64) -> Policy:
    """Return Nexus sampling: keep a weighted reservoir, each token with a chance that grows with its attention.

    Half of the method: the paper was read in its abstract alone, and no code was found. Its sampling is here,
    priorities ``u ** (1 / weight)`` with a ``u`` that stays with its token (Efraimidis and Spirakis; the same
    sets as Gumbel noise on the logarithm of the weight). Its weights are not: they come from a walk over
    attention, of which the abstract says no more; here they are the attention of the newest queries, unsmoothed.

    Args:
        budget: slots kept per KV head.
        window: newest queries that are asked.
        seed: of the priorities.
        interval: decoded tokens between two evictions.
        recent: the last tokens, which always stay.

    Source: https://arxiv.org/abs/2606.23961, abstract.

    >>> nexus(1024)
    Policy(Attention(pool=1) >> Stochastic(redraw=False) >> TopK(1024))
    """
    chain = Attention(window, pool=1) >> Stochastic(seed=seed, redraw=False) >> TopK(budget)
    return Policy(chain, interval=interval, recent=recent)
