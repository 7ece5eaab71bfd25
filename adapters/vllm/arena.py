"""What a worker remembers of its requests: :class:`Arena`, in tensors that keep their addresses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import Tensor

from kvpolicy.adapters.flash_attn.owned import OwnedStore
from kvpolicy.host import on_device
from kvpolicy.policy import EvictionPolicy, LayerPlan
from kvpolicy.row import Row
from kvpolicy.view import LayerSpec

__all__ = ["Arena"]

#: Of a tensor that policies remember: whether it has slots, its shape behind the places, dtype, and which of them.
_Kind: TypeAlias = tuple[bool, tuple[int, ...], torch.dtype, int]


class Arena:
    """Hold positions, order, newest queries and policy state of every place, of all layers of a group.

    Args:
        spec: of each layer; its capacity is what a request may fill.
        layers: indices in the model.
        places: requests that can be held at once.
        window: queries that are remembered of each.

    Attributes:
        positions: ``[layers, places, H, C]`` int32.
        order: ``[layers, places, H, C]`` int32.
        queries: ``[layers, places * window + 1, Hq, D]``: the query of position ``p`` is line
            ``place * window + p % window``; the last line is for queries that nobody asks. None without a window.
    """

    def __init__(self, spec: LayerSpec, layers: Sequence[int], places: int, window: int) -> None:
        self.spec, self.layers, self.window, self._places = spec, tuple(layers), window, places
        shape = (len(layers), places, spec.num_heads, spec.capacity)
        # Nothing is read that was not written: a place that no request has had takes no memory of the host.
        self.positions = torch.empty(shape, dtype=torch.int32, device=spec.device)
        self.order = torch.empty(shape, dtype=torch.int32, device=spec.device)
        self.queries: Tensor | None = None
        if window:
            lines = (len(layers), places * window + 1, spec.num_query_heads, spec.head_dim)
            self.queries = torch.empty(lines, dtype=spec.dtype, device=spec.device)
        self._states: dict[_Kind, Tensor] = {}

    def nbytes(self) -> int:
        """Return the bytes of all that is held."""
        held = [self.positions, self.order, *([] if self.queries is None else [self.queries])]
        held += self._states.values()
        return sum(t.numel() * t.element_size() for t in held)

    def set_aside(self, policy: EvictionPolicy) -> None:
        """Allocate what a policy remembers, before the first request follows it."""
        self._state_of(policy)

    def _state_of(self, policy: EvictionPolicy) -> list[Tensor]:
        """Return what a policy remembers of every place, ``[layers, places, ...]``.

        A place belongs to one request, which follows one policy: policies share the tensors, so that as many
        policies as requests like to name take no more memory than the one that remembers most.
        """
        held: list[Tensor] = []
        kinds: dict[_Kind, None] = {}
        for one in policy.init(replace(self.spec, device=torch.device("meta")), 1):
            for by_slot, tensors in () if one is None else ((True, one.slots), (False, one.rows)):
                for t in tensors:
                    shape = tuple(t.shape[1:])
                    nth = sum(kind[:3] == (by_slot, shape, t.dtype) for kind in kinds)
                    kinds[by_slot, shape, t.dtype, nth] = None
        for kind in kinds:
            if kind not in self._states:
                sizes = (len(self.layers), self._places, *kind[1])
                self._states[kind] = torch.zeros(sizes, dtype=kind[2], device=self.spec.device)
            held.append(self._states[kind])
        return held

    def taken(
        self,
        at: slice,
        places: Sequence[int],
        policies: Sequence[EvictionPolicy],
        plans: Sequence[LayerPlan],
        rows: Sequence[Row],
        begun: Sequence[bool],
    ) -> OwnedStore:
        """Return a store of some layers and places, a copy: rows of one policy stand next to each other.

        Args:
            at: layers, counted within the arena.
            places: one a row.
            policies: one a row.
            plans: one a row.
            rows: with every token that there is.
            begun: whether a policy has seen a row; what is held of others belongs to nobody.
        """
        size = max(self.spec.capacity, *(row.length for row in rows))
        spec = replace(self.spec, capacity=size)
        store = OwnedStore(policies, plans, spec, self.layers[at], rows, lse=False)
        known = [r for r, one in enumerate(begun) if one]
        if known:
            source, target = (on_device(n, spec.device) for n in ([places[r] for r in known], known))
            width = self.spec.capacity
            for mine, held in ((store.positions, self.positions), (store.order, self.order)):
                mine[:, target, :, :width] = held[at].index_select(1, source)
            self._copy(store, at, places, known, back=False)
        if self.queries is not None and store.window.size:
            self._ask(store, at, places)
        return store

    def put(self, store: OwnedStore, at: slice, places: Sequence[int]) -> None:
        """Take back what an eviction has left of some layers and places."""
        target, width = on_device(places, self.spec.device), self.spec.capacity
        for held, mine in ((self.positions, store.positions), (self.order, store.order)):
            held[at].index_copy_(1, target, mine[..., :width])
        self._copy(store, at, places, range(len(places)), back=True)

    def _copy(self, store: OwnedStore, at: slice, places: Sequence[int], which: Sequence[int], *, back: bool) -> None:
        """Copy what policies remember between a store and the arena."""
        layers, width = len(store.layers), self.spec.capacity
        for band in store.bands:
            mine = [r for r in which if band.first <= r < band.stop]
            if not mine:
                continue
            here = on_device([r - band.first for r in mine], self.spec.device)
            there = on_device([places[r] for r in mine], self.spec.device)
            by_slot = {id(t) for t in band.slots()}
            for held, kept in zip(band.tensors(), self._state_of(band.policy), strict=True):
                rows = held.view(layers, band.count, *held.shape[1:])
                part = rows[:, :, :, :width] if id(held) in by_slot else rows
                if back:
                    kept[at].index_copy_(1, there, part.index_select(1, here))
                else:
                    part[:, here] = kept[at].index_select(1, there)

    def _ask(self, store: OwnedStore, at: slice, places: Sequence[int]) -> None:
        """Let the store's window hold the newest queries of each row, oldest first."""
        assert self.queries is not None
        size, window, device = store.window.size, self.window, self.spec.device
        seen = on_device([row.seen for row in store.rows], device)
        position = seen[:, None] + torch.arange(-size, 0, device=device)
        lines = on_device(places, device)[:, None] * window + position.clamp(min=0) % window
        found = self.queries[at].index_select(1, lines.flatten()).unflatten(1, lines.shape)
        store.window.queries.copy_(found.transpose(2, 3))
        store.window.positions.copy_(torch.where(position >= 0, position, -1).expand(len(store.layers), -1, -1))
