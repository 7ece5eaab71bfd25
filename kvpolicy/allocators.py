"""Budget allocators: how many slots each layer may keep; for its heads see :mod:`kvpolicy.heads`."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import floor
from typing import TYPE_CHECKING, ClassVar, TypeAlias

from torch import Tensor

from kvpolicy import _check
from kvpolicy.errors import BudgetError, ParameterError
from kvpolicy.stage import call_text

if TYPE_CHECKING:
    from kvpolicy.scores import Scores
    from kvpolicy.view import View

__all__ = ["Allocator", "Budget", "PerLayer", "Proportional", "Pyramid", "Uniform"]

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

    @property
    def layers_named(self) -> int | None:
        """Return how many layers it has budgets for, and no model of another number; None where any number will do."""
        return None

    @property
    def layered(self) -> bool:
        """Return whether layers may get different numbers of slots; so they may where layers are named."""
        return self.layers_named is not None

    def budgets(self, num_layers: int, recent: int) -> tuple[Budget, ...]:
        """Return the slots that each KV head of each layer keeps; None leaves a layer alone."""
        raise NotImplementedError(f"{type(self).__name__} has no budgets(num_layers, recent)")

    def least(self, budget: int, recent: int) -> int:
        """Return the fewest slots that a head of a layer may be given: guards must fit into them."""
        return budget

    def share(self, scores: Scores, view: View) -> Tensor:
        """Return the slots that each head keeps, ``[B, H]``; rows keep the sum of ``view.budget``, exactly."""
        raise NotImplementedError(f"{type(self).__name__} has no share(scores, view)")

    def text(self, *, full: bool = False) -> str:
        """Return text that evaluates back to an equal allocator, in full or without defaults."""
        return call_text(self, full=full)

    def __repr__(self) -> str:
        """Return text that evaluates back to an equal allocator, without what equals a default."""
        return self.text()


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


@dataclass(frozen=True, repr=False)
class PerLayer(Allocator):
    """Give each layer the number of slots that is written for it, or leave it alone.

    Args:
        layers: slots kept per KV head after an eviction, one number for each layer that may evict, in
            order. None leaves that layer alone: it keeps every token, and its memory grows.

    >>> from kvpolicy import ModelSpec, Policy, TopK
    >>> plan = Policy(TopK(PerLayer((512, None, 256)))).plan(ModelSpec(num_layers=3))
    >>> [None if layer is None else layer.budget for layer in plan.layers]
    [512, None, 256]
    """

    layers: tuple[int | None, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.layers, tuple | list):
            raise ParameterError(
                f"PerLayer({self.layers!r}): write one budget for each layer, such as PerLayer((512, None, 256))"
            )
        object.__setattr__(self, "layers", tuple(self.layers))
        for number, budget in enumerate(self.layers):
            if budget is not None:
                _check.integer(self, f"layers[{number}]", budget, 1)
        if all(budget is None for budget in self.layers):
            raise ParameterError(
                f"{self!r} leaves every layer alone, so that nothing would be evicted; give some layer a budget, or "
                "use an ordinary cache"
            )

    @property
    def layers_named(self) -> int:
        """Return how many budgets are written."""
        return len(self.layers)

    def budgets(self, num_layers: int, recent: int) -> tuple[Budget, ...]:
        """Return the budgets as they are written.

        Raises:
            BudgetError: the model has another number of layers that may evict.
        """
        if len(self.layers) != num_layers:
            raise BudgetError(
                f"{self!r} names {len(self.layers)} layers, and the model has {num_layers} that may evict; write one "
                "budget, or None, for each of them"
            )
        return self.layers


@dataclass(frozen=True, repr=False)
class Pyramid(Allocator):
    """Give the first layers more slots than the last ones, on a straight line, as PyramidKV does.

    What the last tokens leave of the budgets is shared out: ``(budget - recent) / beta`` slots for the
    last layer, as many more than the mean for the first as for the last less, whole numbers by the
    largest remainder. All layers together keep exactly what a uniform budget would keep.

    Args:
        budget: slots kept per KV head after an eviction, on average over the layers.
        beta: how steep: the mean over the last layer's share. 1 is a uniform budget.

    Source: https://arxiv.org/abs/2406.02069, section 4, and its official code, which rounds the
    step between two layers down instead, and so keeps fewer.

    >>> Pyramid(100, beta=4).budgets(num_layers=4, recent=20)
    (160, 120, 80, 40)
    """

    budget: int
    beta: float = 20

    def __post_init__(self) -> None:
        _check.integer(self, "budget", self.budget, 1)
        _check.number(self, "beta", self.beta, 1)

    @property
    def layered(self) -> bool:
        """Return True."""
        return True

    def budgets(self, num_layers: int, recent: int) -> tuple[Budget, ...]:
        """Return budgets that never grow from a layer to the next; their mean is ``budget``.

        Raises:
            BudgetError: the budget leaves nothing beside the last tokens.
        """
        shared = self.budget - recent
        if shared < 1:
            raise BudgetError(
                f"{self!r} shares out what the last tokens leave, and recent={recent} leaves nothing of "
                f"{self.budget}; raise the budget, or write Policy(..., recent={max(1, self.budget // 4)})"
            )
        last = shared / Fraction(self.beta) if num_layers > 1 else Fraction(shared)
        step = 2 * (shared - last) / max(1, num_layers - 1)
        line = [last + step * (num_layers - 1 - index) for index in range(num_layers)]
        return tuple(recent + slots for slots in _whole(line))


@dataclass(frozen=True, repr=False)
class Proportional(Allocator):
    """Give each layer slots in proportion to a number that was measured for it beforehand.

    What the last tokens leave of the budgets is shared out, whole numbers by the largest remainder: all layers
    together keep exactly what a uniform budget would keep. Budgets are fixed before any token is seen, since
    memory is allocated once; so the numbers are those of a sample of texts, and not of each prompt.

    Args:
        budget: slots kept per KV head after an eviction, on average over the layers.
        preferences: one positive number for each layer that may evict, in order.

    Source: CAKE, https://arxiv.org/abs/2503.12491, section 4.2.

    >>> Proportional(100, (3.0, 1.0)).budgets(num_layers=2, recent=20)
    (140, 60)
    """

    budget: int
    preferences: tuple[float, ...]

    def __post_init__(self) -> None:
        _check.integer(self, "budget", self.budget, 1)
        if not isinstance(self.preferences, tuple | list) or not self.preferences:
            raise ParameterError(
                f"Proportional(preferences={self.preferences!r}): write one number for each layer, such as (3.0, 1.0)"
            )
        object.__setattr__(self, "preferences", tuple(self.preferences))
        for number, preference in enumerate(self.preferences):
            _check.number(self, f"preferences[{number}]", preference, 0, above=True)

    @property
    def layers_named(self) -> int:
        """Return how many numbers are written."""
        return len(self.preferences)

    def budgets(self, num_layers: int, recent: int) -> tuple[Budget, ...]:
        """Return budgets in proportion; their mean is ``budget``.

        Raises:
            BudgetError: the model has another number of layers that may evict, or a layer would have
                nothing beside the last tokens.
        """
        if len(self.preferences) != num_layers:
            raise BudgetError(
                f"{self!r} names {len(self.preferences)} layers, and the model has {num_layers} that may evict; write "
                "one number for each of them"
            )
        given = [Fraction(preference) for preference in self.preferences]
        shares = _whole([max(0, self.budget - recent) * num_layers * one / sum(given) for one in given])
        if min(shares) < 1:
            raise BudgetError(
                f"{self!r} leaves layer {shares.index(min(shares))} nothing beside the last {recent} tokens; raise the "
                "budget, write a smaller recent=, or bring the preferences nearer to each other"
            )
        return tuple(recent + share for share in shares)


def _whole(shares: list[Fraction]) -> list[int]:
    """Return whole numbers of the same sum: those of the largest remainders are rounded up, the first of equal ones.

    >>> _whole([Fraction(5, 2), Fraction(3, 2), Fraction(1)])
    [3, 1, 1]
    """
    whole = [floor(share) for share in shares]
    missing = round(sum(shares)) - sum(whole)
    by_remainder = sorted(range(len(shares)), key=lambda index: whole[index] - shares[index])
    for index in by_remainder[:missing]:
        whole[index] += 1
    return whole
