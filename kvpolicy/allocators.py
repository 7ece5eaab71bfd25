"""Budget allocators: how many slots each layer, and each head, may keep."""

from __future__ import annotations

from dataclasses import dataclass

from kvpolicy import _check
from kvpolicy.stage import call_text

__all__ = ["Allocator", "Uniform"]


class Allocator:
    """Say how many slots each KV head of each layer keeps.

    A subclass is a frozen dataclass. Budgets count every slot kept after an eviction, guards and
    the last ``recent`` tokens among them.
    """

    def budgets(self, num_layers: int, recent: int) -> tuple[int | None, ...]:
        """Return the slots that each KV head of each layer keeps; None leaves a layer alone."""
        raise NotImplementedError(f"{type(self).__name__} has no budgets(num_layers, recent)")

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

    def budgets(self, num_layers: int, recent: int) -> tuple[int | None, ...]:
        """Return the budget for every layer."""
        return (self.budget,) * num_layers
