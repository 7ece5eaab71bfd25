"""Decoding at fixed shapes, for ``torch.compile``: :class:`StaticSlots`.

A compiled step reads no count of the host: where the next token goes stands in tensors, and all
slots are attended to, those in use being told by a mask. The host makes the step count afterwards,
evicts between steps in place, and writes the tensors anew: same addresses, no new graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvpolicy.store import Store

__all__ = ["StaticSlots"]


class StaticSlots:
    """Say where the next token of each row goes, in tensors that compiled code reads.

    Attributes:
        store: whose slots.
        slots: ``[requests]`` int64, the first free slot of each row.
        places: ``[requests]`` int64, where the next query of each row goes in the window.
        full: some row has no slot left.
    """

    def __init__(self, store: Store) -> None:
        device, requests = store.spec.device, len(store.rows)
        self.store, self.full = store, False
        with torch.inference_mode(False):  # a cache may outlive the mode in which it is made
            self.slots = torch.zeros(requests, dtype=torch.int64, device=device)
            self.places = torch.zeros(requests, dtype=torch.int64, device=device)
            self._rows = torch.arange(requests, device=device)[:, None]
            self._heads = torch.arange(store.spec.num_heads, device=device)[None]
            self._query_heads = torch.arange(store.spec.num_query_heads, device=device)[None]
            self._every = torch.arange(store.spec.capacity, device=device)
        self._known: tuple[list[int], list[int]] = ([], [])
        for tensor in (*store.arenas, store.window.queries, self.slots, self.places):
            torch._dynamo.mark_static_address(tensor)
        self.refresh()

    def refresh(self) -> None:
        """Write where the next tokens go, now that others count; modifies the tensors in place."""
        slots, places = [row.length for row in self.store.rows], list(self.store.window.at)
        self.full = max(slots) >= self.store.spec.capacity
        known_slots, known_places = self._known
        if slots == [one + 1 for one in known_slots]:
            self.slots.add_(1)
        elif slots != known_slots:
            self.slots.copy_(torch.tensor(slots))
        if places != known_places:
            self.places.copy_(torch.tensor(places))
        self._known = slots, places

    def take(self, index: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write one token of each row ``[requests, H, 1, D]``; return all slots of the layer."""
        mine, others = self.store.keys[index], self.store.values[index]
        at = (self._rows, self._heads, self.slots[:, None])
        mine.index_put_(at, keys[:, :, 0])
        if not self.store.spec.values_in_keys:
            others.index_put_(at, values[:, :, 0])
        return mine, others

    def visible(self) -> Tensor:
        """Return which slots hold tokens, the new one among them: ``[requests, 1, 1, C]`` bool."""
        return (self._every <= self.slots[:, None])[:, None, None]

    def observe(self, index: int, queries: Tensor) -> None:
        """Write the query of one token of each row, ``[requests, Hq, 1, D]``."""
        if self.store.window.size:
            at = (self._rows, self._query_heads, self.places[:, None])
            self.store.window.queries[index].index_put_(at, queries[:, :, 0])
