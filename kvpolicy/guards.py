"""Guards: transforms that protect slots from eviction, whatever their scores."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from kvpolicy import _check
from kvpolicy.scorers.tokens import Norm, magnitude
from kvpolicy.scores import Scores, Tier, mask_of, order_key, part, top
from kvpolicy.stage import Transform
from kvpolicy.token_number import TokenNumber
from kvpolicy.view import StageState, View

__all__ = ["Prompt", "Sinks", "ValueGuard"]


@dataclass(frozen=True, repr=False)
class ValueGuard(TokenNumber, Transform):
    """Protect the tokens whose values are largest, and the attention sinks among them.

    A few value states have an abnormally large magnitude, and evicting them sends a model into
    repetition loops. Sinks have small values and must be named apart; they count inside the share.

    Args:
        share: of the budget, rounded down.
        norm: how large a value is: ``"range"``, ``"l2"``, ``"absmax"``, ``"var"`` or ``"l1"``.
        sinks: first tokens of a sequence, protected first.

    Source: VaSE (arXiv 2606.03928): the guard set of VaSE-AttnV, a quarter of the budget.

    >>> from kvpolicy import Policy, TopK
    >>> Policy(ValueGuard(share=0.5) >> TopK(1024))
    Policy(ValueGuard(share=0.5) >> TopK(1024))
    """

    share: float = 0.25
    norm: Norm = "range"
    sinks: int = 4

    def __post_init__(self) -> None:
        _check.number(self, "share", self.share, 0, 1, above=True)
        _check.choice(self, "norm", self.norm, get_args(Norm))
        _check.integer(self, "sinks", self.sinks, 0)

    def reserved(self, budget: int, recent: int) -> int:
        """Return the share of the budget, rounded down."""
        return math.floor(budget * self.share + 1e-9)

    def reserved_first(self, budget: int, recent: int) -> int:
        """Return the sinks, as far as they fit into the share."""
        return min(self.sinks, self.reserved(budget, recent))

    def number(self, keys: Tensor, values: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the magnitude of each value."""
        return magnitude(values, self.norm, dtype)

    def apply(self, scores: Scores, view: View, state: StageState | None) -> Scores:
        """Return the scores with sinks and the largest values of each head protected."""
        size, candidates = view.shape[2], view.candidates
        count = part(view.budget, self.share)
        # Where the share holds fewer, the first of the sinks are the ones.
        sinks = candidates & (view.positions < count.clamp(max=self.sinks)[..., None])
        values = torch.where(sinks, torch.inf, self.numbers(state))
        key = torch.where(candidates, order_key(values, view.positions), -1)
        count = torch.minimum(count, candidates.sum(-1))
        slots, chosen = top(key, count, self.reserved(view.max_budget, view.recent))
        large = mask_of(slots, chosen, size)
        return scores.guard(large, Tier.VALUE).guard(large & sinks, Tier.SINK)


@dataclass(frozen=True, repr=False)
class Sinks(Transform):
    """Protect the first ``n`` tokens of a sequence, the attention sinks.

    Args:
        n: how many.

    Source: StreamingLLM (arXiv 2309.17453, section 3.1).

    >>> from kvpolicy import Policy, Recency, TopK
    >>> Policy(Recency() >> Sinks(4) >> TopK(512))
    Policy(Recency() >> Sinks(4) >> TopK(512))
    """

    n: int

    def __post_init__(self) -> None:
        _check.integer(self, "n", self.n, 0)

    def reserved(self, budget: int, recent: int) -> int:
        """Return ``n``."""
        return self.n

    def reserved_first(self, budget: int, recent: int) -> int:
        """Return ``n``: all of them."""
        return self.n

    def apply(self, scores: Scores, view: View, state: StageState | None) -> Scores:
        """Return the scores with the first tokens protected."""
        return scores.guard(view.candidates & (view.positions < self.n), Tier.SINK)


@dataclass(frozen=True, repr=False)
class Prompt(Transform):
    """Protect the prompt: all of it where it fits into its share, both ends of a longer one.

    Later turns of a conversation are not prompt.

    Args:
        share: of the budget, rounded down.

    Source: Random Attention (arXiv 2609.03430), which protects the whole prompt, and the
    boundary protection of arXiv 2605.18053.

    >>> from kvpolicy import Constant, Policy, Stochastic, TopK
    >>> Policy(Constant() >> Prompt() >> Stochastic() >> TopK(1024))
    Policy(Constant() >> Prompt() >> Stochastic() >> TopK(1024))
    """

    share: float = 0.5

    def __post_init__(self) -> None:
        _check.number(self, "share", self.share, 0, 1, above=True)

    def reserved(self, budget: int, recent: int) -> int:
        """Return the share of the budget, rounded down, which a prompt may fill."""
        return math.floor(budget * self.share + 1e-9)

    def reserved_first(self, budget: int, recent: int) -> int:
        """Return the first end of a long prompt."""
        return self.reserved(budget, recent) - self.reserved(budget, recent) // 2

    def apply(self, scores: Scores, view: View, state: StageState | None) -> Scores:
        """Return the scores with the prompt, or its two ends, protected."""
        room = part(view.budget, self.share)[..., None]
        length = view.prompt_length[:, None, None]
        first = torch.where(length <= room, length, room - room // 2)
        last = torch.where(length <= room, 0, room // 2)
        at = view.positions
        inside = (at < first) | ((at >= length - last) & (at < length))
        return scores.guard(view.candidates & inside, Tier.PROMPT)
