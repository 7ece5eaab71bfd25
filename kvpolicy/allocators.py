"""Budget allocators: how many slots each layer may keep; for its heads see :mod:`kvpolicy.heads`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, TypeAlias

from torch import Tensor

from kvpolicy import _check
from kvpolicy.stage import call_text

if TYPE_CHECKING:
    from kvpolicy.scores import Scores
    from kvpolicy.view import View

__all__ = ["Allocator", "Budget", "Uniform"]

#: Slots that each KV head of a layer keeps, or one number a head; None leaves the layer alone.
Budget: TypeAlias = "int | tuple[int, ...] | None"


class Allocator:
    """Say how many slots each KV head of each layer keeps.

    A subclass is a frozen dataclass. Budgets count every slot kept after an eviction, guards and
    the last ``recent`` tokens among them.

    Attributes:
        head_wise: heads of one layer may keep different numbers of slots; engines must offer it.
        shared: :meth:`share` divides a layer's total over its heads by what it sees.
        refresh: evictions between two such divisions; None divides once, at the first eviction.
    """

    head_wise: ClassVar[bool] = False
    shared: ClassVar[bool] = False
    refresh: int | None = None

    def budgets(self, num_layers: int, recent: int) -> tuple[Budget, ...]:
        """Return the slots that each KV head of each layer keeps; None leaves a layer alone."""
        raise NotImplementedError(f"{type(self).__name__} has no budgets(num_layers, recent)")

    def least(self, budget: int, recent: int) -> int:
        """Return the fewest slots that a head of a layer may be given: guards must fit into them."""
        return budget

    def share(self, scores: Scores, view: View) -> Tensor:
        """Return the slots that each head keeps, ``[B, H]``; rows keep the sum of ``view.budget``, exactly."""
        raise NotImplementedError(f"{type(self).__name__} has no share(scores, view)")

    def __repr__(self) -> str:
        """Return text that evaluates back to an equal allocator."""
        return call_text(self)


@dataclass(frozen=True, repr=False)
class Uniform(Allocator):
    """Give every KV head of every layer the same number of slots.

    Args:
        budget: slots kept per KV head after an eviction.

    >>> from kvpolicy import TopK
    >>> TopK(Uniform(1024)) == TopK(1024)
    True
    """

    budget: int

    def __post_init__(self) -> None:
        _check.integer(self, "budget", self.budget, 1)

    def budgets(self, num_layers: int, recent: int) -> tuple[Budget, ...]:
        """Return the budget for every layer."""
        return (self.budget,) * num_layers
