"""The cost of one eviction of one layer, part by part, against what it replaces."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.report import Section, Target
from benchmarks.stores import Shape, filled, grow, logits_of
from benchmarks.timing import clock, median_ms, ratio, take_turns
from kvpolicy import Keep, Policy, Scores, Stochastic, TopK, ValueGuard, View
from kvpolicy.eviction import evict
from kvpolicy.stage import Selector
from kvpolicy.store import Store
from kvpolicy.view import State

__all__ = ["run"]

GATHER_LIMIT, COPY_LIMIT = 1 / 20, 3.0


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

    def budgets(self, num_layers: int, recent: int) -> tuple[int | None, ...]:
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

    def compact(self, at: slice, keep: Keep, lengths: Tensor, kept: Tensor, limit: int) -> None:
        slots = torch.arange(keep.mask.shape[-1])
        moved = int((keep.mask & (slots >= kept[..., None])).sum())
        start = clock()
        super().compact(at, keep, lengths, kept, limit)
        assert isinstance(self.policy, TimedPolicy)
        self.policy.laps.seconds["compact"] = clock() - start
        self.policy.laps.moved = moved


def run(shape: Shape, sizes: list[int], repeats: int) -> Section:
    """Evict one layer at each number of slots, in float32 and bfloat16.

    ``gather`` writes the survivors into the same slots, in position order, by the faster of
    ``gather`` and ``index_select``. ``copy`` copies, in one piece, as many bytes as compaction
    must move: keys, values, positions and remembered numbers of the survivors that change their
    place, and the whole order of the slots.
    """
    section = Section(
        "eviction",
        f"CPU ms of one vase eviction of a layer, {shape.heads} KV heads, "
        f"{shape.heads * shape.group} query heads of {shape.dim}, 64 victims, {repeats} repeats",
        ["slots", "dtype", "whole", "score", "select", "compact", "rest", "moved KiB"]
        + ["gather", "copy", "compact / gather", "compact / copy"],
    )
    for dtype in (torch.float32, torch.bfloat16):
        for size in sizes:
            _one(section, Shape(shape.heads, shape.group, shape.dim, dtype), size, repeats)
    return section


def _one(section: Section, shape: Shape, size: int, repeats: int) -> None:
    laps = Laps()
    store = filled(TimedPolicy(size - 64, laps), shape, range(1), TimedStore)
    parts: dict[str, list[float]] = {"score": [], "select": [], "compact": []}
    buffers = torch.zeros_like(store.keys), torch.zeros_like(store.values)

    def whole() -> float:
        grow(store)
        start = clock()
        evict(store, [True], logits_of(store))
        seconds = clock() - start
        for name, found in parts.items():
            found.append(laps.seconds[name])
        return seconds

    def copied() -> float:
        return _copy(_bytes_to_move(store, laps.moved), *buffers)

    contestants = {
        "whole": whole,
        "copy": copied,
        "gather": lambda: _gather(store, size - 64),
        "index_select": lambda: _index_select(store, size - 64),
    }
    take_turns(contestants, 1)
    for found in parts.values():
        found.clear()
    seconds = take_turns(contestants, repeats)
    gathered = min(seconds["gather"], seconds["index_select"], key=median_ms)
    of_gather = ratio(parts["compact"], gathered)
    of_copy = ratio(parts["compact"], seconds["copy"])
    known = list(zip(*parts.values(), strict=True))
    rest = [a - sum(b) for a, b in zip(seconds["whole"], known, strict=True)]
    name = str(shape.dtype).removeprefix("torch.")
    times = [seconds["whole"], *parts.values(), rest]
    moved = _bytes_to_move(store, laps.moved) / 1024
    section.rows.append(
        [size, name, *map(median_ms, times), moved]
        + [median_ms(gathered), median_ms(seconds["copy"]), of_gather, of_copy]
    )
    if size == 4096:
        section.targets += [
            Target(f"{name}, 4096 slots, compact / gather", of_gather.median, GATHER_LIMIT),
            Target(f"{name}, 4096 slots, compact / copy", of_copy.median, COPY_LIMIT),
        ]


def _bytes_to_move(store: Store, moved: int) -> int:
    """Return the bytes of what changes its place: rows of moved slots, and the order of all."""
    spec = store.spec
    element = torch.finfo(spec.dtype).bits // 8
    numbers = sum(t.element_size() for held in store.state if held for t in held.slots)
    row = (spec.head_dim + spec.value_dim) * element + store.positions.element_size() + numbers
    return moved * row + spec.num_heads * store.longest * store.order.element_size()


def _copy(size: int, source: Tensor, target: Tensor) -> float:
    """Copy bytes between buffers as large as the layer, at a random place, so that none is cached."""
    a, b = (t.view(-1).view(torch.uint8) for t in (source, target))
    first = int(torch.randint(0, a.numel() - size + 1, ()))
    start = clock()
    b[first : first + size].copy_(a[first : first + size])
    return clock() - start


def _survivors(store: Store, budget: int) -> Tensor:
    heads = [torch.randperm(store.longest)[:budget].sort().values for _ in range(store.spec.num_heads)]
    return torch.stack(heads)[None]


def _gather(store: Store, budget: int) -> float:
    slots = _survivors(store, budget)
    start = clock()
    for held in (store.keys[0], store.values[0]):
        at = slots[..., None].expand(-1, -1, -1, held.shape[-1])
        held[:, :, :budget].copy_(held.gather(2, at))
    return clock() - start


def _index_select(store: Store, budget: int) -> float:
    slots = _survivors(store, budget)
    start = clock()
    flat = (slots + torch.arange(slots.shape[1])[:, None] * store.spec.capacity).flatten()
    for held in (store.keys[0], store.values[0]):
        rows = held.view(-1, held.shape[-1]).index_select(0, flat)
        held[:, :, :budget].copy_(rows.view(1, slots.shape[1], budget, -1))
    return clock() - start
