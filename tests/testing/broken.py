"""Policies that are wrong, each in one way."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvpolicy import (
    Keep,
    KeyNorm,
    LayerPlan,
    LayerSpec,
    ModelSpec,
    Plan,
    Scorer,
    Scores,
    Selector,
    StageState,
    State,
    Tier,
    View,
    select_top,
)


class KeepLargestValues:
    """A policy without the algebra, and correct: what a third party would write."""

    needs: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, budget: int = 8, recent: int = 2, interval: int = 3) -> None:
        self.budget, self.recent, self.interval = budget, recent, interval

    def plan(self, model: ModelSpec) -> Plan:
        capacity = self.budget + self.interval
        layer = LayerPlan(self.budget, capacity, self.interval, self.recent, window=0)
        return Plan((layer,) * model.num_layers)

    def init(self, spec: LayerSpec, rows: int) -> State:
        return ()

    def select(self, view: View, state: State) -> tuple[Keep, State]:
        return select_top(self.scores(view), view, view.budget), state

    def scores(self, view: View) -> Scores:
        size = torch.linalg.vector_norm(view.values, dim=-1, dtype=view.compute_dtype)
        return Scores.of(view, size, weights=True)


class DropsRecent(KeepLargestValues):
    """Forgets that the last tokens are no candidates."""

    def select(self, view: View, state: State) -> tuple[Keep, State]:
        scores = self.scores(view)
        flat = torch.where(view.valid, Tier.CANDIDATE, Tier.FREE)
        return select_top(dataclasses.replace(scores, tier=flat), view, view.budget), state


class NamesVictimsTwice(KeepLargestValues):
    """Lists every victim twice."""

    def select(self, view: View, state: State) -> tuple[Keep, State]:
        keep, state = super().select(view, state)
        if keep.victims is not None:
            keep = dataclasses.replace(keep, victims=torch.cat([keep.victims, keep.victims], -1))
        return keep, state


class ReadsSlotOrder(KeepLargestValues):
    """Takes the place of a slot for the age of its token."""

    def scores(self, view: View) -> Scores:
        slots = torch.arange(view.shape[2]).expand(view.shape)
        return Scores.of(view, slots, weights=False)


class LeaksState(KeepLargestValues):
    """Counts its calls on itself, and prefers other tokens at every other one."""

    calls = 0

    def scores(self, view: View) -> Scores:
        self.calls += 1
        scores = super().scores(view)
        return scores.replace(scores.values * (-1) ** self.calls, weights=False)


class OneTooFew(KeepLargestValues):
    """Evicts one token more than it must."""

    def select(self, view: View, state: State) -> tuple[Keep, State]:
        view = dataclasses.replace(view, budget=(view.budget - 1).clamp(min=0), max_victims=view.max_victims + 1)
        return super().select(view, state)


class Random(KeepLargestValues):
    """Draws from torch's global generator."""

    def scores(self, view: View) -> Scores:
        return Scores.of(view, torch.rand(view.shape), weights=True)


class RandomButSeeded(KeepLargestValues):
    """Seeds torch's global generator before it draws: the same each time, at others' cost."""

    def scores(self, view: View) -> Scores:
        torch.manual_seed(0)
        return Scores.of(view, torch.rand(view.positions.max() + 2)[view.positions], weights=True)


class WritesToTheView(KeepLargestValues):
    """Marks what it has seen by writing into the values of free slots."""

    def scores(self, view: View) -> Scores:
        view.values.masked_fill_(~view.valid[..., None], 0)
        return super().scores(view)


class KeepsFreeSlots(KeepLargestValues):
    """Treats a free slot as a token."""

    def select(self, view: View, state: State) -> tuple[Keep, State]:
        values = self.scores(view).values
        best = values.topk(min(view.max_budget, view.shape[2]), -1).indices
        rank = torch.arange(best.shape[-1])
        chosen = rank < torch.minimum(view.budget, view.lengths)[..., None]
        mask = torch.zeros(view.shape, dtype=torch.bool).scatter(-1, best, chosen)
        return Keep(mask, None, torch.zeros(view.shape[0], dtype=torch.int64)), state


class ReadsRowIndex(KeepLargestValues):
    """Treats the first row of a batch unlike the others."""

    def scores(self, view: View) -> Scores:
        scores = super().scores(view)
        sign = torch.ones(view.shape[0])
        sign[1:] = -1
        return scores.replace(scores.values * sign[:, None, None], weights=False)


class ComparesRows(KeepLargestValues):
    """Divides by the largest number of the whole batch, and rounds."""

    def scores(self, view: View) -> Scores:
        scores = super().scores(view)
        inside = torch.where(view.valid, scores.values, 0)
        return scores.replace((4 * inside / inside.amax().clamp(min=1e-9)).round(), weights=True)


class ForgetsHeadOffset(KeepLargestValues):
    """Treats the first head of a device unlike the others."""

    def scores(self, view: View) -> Scores:
        scores = super().scores(view)
        sign = torch.ones(view.shape[1])
        sign[1:] = -1
        return scores.replace(scores.values * sign[:, None], weights=False)


class CrashesOnNan(KeepLargestValues):
    """Builds a table of ranks that nan makes too small."""

    def scores(self, view: View) -> Scores:
        scores = super().scores(view)
        levels = torch.where(view.valid, scores.values, 0).unique()
        for level in levels:
            assert int((levels == level).nonzero()[0, 0]) >= 0
        return scores


class EmptiesOnNan(KeepLargestValues):
    """Keeps what is not below a threshold that may be nan."""

    def select(self, view: View, state: State) -> tuple[Keep, State]:
        keep, state = super().select(view, state)
        number = torch.where(view.valid, self.scores(view).values, 0).sum(-1, keepdim=True)
        return Keep(keep.mask & (number == number), None, keep.broken), state


class ReadsFreeSlots(KeepLargestValues):
    """Compares with the mean over all slots, free ones among them."""

    def scores(self, view: View) -> Scores:
        scores = super().scores(view)
        mean = scores.values.mean(-1, keepdim=True)
        return scores.replace((scores.values - mean).abs(), weights=True)


class PlansTooLittle(KeepLargestValues):
    """Leaves no room for the tokens between two evictions."""

    def plan(self, model: ModelSpec) -> Plan:
        layer = LayerPlan(self.budget, self.budget, self.interval, self.recent, window=0)
        return Plan((layer,) * model.num_layers)


class ReordersState(KeepLargestValues):
    """Returns what it remembers in position order instead of slot order."""

    def init(self, spec: LayerSpec, rows: int) -> State:
        return (StageState((torch.zeros(rows, spec.num_heads, spec.capacity),)),)

    def select(self, view: View, state: State) -> tuple[Keep, State]:
        held = state[0]
        assert held is not None
        numbers = held.slots[0].scatter(-1, view.fresh.clamp(min=0), 1.0 + view.seen[0].float())
        keep = select_top(Scores.of(view, numbers, weights=True), view, view.budget)
        return keep, (StageState((numbers.gather(-1, view.order.to(torch.int64)),)),)


class ChangesStateType(ReordersState):
    """Returns what it remembers in another dtype."""

    def select(self, view: View, state: State) -> tuple[Keep, State]:
        held = state[0]
        assert held is not None
        return KeepLargestValues.select(self, view, state)[0], (StageState((held.slots[0].double(),)),)


class NotCopied(KeepLargestValues):
    """Holds something that cannot be pickled."""

    def __init__(self) -> None:
        super().__init__()
        self.function: Any = lambda: None


@dataclass(frozen=True, repr=False)
class IgnoresGuards(Selector):
    """Keeps the highest scores, whatever is protected."""

    budget: int = 8

    def budgets(self, num_layers: int, recent: int) -> tuple[int | None, ...]:
        return (self.budget,) * num_layers

    def select(self, scores: Scores, view: View) -> Keep:
        recent = Scores.of(view, scores.values, weights=scores.weights)
        return select_top(recent, view, view.budget)


@dataclass(frozen=True, repr=False)
class TextLeavesOut(KeyNorm):
    """Prints less than it is."""

    factor: float = 1.0

    def text(self, *, full: bool = False) -> str:
        return "TextLeavesOut()"


@dataclass(frozen=True, repr=False)
class OldestFirst(Scorer):
    """A scorer without fault."""

    def score(self, view: View, state: StageState | None) -> Scores:
        return Scores.of(view, -view.positions, weights=False)


@dataclass(frozen=True, repr=False)
class NegatedSlots(Scorer):
    """A scorer that reads slot order."""

    def score(self, view: View, state: StageState | None) -> Scores:
        slots: Tensor = -torch.arange(view.shape[2])
        return Scores.of(view, slots.expand(view.shape), weights=False)
