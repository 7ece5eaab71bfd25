"""Cutting requests to their budgets, many at once and in all layers: :class:`Cutter`."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import Tensor

from kvpolicy.adapters.vllm.arena import Arena
from kvpolicy.adapters.vllm.board import Counters
from kvpolicy.adapters.vllm.memory import Pages
from kvpolicy.adapters.vllm.progress import Progress
from kvpolicy.eviction import LogitSpec, evict
from kvpolicy.host import on_device
from kvpolicy.row import Row

__all__ = ["Cutter"]

_BYTES_PER_SLOT = 16  #: of positions, order and a policy's state, in a copy


class Cutter:
    """Evict from the layers of one KV cache group.

    Args:
        arena: what is remembered of the requests.
        pages: their keys and values.
        logits: what the model's attention does.
        counters: are told what was done; None where another group of the model tells them.
    """

    def __init__(self, arena: Arena, pages: Pages, logits: LogitSpec, counters: Counters | None) -> None:
        self._arena, self._pages, self._logits, self._counters = arena, pages, logits, counters

    def cut(self, due: Sequence[tuple[int, Progress]], table: Tensor) -> None:
        """Evict where it is due; requests count it.

        Args:
            due: rows of the table, and whose they are.
            table: ``[rows, blocks]`` on the device.
        """
        begin = time.perf_counter()
        # Rows of one policy stand next to each other; a prompt beyond the slots is a batch of its own.
        capacity = self._arena.spec.capacity
        order = sorted(due, key=lambda one: (one[1].row.length > capacity, repr(one[1].policy), one[0]))
        for _, batch in itertools.groupby(order, key=lambda one: one[0] if one[1].row.length > capacity else -1):
            rows, held = zip(*batch, strict=True)
            self._cut(held, table.index_select(0, on_device(rows, table.device)))
        if self._counters is not None:
            self._counters.add("compaction_seconds", time.perf_counter() - begin)

    def _cut(self, held: Sequence[Progress], table: Tensor) -> None:
        rows, places = [one.row for one in held], [one.request.place for one in held]
        policies, plans = [one.policy for one in held], [one.plan for one in held]
        over = [one.over for one in held]
        kept = [one.plan.budget if one.over else one.row.length for one in held]
        after: Sequence[Row] = rows
        for at in self._parts(rows):
            store = self._arena.taken(at, places, policies, plans, rows, [one.begun for one in held])
            store.memory, write = self._pages.open(at, table, [row.length for row in rows], kept)
            evict(store, over, self._logits_of(at))
            write()
            self._arena.put(store, at, places)
            after = store.rows
        for one, row in zip(held, after, strict=True):
            if self._counters is not None:
                self._counters.add("evictions", row.evictions - one.row.evictions)
                self._counters.add("evicted_tokens", one.row.length - row.length)
            one.row, one.begun = row, True

    def _parts(self, rows: Sequence[Row]) -> Iterator[slice]:
        """Yield parts of the layers whose copies fit into the workspace."""
        spec, layers = self._arena.spec, len(self._arena.layers)
        slots = max(spec.capacity, *(row.length for row in rows)) * spec.num_heads * _BYTES_PER_SLOT
        queries = self._arena.window * spec.num_query_heads * spec.head_dim * spec.dtype.itemsize
        most = max(1, self._logits.workspace // 2 // (len(rows) * (slots + queries)))
        for first in range(0, layers, most):
            yield slice(first, min(first + most, layers))

    def _logits_of(self, at: slice) -> LogitSpec:
        sinks = self._logits.sinks
        return self._logits if sinks is None else replace(self._logits, sinks=sinks[at])
