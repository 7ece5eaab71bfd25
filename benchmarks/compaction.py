"""Compaction against gathering the budget, and against copying no more than must move."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from benchmarks.eviction import Evictions
from benchmarks.report import Section, Target
from benchmarks.stores import Shape
from benchmarks.timing import clock, median_ms, ratio, take_turns
from kvpolicy.store import Store

__all__ = ["run"]

GATHER_LIMIT, COPY_LIMIT = 1 / 20, 3.0
COMPACT, COPY, GATHER, SELECT = "compact", "copy", "gather", "index_select"


def run(shape: Shape, sizes: list[int], repeats: int) -> Section:
    """Compact one layer at each number of slots, in float32 and bfloat16.

    ``gather`` and ``index_select`` write the survivors of each head into its first slots, in
    position order, as libraries do. ``copy`` copies in one piece as many bytes as compaction must
    move: keys, values, positions and remembered numbers of the survivors that change their place,
    and the order of all slots.

    Args:
        shape: of the layer.
        sizes: slots in use before the eviction.
        repeats: of each.
    """
    versus = (GATHER, SELECT, COPY)
    section = Section(
        "compaction",
        f"CPU ms of compacting a layer of {shape.heads} heads of {shape.dim} behind 64 victims "
        f"({repeats} repeats), and its ratio to each of the others",
        ["slots", "dtype", "must move, KiB", COMPACT, *versus, *(f"to {name}" for name in versus)],
    )
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        for size in sizes:
            seconds, moved = _measure(Evictions(size, dataclasses.replace(shape, dtype=dtype)), repeats)
            ratios = {other: ratio(seconds[COMPACT], seconds[other]) for other in versus}
            times = [median_ms(seconds[one]) for one in (COMPACT, *versus)]
            section.rows.append([size, name, moved / 1024, *times, *ratios.values()])
            if size == 4096:
                what = f"{name}, {size} slots, compaction to"
                section.targets += [
                    Target(f"{what} gather", ratios[GATHER].median, GATHER_LIMIT),
                    Target(f"{what} copy", ratios[COPY].median, COPY_LIMIT),
                ]
    return section


def _measure(evictions: Evictions, repeats: int) -> tuple[dict[str, list[float]], int]:
    store, laps = evictions.store, evictions.laps
    budget = store.plans[0].budget
    buffers = torch.zeros_like(store.keys), torch.zeros_like(store.values)

    def compact() -> float:
        evictions()
        return laps.seconds[COMPACT]

    contestants = {
        COMPACT: compact,
        COPY: lambda: _copy(_bytes_to_move(store, laps.moved), *buffers),
        GATHER: lambda: _gather(store, budget),
        SELECT: lambda: _index_select(store, budget),
    }
    take_turns(contestants, 1)
    return take_turns(contestants, repeats), _bytes_to_move(store, laps.moved)


def _bytes_to_move(store: Store, moved: int) -> int:
    """Return the bytes of what changes its place: rows of moved slots, and the order of all."""
    spec = store.spec
    element = torch.finfo(spec.dtype).bits // 8
    numbers = sum(t.element_size() for held in store.bands[0].state if held for t in held.slots)
    row = (spec.head_dim + spec.value_dim) * element + store.positions.element_size() + numbers
    return moved * row + spec.num_heads * store.longest * store.order.element_size()


def _copy(size: int, source: Tensor, target: Tensor) -> float:
    """Copy bytes between buffers as large as the layer, at a random place: none is cached."""
    a, b = (t.view(-1).view(torch.uint8) for t in (source, target))
    first = int(torch.randint(0, a.numel() - size + 1, ()))
    start = clock()
    b[first : first + size].copy_(a[first : first + size])
    return clock() - start


def _survivors(store: Store, budget: int) -> Tensor:
    heads = range(store.spec.num_heads)
    return torch.stack([torch.randperm(budget + 64)[:budget].sort().values for _ in heads])[None]


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
