"""Scorers that ask how much attention a token receives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from kvpolicy import _check
from kvpolicy.probabilities import received
from kvpolicy.scorers.every_query import EveryQuery, uncounted
from kvpolicy.scores import Scores
from kvpolicy.stage import Scorer
from kvpolicy.view import LayerSpec, StageState, View

__all__ = ["AccumulatedAttention", "Attention", "LastQuery"]


@dataclass(frozen=True, repr=False)
class Attention(Scorer):
    """Score a token by the attention that the newest queries pay it.

    Softmax in float32 (float64 for a float64 cache), reduced over the queries of the window and
    the query heads of the group, then smoothed over neighbours in position.

    Args:
        window: how many of the newest queries are asked.
        pool: width of the average over neighbouring positions; odd, 1 for none.
        reduce: ``"mean"`` or ``"max"`` over window and group.
        over: softmax over the ``"candidates"`` alone, as VaSE does, or over ``"all"`` slots.
        temperature: divides the logits; inside the softmax, before any averaging.
        pooling: take the ``"mean"`` of the neighbours, or the ``"max"``.

    Source: SnapKV (arXiv 2404.14469, section 4), in VaSE's form (arXiv 2606.03928): candidates
    alone, mean over window and group, average pooling of 5.

    >>> Attention(window=32, over="all")
    Attention(window=32, over='all')
    """

    needs: ClassVar[frozenset[str]] = frozenset({"queries"})

    window: int = 64
    pool: int = 5
    reduce: Literal["mean", "max"] = "mean"
    over: Literal["candidates", "all"] = "candidates"
    temperature: float = 1.0
    pooling: Literal["mean", "max"] = "mean"

    def __post_init__(self) -> None:
        _check.integer(self, "window", self.window, 1)
        _check.odd(self, "pool", self.pool)
        _check.choice(self, "reduce", self.reduce, ("mean", "max"))
        _check.choice(self, "over", self.over, ("candidates", "all"))
        _check.number(self, "temperature", self.temperature, 0, above=True)
        _check.choice(self, "pooling", self.pooling, ("mean", "max"))

    def queries_read(self, interval: int | None) -> int:
        """Return the window."""
        return self.window

    def score(self, view: View, state: StageState | None) -> Scores:
        """Return the attention received, as weights."""
        queries, positions = newest(view, self.window)
        chosen = view.candidates if self.over == "candidates" else view.valid
        count = view.num_candidates if self.over == "candidates" else view.lengths
        # Every candidate is older than the last `recent` tokens: no query of such a window can be older.
        causal = self.over == "all" or self.window > view.recent
        weight = (positions >= 0).to(view.compute_dtype)
        if self.reduce == "mean":
            weight = weight / weight.sum(-1, keepdim=True).clamp(min=1)
        amount = received(
            view,
            queries,
            positions,
            chosen,
            weight,
            causal=causal,
            temperature=self.temperature,
            reduce=self.reduce,
            # Over the candidates alone, a probability is another one, and its sum nobody knows: the kernel's
            # holds the recent tokens, too. A pass to sum and one to divide would cost two products.
            lse=newest_lse(view, self.window) if self.over == "all" else None,
        )
        if self.pool > 1:
            amount = smooth(amount, view.order, count, self.pool, self.pooling)
        return Scores.of(view, amount, weights=True)


@dataclass(frozen=True, repr=False)
class AccumulatedAttention(EveryQuery):
    """Score a token by all the attention it has received so far.

    Exact over decoded tokens: every query since the last eviction is still in the window, so its
    probabilities over the slots that it saw are added once. Of a turn of several tokens, its newest
    ``window`` queries are counted; so are those decoded since the last turn, where ``interval`` is
    None. The mean over the query heads of a group is added.

    Args:
        window: queries that the window holds, at least the policy's interval.

    Raises:
        BudgetError: when planned, the window is smaller than the interval.

    Source: H2O, Heavy-Hitter Oracle (arXiv 2306.14048, section 4).

    >>> from kvpolicy import Policy, TopK
    >>> Policy(AccumulatedAttention() >> TopK(1024))
    Policy(AccumulatedAttention() >> TopK(1024))
    """

    window: int = 64

    def __post_init__(self) -> None:
        _check.integer(self, "window", self.window, 1)

    def init(self, spec: LayerSpec, rows: int) -> StageState:
        """Return zero sums."""
        return StageState((torch.zeros(rows, spec.num_heads, spec.capacity, device=spec.device),))

    def update(self, view: View, state: StageState | None) -> StageState:
        """Return the sums with the queries of every token added that is new since the last eviction."""
        assert state is not None
        queries, positions = newest(view, self.window)
        new = (uncounted(view, self.window)[1] >= 0).to(view.compute_dtype)
        added = received(
            view,
            queries,
            positions,
            view.valid,
            new,
            causal=True,
            temperature=1.0,
            reduce="mean",
            lse=newest_lse(view, self.window),
        )
        return StageState((state.slots[0] + added.to(torch.float32),))

    def score(self, view: View, state: StageState | None) -> Scores:
        """Return the sums, as weights."""
        assert state is not None
        return Scores.of(view, state.slots[0], weights=True)


@dataclass(frozen=True, repr=False)
class LastQuery(Scorer):
    """Score a token by the attention of the newest query, averaged over all heads of the layer.

    All heads of a layer keep the same tokens.

    Source: TOVA, Transformers are Multi-State RNNs (arXiv 2401.06104, section 3.2).

    >>> from kvpolicy import Policy, TopK
    >>> Policy(LastQuery() >> TopK(1024), recent=1)
    Policy(LastQuery() >> TopK(1024), recent=1)
    """

    needs: ClassVar[frozenset[str]] = frozenset({"queries", "cross_heads"})

    def queries_read(self, interval: int | None) -> int:
        """Return 1: the newest query."""
        return 1

    def score(self, view: View, state: StageState | None) -> Scores:
        """Return the mean attention of the newest query, as weights."""
        queries, positions = newest(view, 1)
        weight = (positions >= 0).to(view.compute_dtype)
        amount = received(
            view,
            queries,
            positions,
            view.valid,
            weight,
            causal=True,
            temperature=1.0,
            reduce="mean",
            lse=newest_lse(view, 1),
        )
        # Every rank adds the heads in the same order: decisions agree to the last bit.
        amount, positions, order = (view.gather_heads(t) for t in (amount, view.positions, view.order))
        total = sum_over_heads(amount, positions, order, view.positions)
        return Scores.of(view, total / view.num_heads, weights=True)


def newest(view: View, window: int) -> tuple[Tensor, Tensor]:
    """Return the newest ``window`` queries of a view and their positions."""
    assert view.queries is not None
    assert view.query_positions is not None
    return view.queries[:, :, -window:], view.query_positions[:, -window:]


def newest_lse(view: View, window: int) -> Tensor | None:
    """Return the log-sum-exp of the newest ``window`` queries of a view, over all slots, where it is known."""
    return None if view.lse is None else view.lse[:, :, -window:]


def sum_over_heads(amount: Tensor, positions: Tensor, order: Tensor, wanted: Tensor) -> Tensor:
    """Return, for each wanted position, the sum of what all heads of its row have there.

    Slots are unordered, and heads may hold different tokens: a head that has evicted one adds 0.

    Args:
        amount: ``[B, H, S]``.
        positions: ``[B, H, S]``, -1 where free.
        order: ``[B, H, S]``, the slots in position order, free slots last.
        wanted: ``[B, N, S]`` positions, those of some of the heads.
    """
    h, s = amount.shape[1:]
    slots = order.to(torch.int64)
    ordered = positions.gather(-1, slots)
    ordered = torch.where(ordered < 0, torch.iinfo(ordered.dtype).max, ordered)
    by_position, at = amount.gather(-1, slots), wanted.flatten(1)
    total = torch.zeros_like(at, dtype=amount.dtype)
    for head in range(h):
        held = ordered[:, head].contiguous()
        place = torch.searchsorted(held, at.contiguous()).clamp(max=s - 1)
        found = held.gather(1, place) == at
        total = total + torch.where(found, by_position[:, head].gather(1, place), 0)
    return total.view(wanted.shape)


def smooth(
    amount: Tensor, order: Tensor, count: Tensor, width: int, pooling: Literal["mean", "max"] = "mean"
) -> Tensor:
    """Pool over ``width`` neighbours in position; beyond either end there is nothing, which counts as 0.

    Args:
        amount: ``[B, H, S]``, in slot order.
        order: ``[B, H, S]``, the slots in position order.
        count: ``[B, H]``, how many slots from the start of ``order`` take part.
        width: odd.
        pooling: the mean of the neighbours, or the largest, where none is negative.
    """
    slots = order.to(torch.int64)
    inside = torch.arange(amount.shape[-1], device=amount.device) < count[..., None]
    ordered = torch.where(inside, amount.gather(-1, slots), 0)
    pool = F.avg_pool1d if pooling == "mean" else F.max_pool1d
    pooled = pool(ordered, width, stride=1, padding=width // 2)
    return torch.zeros_like(amount).scatter(-1, slots, torch.where(inside, pooled, 0))
