"""The selector: top-k by tier, score and position."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvpolicy import _check
from kvpolicy.allocators import Allocator, Budget, Uniform
from kvpolicy.errors import ParameterError
from kvpolicy.scores import Keep, Scores, select_top
from kvpolicy.stage import Selector
from kvpolicy.view import View

__all__ = ["TopK"]


@dataclass(frozen=True, repr=False, init=False)
class TopK(Selector):
    """Keep the slots of each head that are highest in (tier, score, position).

    Exactly ``min(budget, tokens)`` slots of each head stay. Where guards protect more than the
    budget, the highest tiers stay, then the highest scores, and the receipt counts what had to go.

    Args:
        budget: slots kept per KV head after an eviction, or an allocator.

    >>> from kvpolicy import Pyramid
    >>> TopK(1024), TopK(Pyramid(1024))
    (TopK(1024), TopK(Pyramid(1024)))
    """

    allocator: Allocator

    def __init__(self, budget: int | Allocator) -> None:
        if isinstance(budget, type) or not isinstance(budget, int | Allocator):
            raise ParameterError(f"TopK({budget!r}): write a number of slots, such as TopK(1024), or an allocator")
        if isinstance(budget, int):
            _check.integer(self, "budget", budget, 1)
        object.__setattr__(self, "allocator", budget if isinstance(budget, Allocator) else Uniform(budget))

    def budgets(self, num_layers: int, recent: int) -> tuple[Budget, ...]:
        """Return what the allocator gives each layer."""
        return self.allocator.budgets(num_layers, recent)

    def sharing(self) -> Allocator:
        """Return the allocator."""
        return self.allocator

    def select(self, scores: Scores, view: View) -> Keep:
        """Return the highest ``view.budget`` slots of each head, or what the allocator makes of it where it shares."""
        budget = view.budget
        if view.sharing is not None:
            budget = torch.where(view.sharing[:, None], self.allocator.share(scores, view), budget)
        return select_top(scores, view, budget)

    def text(self, *, full: bool = False) -> str:
        """Return ``TopK(n)`` for a uniform budget."""
        inner = self.allocator
        return f"TopK({inner.budget if isinstance(inner, Uniform) else inner.text(full=full)})"
