"""Compaction against gathering the budget, and against copying no more than must move."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from benchmarks.eviction import Evictions
from benchmarks.report import Section, Target
from benchmarks.stores import Shape
from benchmarks.timing import clock, median_ms, ratio, take_turns
from kvpolicy.roofline import bytes_to_move
from kvpolicy.store import Store

__all__ = ["run"]

GATHER_LIMIT, COPY_LIMIT = 1 / 20, 3.0
COMPACT, COPY, ROWS, GATHER, SELECT = "compact", "copy", "rows", "gather", "index_select"


def run(shape: Shape, cases: list[tuple[int, int]], repeats: int) -> Section:
    """Compact layers in one call, at each number of slots, in float32 and bfloat16.

    ``gather`` and ``index_select`` write the survivors of each head into its first slots, in
    position order, as libraries do. ``copy`` copies in one piece as many bytes as compaction must
    move: keys, values, positions and remembered numbers of the survivors that change their place,
    and the order of all slots. ``rows`` copies as many rows of keys and of values as move, from
    random places to random places, and nothing else.

    Args:
        shape: of a layer.
        cases: how many layers, and the slots in use before the eviction.
        repeats: of each.
    """
    versus = (GATHER, SELECT, COPY, ROWS)
    section = Section(
        "compaction",
        f"CPU ms of compacting layers of {shape.heads} heads of {shape.dim} in one call, behind 64 victims a head "
        f"({repeats} repeats), and its ratio to each of the others",
        ["layers", "slots", "dtype", "must move, KiB", COMPACT, *(f"to {name}" for name in versus)],
    )
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        for layers, size in cases:
            evictions = Evictions(size, dataclasses.replace(shape, dtype=dtype), layers)
            seconds, moved = _measure(evictions, repeats)
            ratios = {other: ratio(seconds[COMPACT], seconds[other]) for other in versus}
            section.rows.append([layers, size, name, moved / 1024, median_ms(seconds[COMPACT]), *ratios.values()])
            if size in (4096, 4160):
                what = f"{name}, {layers} × {size} slots, compaction to"
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
        COPY: lambda: _copy(bytes_to_move(store, laps.moved), *buffers),
        ROWS: lambda: _rows(store, laps.moved),
        GATHER: lambda: _gather(store, budget),
        SELECT: lambda: _index_select(store, budget),
    }
    take_turns(contestants, 1)
    return take_turns(contestants, repeats), bytes_to_move(store, laps.moved)


def _copy(size: int, source: Tensor, target: Tensor) -> float:
    """Copy bytes between buffers as large as the layer, at a random place: none is cached."""
    a, b = (t.view(-1).view(torch.uint8) for t in (source, target))
    first = int(torch.randint(0, a.numel() - size + 1, ()))
    start = clock()
    b[first : first + size].copy_(a[first : first + size])
    return clock() - start


def _rows(store: Store, moved: int) -> float:
    """Copy rows of keys and values between random places, as the widest words that torch has."""
    lines = [t.flatten(0, 3).view(torch.complex128) for t in (store.keys, store.values)]
    source, target = torch.randperm(len(lines[0]))[: 2 * moved].view(2, moved)
    start = clock()
    for line in lines:
        line.index_copy_(0, target, line.index_select(0, source))
    return clock() - start


def _survivors(store: Store, budget: int) -> Tensor:
    heads = range(len(store.layers) * store.spec.num_heads)
    slots = torch.stack([torch.randperm(budget + 64)[:budget].sort().values for _ in heads])
    return slots.view(len(store.layers), -1, budget)


def _gather(store: Store, budget: int) -> float:
    slots = _survivors(store, budget)
    start = clock()
    for held in (store.keys[:, 0], store.values[:, 0]):
        at = slots[..., None].expand(-1, -1, -1, held.shape[-1])
        held[:, :, :budget].copy_(held.gather(2, at))
    return clock() - start


def _index_select(store: Store, budget: int) -> float:
    slots = _survivors(store, budget)
    start = clock()
    heads = slots.shape[0] * slots.shape[1]
    flat = (slots + torch.arange(heads).view(*slots.shape[:2], 1) * store.spec.capacity).flatten()
    for held in (store.keys[:, 0], store.values[:, 0]):
        rows = held.reshape(-1, held.shape[-1]).index_select(0, flat)
        held[:, :, :budget].copy_(rows.view(*slots.shape, -1))
    return clock() - start
