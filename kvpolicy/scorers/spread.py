"""Scorers that look at the attention of each query of the window, and not at its mean alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from kvpolicy import _check
from kvpolicy.each_query import each_query
from kvpolicy.scorers.attention import newest, smooth
from kvpolicy.scores import Scores
from kvpolicy.stage import Scorer
from kvpolicy.view import StageState, View

__all__ = ["SpreadAttention", "WorstAttention", "moments"]

_TINY = 1e-30


@dataclass(frozen=True, repr=False)
class SpreadAttention(Scorer):
    """Score a token by the mean of the attention it receives, and by how much that varies over the queries.

    ``mean + gamma * variance`` over the newest queries, of the softmax over all slots; the mean over the
    query heads of a group, then over neighbours in position among the candidates.

    Args:
        window: how many of the newest queries are asked, at least 2.
        pool: width of the average over neighbouring positions; odd, 1 for none.
        gamma: weight of the variance, that of a sample (over ``window - 1``).

    Source: CAKE, https://arxiv.org/abs/2503.12491, section 4.3.

    >>> from kvpolicy import Policy, TopK
    >>> Policy(SpreadAttention() >> TopK(1024), recent=32)
    Policy(SpreadAttention() >> TopK(1024), recent=32)
    """

    needs: ClassVar[frozenset[str]] = frozenset({"queries"})

    window: int = 32
    pool: int = 5
    gamma: float = 200.0

    def __post_init__(self) -> None:
        _check.integer(self, "window", self.window, 2)
        _check.odd(self, "pool", self.pool)
        _check.number(self, "gamma", self.gamma, 0)

    def queries_read(self, interval: int | None) -> int:
        """Return the window."""
        return self.window

    def score(self, view: View, state: StageState | None) -> Scores:
        """Return the mixture of mean and variance, as weights."""
        b, h, s = view.shape
        amount = torch.zeros(b * h, s, dtype=view.compute_dtype, device=view.positions.device)
        for at, shares, _, positions in each_query(view, *newest(view, self.window), whole=True):
            mean, variance = moments(shares[:, 0], positions >= 0)
            amount[at] += mean + self.gamma * variance
        assert view.queries is not None
        amount = amount.view(b, h, s) / (view.queries.shape[1] // h)
        return Scores.of(view, smooth(amount, view.order, view.num_candidates, self.pool), weights=True)


@dataclass(frozen=True, repr=False)
class WorstAttention(Scorer):
    """Score a token by the most attention that any query of the window pays it: what losing it costs at worst.

    The softmax over all slots, averaged over neighbours in position among the candidates so that each query
    gives as much as before, then the largest over queries and group. No candidate scores less than their
    mean: little attention so far is no proof.

    Args:
        window: how many of the newest queries are asked.
        pool: width of the average over neighbouring positions; odd, 1 for none.

    Source: DefensiveKV, https://arxiv.org/abs/2510.13334, and its code, https://github.com/FFY0/DefensiveKV.

    >>> from kvpolicy import Policy, TopK
    >>> Policy(WorstAttention() >> TopK(1024), recent=32)
    Policy(WorstAttention() >> TopK(1024), recent=32)
    """

    needs: ClassVar[frozenset[str]] = frozenset({"queries"})

    window: int = 32
    pool: int = 5

    def __post_init__(self) -> None:
        _check.integer(self, "window", self.window, 1)
        _check.odd(self, "pool", self.pool)

    def queries_read(self, interval: int | None) -> int:
        """Return the window."""
        return self.window

    def score(self, view: View, state: StageState | None) -> Scores:
        """Return the largest shares, raised to their mean, as weights."""
        b, h, s = view.shape
        slots = view.order.to(torch.int64).flatten(0, 1)
        count = view.num_candidates.flatten()[:, None]
        inside = torch.arange(s, device=slots.device) < count
        worst = torch.zeros(b * h, s, dtype=view.compute_dtype, device=slots.device)  # in position order
        for at, paid, *_ in each_query(view, *newest(view, self.window), whole=True):
            shares = paid[:, 0]
            ordered = shares.gather(-1, slots[at, None].expand_as(shares))
            ordered = torch.where(inside[at, None], ordered, 0)
            pooled = F.avg_pool1d(ordered, self.pool, stride=1, padding=self.pool // 2)
            pooled = torch.where(inside[at, None], pooled, 0)
            total = pooled.sum(-1, keepdim=True).clamp(min=_TINY)
            worst[at] = worst[at].maximum((pooled / total * ordered.sum(-1, keepdim=True)).amax(1))
        least = worst.sum(-1, keepdim=True) / count.clamp(min=1)
        raised = torch.where(inside, worst.maximum(least), 0)
        return Scores.of(view, torch.zeros_like(raised).scatter(-1, slots, raised).view(b, h, s), weights=True)


def moments(shares: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance over the queries that are there, ``[N, S]`` each; 0 where they are too few."""
    count = there.sum(-1)[:, None]
    mean = shares.sum(1) / count.clamp(min=1)
    apart = torch.where(there[..., None], shares - mean[:, None], 0)
    return mean, apart.square().sum(1) / (count - 1).clamp(min=1)
