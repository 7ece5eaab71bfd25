"""One whole VaSE eviction of a layer, against the same decision by gathering and copying."""

from __future__ import annotations

import dataclasses

import torch

from benchmarks.gathering import GatheringCache
from benchmarks.report import Section, Target
from benchmarks.stores import Shape, filled, grow, logits_of
from benchmarks.timing import clock, median_ms, ratio, take_turns
from kvpolicy.eviction import evict
from kvpolicy.policies import vase

__all__ = ["Pair", "run"]

LIMIT, INTERVAL = 1 / 4, 64
OURS, THEIRS = "kvpolicy", "gather and copy"


def run(shape: Shape, sizes: list[int], repeats: int) -> Section:
    """Evict one layer at each number of slots, in float32 and bfloat16, end to end.

    Args:
        shape: of the layer.
        sizes: slots in use before the eviction.
        repeats: evictions of each.
    """
    section = Section(
        "gather",
        f"CPU ms of one vase eviction of a layer of {shape.heads} KV heads, {shape.heads * shape.group} query heads "
        f"of {shape.dim}, end to end, {repeats} repeats",
        ["slots", "dtype", OURS, THEIRS, f"{OURS} / {THEIRS}"],
    )
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        for size in sizes:
            pair = Pair(size, dataclasses.replace(shape, dtype=dtype))
            contestants = {OURS: pair.ours, THEIRS: pair.theirs}
            take_turns(contestants, 1)
            seconds = take_turns(contestants, repeats)
            found = ratio(seconds[OURS], seconds[THEIRS])
            section.rows.append([size, name, *(median_ms(seconds[one]) for one in (OURS, THEIRS)), found])
            if size == 4096:
                section.targets.append(Target(f"{name}, {size} slots, {OURS} / {THEIRS}", found.median, LIMIT))
    return section


class Pair:
    """Hold the same tokens twice: in a store, and as code that gathers holds them.

    Args:
        size: slots in use before an eviction.
        shape: of the layer.
        tau: temperature of the sample. At 0 nothing is drawn, and both keep the same tokens.
    """

    def __init__(self, size: int, shape: Shape, tau: float = 1.0) -> None:
        self.budget = size - INTERVAL
        self.store = filled(vase(self.budget, tau=tau), shape, range(1))
        keys, values = self.store.keys[0].clone(), self.store.values[0].clone()
        positions = torch.arange(size).expand(keys.shape[:3]).clone()
        self.gathering = GatheringCache(keys, values, positions, self.budget, self.budget, draw=tau > 0)

    def grow(self) -> None:
        """Add an interval of tokens to both, once both were evicted."""
        if self.store.longest > self.budget or self.gathering.length > self.budget:
            return
        grow(self.store)
        new = slice(self.budget, self.budget + INTERVAL)
        keys, values = (arena[0, :, :, new] for arena in (self.store.keys, self.store.values))
        self.gathering.append(keys, values, self.store.rows[0].seen - INTERVAL)

    def ours(self) -> float:
        """Evict the store; return how long it took."""
        self.grow()
        start = clock()
        evict(self.store, [True], logits_of(self.store))
        return clock() - start

    def theirs(self) -> float:
        """Evict by gathering; return how long it took."""
        self.grow()
        start = clock()
        self.gathering.evict(self.store.window.queries[0])
        return clock() - start
