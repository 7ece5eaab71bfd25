"""A policy and a store that note how long each part of an eviction takes."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.timing import clock
from kvpolicy import Keep, Policy, Scores, Stochastic, TopK, ValueGuard, View
from kvpolicy.allocators import Budget
from kvpolicy.band import Band, Span
from kvpolicy.stage import Selector
from kvpolicy.store import Store
from kvpolicy.view import State

__all__ = ["Laps", "TimedPolicy", "TimedStore"]


@dataclass
class Laps:
    """Hold the CPU seconds of each part of one eviction, and the moves that it needed."""

    seconds: dict[str, float] = field(default_factory=dict)
    moved: int = 0


@dataclass(frozen=True)
class TimedSelector(Selector):
    """Select as another selector does, and note the time."""

    inner: Selector
    laps: Laps

    def budgets(self, num_layers: int, recent: int) -> tuple[Budget, ...]:
        return self.inner.budgets(num_layers, recent)

    def select(self, scores: Scores, view: View) -> Keep:
        start = clock()
        keep = self.inner.select(scores, view)
        self.laps.seconds["select"] = clock() - start
        return keep


class TimedPolicy:
    """Be a policy that notes how long its scores take."""

    def __init__(self, budget: int, laps: Laps) -> None:
        selector = TimedSelector(TopK(budget), laps)
        self.policy, self.laps = Policy(ValueGuard() >> Stochastic() >> selector), laps
        self.needs, self.plan, self.init = self.policy.needs, self.policy.plan, self.policy.init

    def select(self, view: View, state: State) -> tuple[Keep, State]:
        start = clock()
        found = self.policy.select(view, state)
        self.laps.seconds["score"] = clock() - start - self.laps.seconds["select"]
        return found


class TimedStore(Store):
    """Be a store that notes how long compaction takes, and how many slots of all heads move."""

    def compact(self, band: Band, span: Span, keep: Keep, lengths: Tensor, kept: Tensor, limit: int) -> None:
        slots = torch.arange(keep.mask.shape[-1])
        moved = int((keep.mask & (slots >= kept[..., None])).sum())
        start = clock()
        super().compact(band, span, keep, lengths, kept, limit)
        assert isinstance(band.policy, TimedPolicy)
        band.policy.laps.seconds["compact"] = clock() - start
        band.policy.laps.moved = moved
