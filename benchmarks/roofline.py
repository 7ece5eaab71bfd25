"""What an eviction must read, write and multiply, at the speed of this machine, against what it takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import torch

from benchmarks.eviction import Evictions
from benchmarks.report import Section
from benchmarks.stores import Shape
from benchmarks.timing import clock, median_ms, ratio, take_turns
from kvpolicy.roofline import bytes_to_move
from kvpolicy.store import Store

__all__ = ["bytes_touched", "run"]

COPIED = 128 * 2**20  #: bytes, far more than any cache of a CPU holds
WHOLE, COPY, PRODUCT = "whole", "copy", "product"


def run(shape: Shape, sizes: list[int], repeats: int) -> Section:
    """Evict one layer at each number of slots, in float32 and bfloat16.

    ``memory`` is the time that the bytes take which must be read or written, at the bandwidth of one
    long copy measured in the same rounds. ``product`` is the product of queries and keys alone, in
    float32, which every attention score needs.

    Args:
        shape: of the layer.
        sizes: slots in use before the eviction.
        repeats: evictions of each.
    """
    section = Section(
        "roofline",
        f"CPU ms of one vase eviction of a layer of {shape.heads} KV heads, {shape.heads * shape.group} query heads "
        f"of {shape.dim}, and what memory and the product alone would take, {repeats} repeats",
        ["slots", "dtype", "copy, GiB/s", "must touch, MiB", "memory", PRODUCT, WHOLE, "to memory", "to product"],
    )
    long = torch.zeros(2, COPIED, dtype=torch.uint8)
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        for size in sizes:
            evictions = Evictions(size, dataclasses.replace(shape, dtype=dtype))
            contestants: dict[str, Callable[[], float]] = {
                WHOLE: evictions,
                COPY: partial(_copy, long),
                PRODUCT: partial(_product, evictions.store),
            }
            take_turns(contestants, 1)
            seconds = take_turns(contestants, repeats)
            touched = bytes_touched(evictions.store, evictions.laps.moved, evictions.interval)
            memory = [touched * one / (2 * COPIED) for one in seconds[COPY]]
            speed = COPIED / 2**30 / (median_ms(seconds[COPY]) / 1e3)
            times = [median_ms(one) for one in (memory, seconds[PRODUCT], seconds[WHOLE])]
            ratios = [ratio(seconds[WHOLE], one) for one in (memory, seconds[PRODUCT])]
            section.rows.append([size, name, speed, touched / 2**20, *times, *ratios])
    return section


def bytes_touched(store: Store, moved: int, fresh: int) -> int:
    """Return the bytes that must be read or written, each once.

    Keys are read for the score, the values of fresh tokens for their size; what changes its place is
    read and written.
    """
    spec, element = store.spec, store.keys.element_size()
    keys = spec.num_heads * store.spec.capacity * spec.head_dim * element
    values = spec.num_heads * fresh * spec.value_dim * element
    return keys + values + 2 * bytes_to_move(store, moved)


def _copy(long: torch.Tensor) -> float:
    start = clock()
    long[1].copy_(long[0])
    return clock() - start


def _product(store: Store) -> float:
    queries = store.window.queries[0, 0].reshape(store.spec.num_heads, -1, store.spec.head_dim).float()
    keys = store.keys[0, 0].float()
    out = keys.new_empty(1, queries.shape[1], keys.shape[1])
    start = clock()
    for head in range(len(keys)):
        torch.bmm(queries[head : head + 1], keys[head : head + 1].mT, out=out)
    return clock() - start
