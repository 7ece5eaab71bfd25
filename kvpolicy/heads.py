"""Budgets that differ over the heads of a layer, and free the memory that a head does not get."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvpolicy import _check
from kvpolicy.allocators import Allocator, Budget
from kvpolicy.errors import BudgetError, ParameterError
from kvpolicy.scores import Scores, mask_of, order_key, top
from kvpolicy.view import View

__all__ = ["Adaptive", "PerHead"]

_FIRST = torch.iinfo(torch.int64).max


@dataclass(frozen=True, repr=False)
class PerHead(Allocator):
    """Give every KV head a number of slots of its own, fixed when bound.

    The split of DuoAttention: heads that retrieve keep much, streaming heads keep sinks and recent tokens.

    Args:
        heads: slots of each KV head, the same in every layer; or one such tuple a layer.

    Source: the split of heads is that of DuoAttention (arXiv 2410.10819, section 2).

    >>> from kvpolicy import Attention, Policy, TopK
    >>> Policy(Attention() >> TopK(PerHead((1024, 128))))
    Policy(TopK(PerHead((1024, 128))))
    """

    head_wise: ClassVar[bool] = True
    heads: tuple[int, ...] | tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        given = self.heads
        if isinstance(given, list | tuple):
            object.__setattr__(self, "heads", tuple(tuple(one) if isinstance(one, list) else one for one in given))
            given = self.heads
        layers = given if isinstance(given, tuple) and given and isinstance(given[0], tuple) else (given,)
        for heads in layers:
            if not isinstance(heads, tuple) or not heads:
                raise ParameterError(
                    f"PerHead({given!r}): write the slots of each KV head, PerHead((1024, 128)), or one tuple a layer"
                )
            for one in heads:
                if one is None:
                    raise ParameterError(
                        f"PerHead({given!r}): every head has a budget; PerLayer may leave layers alone"
                    )
                _check.integer(self, "heads", one, 1)

    @property
    def layers_named(self) -> int | None:
        """Return how many layers are written, None where one tuple holds for all."""
        return len(self.heads) if isinstance(self.heads[0], tuple) else None

    def budgets(self, num_layers: int, recent: int) -> tuple[Budget, ...]:
        """Return the budgets of the heads of every layer.

        Raises:
            BudgetError: they are given for another number of layers.
        """
        layers = [one for one in self.heads if isinstance(one, tuple)]
        if not layers:
            return (self.heads,) * num_layers  # type: ignore[return-value]
        if len(layers) != num_layers:
            raise BudgetError(
                f"{self!r} names {len(layers)} layers, and the model has {num_layers} that evict: write one tuple for "
                "each, or one for all"
            )
        return tuple(layers)

    def __repr__(self) -> str:
        """Return text that evaluates back to an equal allocator."""
        return f"PerHead({self.heads!r})"


@dataclass(frozen=True, repr=False)
class Adaptive(Allocator):
    """Share a layer's slots over its heads by their scores.

    The scores of all heads are pooled, and the highest stay, whatever head they are in; so a head whose
    attention is spread keeps more. Each head keeps its recent tokens, and at least ``floor`` of what it would
    get otherwise. The layer keeps exactly as much as under ``Uniform``. It is shared at a row's first
    eviction, and again at every ``refresh``-th, which moves the whole layer.

    Args:
        budget: slots kept per KV head after an eviction, on average over the heads of a layer.
        floor: the share of ``budget - recent`` that every head keeps, 0 to 1, rounded down.
        refresh: evictions between two divisions; None divides once.

    Source: Ada-KV (arXiv 2407.11550, section 4), Algorithm 1; its safeguard is ``floor``, 0.2 in the paper.

    >>> from kvpolicy import Attention, Policy, TopK
    >>> Policy.parse("Attention(over='all') >> TopK(Adaptive(1024, floor=0.5))")
    Policy(Attention(over='all') >> TopK(Adaptive(1024, floor=0.5)))
    """

    head_wise: ClassVar[bool] = True
    shared: ClassVar[bool] = True

    budget: int
    floor: float = 0.2
    refresh: int | None = None

    def __post_init__(self) -> None:
        _check.integer(self, "budget", self.budget, 1)
        _check.number(self, "floor", self.floor, 0, 1)
        if self.refresh is not None:
            _check.integer(self, "refresh", self.refresh, 1)

    def budgets(self, num_layers: int, recent: int) -> tuple[Budget, ...]:
        """Return the mean budget of a head for every layer."""
        return (self.budget,) * num_layers

    def least(self, budget: int, recent: int) -> int:
        """Return the recent tokens and the floor."""
        return recent + math.floor((budget - recent) * self.floor + 1e-9)

    def share(self, scores: Scores, view: View) -> Tensor:
        """Return the slots that each head keeps, ``[B, H]`` int64.

        What is equal in tier, score and position goes to the lower head.
        """
        (_, heads, size), recent = view.shape, view.recent
        mean = self.budget
        key = order_key(scores.values, view.positions, scores.tier)
        least = torch.full_like(view.lengths, self.least(mean, recent)).minimum(view.lengths)
        key = torch.where(mask_of(*top(key, least, self.least(mean, recent)), size), _FIRST, key)
        total = torch.minimum(view.budget.sum(-1), view.lengths.sum(-1))
        order = key.flatten(1).sort(descending=True, stable=True).indices
        kept = (torch.arange(heads * size, device=key.device) < total[:, None]).to(torch.int64)
        return torch.zeros_like(view.lengths).scatter_add(-1, order // size, kept)
