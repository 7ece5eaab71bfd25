"""Bytes that each cache holds, and the most that a step takes beyond them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.memory import peak_bytes
from benchmarks.models import all_cores, tokens, twin
from benchmarks.peers.entrants import KVPOLICY, Entrant, Sizes, full, ours, theirs
from benchmarks.report import Section
from kvpolicy.adapters.hf import EvictionCache
from kvpolicy.policies import snapkv

__all__ = ["run"]

MIB = 2**20


def run(model: Any, sizes: Sizes, workspace: int) -> Section:
    """Fill every cache up to one token before an eviction, then look at that token.

    Args:
        model: whose caches they are.
        sizes: of all.
        workspace: MiB that one further kvpolicy cache may take for an eviction.
    """
    section = Section(
        "memory",
        f"MiB of all layers at budget {sizes.budget}, interval {sizes.interval}: held before a step that evicts, "
        "and the allocator's peak beyond that in an ordinary step and in one that evicts",
        ["tool", "policy", "slots before", "slots after", "held", "of it keys and values", "step", "evicting step"],
    )
    ids = tokens(model, sizes.budget + sizes.interval)
    with ExitStack() as presses:
        small = twin(model)
        policy = snapkv(sizes.budget, window=sizes.window, pool=sizes.pool, interval=sizes.interval)
        entrants = [
            full(model),
            *theirs(model, sizes, presses),
            *ours(model, sizes),
            Entrant(
                KVPOLICY,
                f"snapkv, workspace of {workspace} MiB",
                small,
                EvictionCache(small, policy, workspace=workspace * MIB),
            ),
        ]
        section.rows = [_row(entrant, ids, sizes) for entrant in entrants]
    return section


def _row(entrant: Entrant, ids: Tensor, sizes: Sizes) -> list[Any]:
    prompt, *decoded = torch.split(ids, [sizes.budget, *[1] * sizes.interval], 1)
    with torch.no_grad():
        with all_cores():
            for part in (prompt, *decoded[:-3]):
                entrant.feed(part)
        peak_bytes(partial(entrant.feed, decoded[-3]))  # it counts no block freed that it did not see allocated
        ordinary = peak_bytes(partial(entrant.feed, decoded[-2]))
        before, held, pairs = entrant.slots, _held(entrant), _pairs(entrant)
        evicting = peak_bytes(partial(entrant.feed, decoded[-1]))
    numbers = [count / MIB for count in (held, pairs, ordinary, evicting)]
    return [entrant.tool, entrant.policy, before, entrant.slots, *numbers]


def _held(entrant: Entrant) -> int:
    """Return the bytes held between two steps: cache, and what the tool keeps beside it."""
    if isinstance(entrant.cache, EvictionCache):
        receipt = entrant.cache.receipt()
        return receipt.nbytes + receipt.other_nbytes
    buffers = entrant.press.hidden_states_buffer.values() if entrant.press else ()
    return _pairs(entrant) + sum(_nbytes(one) for buffer in buffers for one in buffer)


def _pairs(entrant: Entrant) -> int:
    """Return the bytes of keys and values, in use or not."""
    return sum(_nbytes(tensor) for tensor in _tensors(entrant.cache))


def _tensors(cache: Any) -> Iterator[Tensor]:
    if isinstance(cache, EvictionCache):
        stores = [group.store for group in cache.groups]
        yield from (tensor for store in stores if store is not None for tensor in (store.keys, store.values))
    else:
        yield from (tensor for layer in cache.layers for tensor in (layer.keys, layer.values))


def _nbytes(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()
