"""Guards that protect a share of the tokens by their scores, or by the attention that they receive."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from kvpolicy import _check
from kvpolicy.scorers.attention import Attention
from kvpolicy.scores import Scores, Tier, mask_of, order_key, part, top
from kvpolicy.stage import Transform
from kvpolicy.view import StageState, View

__all__ = ["MassGuard", "ScoreGuard"]


@dataclass(frozen=True, repr=False)
class ScoreGuard(Transform):
    """Protect the tokens that score highest where it stands, whatever later stages make of their scores.

    So a sampler behind it draws among the others alone. Tokens that a guard before this one protects are
    no part of it: its slots come on top of theirs.

    Args:
        share: of what the last ``recent`` tokens leave of the budget, rounded down.

    Source: the first of CriticalKV's two stages, https://arxiv.org/abs/2502.03805, section 4; and NACL,
    https://arxiv.org/abs/2408.03675, which draws some of the others.

    >>> from kvpolicy import Attention, Policy, Stochastic, TopK
    >>> Policy(Attention() >> ScoreGuard(0.5) >> Stochastic() >> TopK(1024))
    Policy(ScoreGuard(0.5) >> Stochastic() >> TopK(1024))
    """

    additive: ClassVar[bool] = True

    share: float

    def __post_init__(self) -> None:
        _check.number(self, "share", self.share, 0, 1, above=True)

    def reserved(self, budget: int, recent: int) -> int:
        """Return the share of what the last tokens leave, rounded down."""
        return math.floor(max(0, budget - recent) * self.share + 1e-9)

    def apply(self, scores: Scores, view: View, state: StageState | None) -> Scores:
        """Return the scores with the highest of each head protected."""
        free = scores.tier == Tier.CANDIDATE
        key = torch.where(free, order_key(scores.values, view.positions), -1)
        count = torch.minimum(part((view.budget - view.recent).clamp(min=0), self.share), free.sum(-1))
        chosen = top(key, count, self.reserved(view.max_budget, view.recent))
        return scores.guard(mask_of(*chosen, view.shape[2]), Tier.VALUE)


@dataclass(frozen=True, repr=False)
class MassGuard(Transform):
    """Protect the fewest tokens that together receive most of the attention.

    The attention is that of ``Attention(window, pool=1, over="all")``, over its sum over the candidates. The
    token at which the sum reaches the share is not protected any more. They are never more than what the last
    tokens leave of the budget.

    Args:
        share: of the attention.
        window: how many of the newest queries are asked.

    Source: DefensiveKV, https://arxiv.org/abs/2510.13334, read in its code, https://github.com/FFY0/DefensiveKV.

    >>> from kvpolicy import Policy, TopK, WorstAttention
    >>> Policy(WorstAttention() >> MassGuard(0.9) >> TopK(1024), recent=32)
    Policy(WorstAttention() >> MassGuard() >> TopK(1024), recent=32)
    """

    needs: ClassVar[frozenset[str]] = frozenset({"queries"})

    share: float = 0.9
    window: int = 32

    def __post_init__(self) -> None:
        _check.number(self, "share", self.share, 0, 1, above=True)
        _check.integer(self, "window", self.window, 1)

    def queries_read(self, interval: int | None) -> int:
        """Return the window."""
        return self.window

    def reserved_most(self, budget: int, recent: int) -> int:
        """Return all that the last tokens leave of the budget: how evenly attention is spread decides."""
        return max(0, budget - recent)

    def apply(self, scores: Scores, view: View, state: StageState | None) -> Scores:
        """Return the scores with the tokens of the most attention protected."""
        asked = Attention(self.window, pool=1, over="all").score(view, None).values.to(torch.float64)
        asked = torch.where(view.candidates, asked, 0)
        key = torch.where(view.candidates, order_key(asked, view.positions), -1)
        limit = min(self.reserved_most(view.max_budget, view.recent), view.shape[2])
        slots = key.topk(limit, dim=-1).indices
        shares = asked.gather(-1, slots) / asked.sum(-1, keepdim=True).clamp(min=1e-300)
        count = (shares.cumsum(-1) < self.share - 1e-9).sum(-1)
        room = (view.budget - view.recent).clamp(min=0)
        count = torch.minimum(count, torch.minimum(room, view.num_candidates))
        chosen = torch.arange(limit, device=slots.device) < count[..., None]
        return scores.guard(mask_of(slots, chosen, view.shape[2]), Tier.VALUE)
