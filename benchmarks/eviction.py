"""The cost of one eviction of one layer, part by part."""

from __future__ import annotations

import dataclasses

import torch

from benchmarks.report import Section
from benchmarks.stores import Shape, filled, grow, logits_of
from benchmarks.timed import Laps, TimedPolicy, TimedStore
from benchmarks.timing import clock, median_ms, take_turns
from kvpolicy.eviction import evict

__all__ = ["run"]

PARTS = ("score", "select", "compact")


def run(shape: Shape, sizes: list[int], repeats: int) -> Section:
    """Evict one layer at each number of slots, in float32 and bfloat16.

    Args:
        shape: of the layer.
        sizes: slots in use before the eviction.
        repeats: evictions of each.
    """
    section = Section(
        "eviction",
        f"CPU ms of one vase eviction of a layer, {shape.heads} KV heads, "
        f"{shape.heads * shape.group} query heads of {shape.dim}, 64 victims, {repeats} repeats",
        ["slots", "dtype", "whole", *PARTS, "rest", "per decoded token"],
    )
    for dtype in (torch.float32, torch.bfloat16):
        contestants = {size: Evictions(size, dataclasses.replace(shape, dtype=dtype)) for size in sizes}
        for size, one in contestants.items():
            seconds = take_turns({"whole": one}, repeats + 1)["whole"][1:]
            parts = [one.parts[name][1:] for name in PARTS]
            known = map(sum, zip(*parts, strict=True))
            rest = [whole - part for whole, part in zip(seconds, known, strict=True)]
            times = [median_ms(found) for found in (seconds, *parts, rest)]
            name = str(dtype).removeprefix("torch.")
            section.rows.append([size, name, *times, times[0] / one.interval])
    return section


class Evictions:
    """Evict layers again and again, in one view; what each part took is noted in ``parts``."""

    def __init__(self, size: int, shape: Shape, layers: int = 1) -> None:
        self.laps, self.interval = Laps(), 64
        policy = TimedPolicy(size - self.interval, self.laps)
        self.store = filled(policy, shape, range(layers), TimedStore)
        self.parts: dict[str, list[float]] = {name: [] for name in PARTS}

    def __call__(self) -> float:
        """Evict once, and return how long it took."""
        grow(self.store)
        start = clock()
        evict(self.store, [True], logits_of(self.store))
        seconds = clock() - start
        for name, found in self.parts.items():
            found.append(self.laps.seconds[name])
        return seconds
