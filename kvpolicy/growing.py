"""The slots of a layer that a policy leaves alone: :class:`GrowingStore`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kvpolicy.errors import IntegrityError
from kvpolicy.policy import LayerPlan
from kvpolicy.row import Row
from kvpolicy.store import Store
from kvpolicy.view import LayerSpec
from kvpolicy.window import QueryWindow

__all__ = ["GrowingStore"]

#: What every row follows: no eviction is ever due.
_ENDLESS = LayerPlan(budget=sys.maxsize - 1, capacity=sys.maxsize, interval=None, recent=0, window=0)


class GrowingStore(Store):
    """Hold every token of layers that a policy leaves alone.

    A row's slot ``i`` holds its token ``i``, so that there are no positions and no order to keep; no
    policy is asked, so that there is no window and no state. Slots that are missing are allocated
    when tokens come: a quarter more than there were, and 64, or as many as are needed.

    Args:
        spec: heads, sizes, dtype and device of each layer, and the slots to begin with, 0 among them.
        layers: which layers of the model these are.
        rows: one record a request.

    Example::

        store = GrowingStore(spec, layers=[3], rows=[Row()])
        store.append(0, keys, values, [5])
        store.advance([row.advanced(5, decoding=False) for row in store.rows])
    """

    def __init__(self, spec: LayerSpec, layers: Sequence[int], rows: Sequence[Row]) -> None:
        # A store by what it offers, and not by what it holds: nothing of Store.__init__ is needed.
        self.plans, self.bands, self.drafts = (_ENDLESS,) * len(rows), (), 0
        self.spec, self.layers, self.rows = spec, tuple(layers), list(rows)
        self._ends = None
        lead, device = (len(self.layers), len(self.rows)), spec.device
        with torch.inference_mode(False):  # a cache may outlive the mode in which it is made
            self._allocate(lead)
            self.window = QueryWindow(*lead, spec.num_query_heads, 0, spec.head_dim, spec.dtype, device)
            self.broken = torch.zeros(lead[0] * lead[1], dtype=torch.int64, device=device)

    def _allocate(self, lead: tuple[int, int]) -> None:
        """Allocate the slots of ``lead`` layers and requests: keys and values alone."""
        spec, slots = self.spec, (*lead, self.spec.num_heads, self.spec.capacity)
        self.keys = torch.zeros(*slots, spec.head_dim, dtype=spec.dtype, device=spec.device)
        self.values = self.keys[..., : spec.value_dim]
        if not spec.values_in_keys:
            self.values = torch.zeros(*slots, spec.value_dim, dtype=spec.dtype, device=spec.device)
        self.positions = torch.zeros(*slots[:3], 0, dtype=torch.int32, device=spec.device)
        self.order = torch.zeros_like(self.positions)

    def append(
        self, index: int, keys: Tensor, values: Tensor, counts: Sequence[int], behind: Sequence[int] | None = None
    ) -> None:
        """Write new tokens behind the last slot of each row, growing where they do not fit; see :meth:`Store.append`.

        Keys and values have new addresses where the store has grown.
        """
        needed = max(row.length + count for row, count in zip(self.rows, counts, strict=True))
        capacity = self.spec.capacity
        if needed > capacity:
            held, used = self.arenas, self.longest
            self.spec = replace(self.spec, capacity=max(needed, capacity + capacity // 4 + 64))
            with torch.inference_mode(False):
                self._allocate((len(self.layers), len(self.rows)))
            for mine, old in zip(self.arenas, held, strict=True):
                mine[:, :, :, :used].copy_(old[:, :, :, :used])
        super().append(index, keys, values, counts, behind)

    def insist_on_room(self, counts: Sequence[int], behind: Sequence[int] | None = None) -> list[int]:
        """Return how many slots each row holds: there is always room for more."""
        return [row.length for row in self.rows] if behind is None else list(behind)

    def settle(self) -> None:
        """Do nothing: a slot's place is its token's position."""

    def fork(self, requests: Sequence[int]) -> GrowingStore:
        """Return a new store whose rows are copies of some rows of this one; modifies nothing.

        Args:
            requests: which, each as often as it is named.
        """
        rows = [replace(self.rows[r]) for r in requests]
        new = GrowingStore(replace(self.spec, capacity=max(row.length for row in rows)), self.layers, rows)
        new._copy_rows(self, requests)
        return new

    def _copy_rows(self, source: Store, requests: Sequence[int]) -> None:
        used = max(source.rows[r].length for r in requests)
        at = torch.tensor(list(requests), device=self.spec.device)
        for mine, theirs in zip(self.arenas, source.arenas, strict=True):
            mine[:, :, :, :used].copy_(theirs[:, :, :, :used].index_select(1, at))

    def reset(self) -> None:
        """Forget every token, keeping the slots, the requests' names and their seeds."""
        self.rows = [Row(request=row.request, seed=row.seed) for row in self.rows]
        self._ends = None

    def check_integrity(self) -> None:
        """Check that each row holds exactly the tokens that it has seen; modifies nothing.

        Raises:
            IntegrityError: it does not.
        """
        for r, row in enumerate(self.rows):
            if not (row.length == row.seen <= self.spec.capacity and row.evictions == row.settled == row.intact == 0):
                raise IntegrityError(f"request {r}: a layer left alone with {self.spec.capacity} slots counts {row}")
