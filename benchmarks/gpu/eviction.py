"""What an eviction costs: one layer, and all layers of a model in one call."""

from __future__ import annotations

import itertools
import statistics
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks.gpu.deadline import Deadline
from benchmarks.gpu.decoder import ModelShape
from benchmarks.gpu.device import bandwidth, launches, timed
from benchmarks.report import Cell, Section
from benchmarks.stores import Shape, filled, grow, logits_of
from kvpolicy import Policy, ValueGuard
from kvpolicy.eviction import evict
from kvpolicy.policies import random_eviction, snapkv, vase
from kvpolicy.store import Store

__all__ = ["run"]

EMPTY = "–"


@dataclass(frozen=True)
class Cost:
    """Hold what one eviction took."""

    ms: float
    launches: int | str
    must_move: int


def run(
    model: ModelShape,
    budgets: list[int],
    batches: list[int],
    interval: int,
    copied: int,
    dtype: torch.dtype,
    deadline: Deadline,
    repeats: int = 5,
) -> Section:
    """Evict at each budget and batch.

    Args:
        model: whose layers they are.
        budgets: slots after an eviction.
        batches: requests.
        interval: slots that an eviction drops.
        copied: bytes of the tensor whose copy tells the bandwidth.
        dtype: of keys and values.
        deadline: cases beyond it are skipped.
        repeats: evictions of each.
    """
    device = deadline.device
    speed = bandwidth(device, copied)
    section = Section(
        "eviction",
        f"milliseconds of one eviction of {interval} slots a head, {model.heads} KV heads and {model.query_heads} "
        f"query heads of {model.head_dim}, {str(dtype).removeprefix('torch.')}, median of {repeats}; roofline: the "
        f"bytes that must move, at the {speed / 1e9:.1f} GB/s that a copy of {copied / 2**20:.0f} MiB reads and writes",
        ["policy", "budget", "batch", "layers", "ms", "ms a layer", "launches", "must move, MiB", "to roofline"],
    )
    shape = Shape(model.heads, model.query_heads // model.heads, model.head_dim, dtype)
    for batch, budget in itertools.product(batches, budgets):
        for (name, policy), layers in itertools.product(_policies(budget, interval).items(), (1, model.layers)):
            found = deadline.attempt(partial(_cost, policy, shape, layers, batch, device, repeats))
            lead: list[Cell] = [name, budget, batch, layers]
            if isinstance(found, str):
                section.rows.append([*lead, found, *[EMPTY] * 4])
                continue
            roofline = found.must_move / speed * 1e3
            numbers = [found.ms, found.ms / layers, found.launches, found.must_move / 2**20]
            section.rows.append([*lead, *numbers, found.ms / roofline])
    return section


def _policies(budget: int, interval: int) -> dict[str, Policy]:
    window = min(64, interval)
    return {
        "vase": vase(budget, interval=interval, recent=window),
        "snapkv": snapkv(budget, window=window, interval=interval),
        "random, prompt kept": random_eviction(budget, interval=interval, recent=window),
    }


def _cost(policy: Policy, shape: Shape, layers: int, batch: int, device: torch.device, repeats: int) -> Cost:
    store = filled(policy, shape, range(layers), requests=batch, device=device)
    once = partial(evict, store, [True] * batch, logits_of(store))
    grow(store)
    must_move = _must_move(policy, store, once)  # this one warms up, too
    times = []
    for _ in range(repeats):
        grow(store)
        times.append(timed(once, device))
    grow(store)
    return Cost(statistics.median(times), launches(once, device), must_move)


def _must_move(policy: Policy, store: Store, once: partial[None]) -> int:
    """Evict once, and return the bytes that no eviction can do without.

    Every key in use and the queries are read where the policy asks them, new values where it knows
    their norms, and the position of every slot; the order of slots is read and written, and so are
    survivors that change their place.
    """
    store.settle()
    spec, before = store.spec, store.positions.clone()
    element, budget, fresh = store.keys.element_size(), store.plans[0].budget, store.longest - store.plans[0].budget
    rows = len(store.layers) * len(store.rows)
    slots = rows * spec.num_heads * store.longest
    once()
    moved = int((store.positions[..., :budget] != before[..., :budget]).sum())
    total = slots * (4 + 8) + 2 * moved * ((spec.head_dim + spec.value_dim) * element + 4)
    if store.window.size:
        total += slots * spec.head_dim * element
        total += rows * spec.num_query_heads * store.window.size * spec.head_dim * element
    if any(isinstance(stage, ValueGuard) for stage in policy.stages):
        total += rows * spec.num_heads * fresh * spec.value_dim * element
    return total
