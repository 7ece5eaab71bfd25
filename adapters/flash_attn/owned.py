"""The counts, positions and policies of slots that belong to somebody else: :class:`OwnedStore`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kvpolicy.adapters.flash_attn.memory import Memory
from kvpolicy.band import Band, Span
from kvpolicy.policy import EvictionPolicy, LayerPlan
from kvpolicy.row import Row
from kvpolicy.store import Slots, Store
from kvpolicy.view import LayerSpec, StageState, State

__all__ = ["OwnedStore"]


class OwnedStore(Store):
    """Hold everything but keys and values, which their owner shows for the time of an eviction.

    A view shows as many slots as are in use, and not as many as there are: a prompt lies in the owner's
    slots before it is cut, so that there may be far more of them than a budget.

    Args:
        policies: one a request.
        plans: one a request.
        spec: of each layer, with the slots that the owner has.
        layers: which layers of the model these are.
        rows: one record a request.
        lse: queries come with their log-sum-exp.

    Attributes:
        memory: the keys and values, during an eviction.
    """

    def __init__(
        self,
        policies: Sequence[EvictionPolicy],
        plans: Sequence[LayerPlan],
        spec: LayerSpec,
        layers: Sequence[int],
        rows: Sequence[Row],
        *,
        lse: bool,
    ) -> None:
        self.memory: Memory | None = None
        plans = [replace(plan, capacity=spec.capacity) for plan in plans]
        super().__init__(policies, plans, spec, layers, rows, lse=lse)

    def _allocate(self, lead: tuple[int, int]) -> None:
        spec = self.spec
        slots = (*lead, spec.num_heads, spec.capacity)
        self.positions = torch.full(slots, -1, dtype=torch.int32, device=spec.device)
        self.order = torch.arange(spec.capacity, dtype=torch.int32, device=spec.device).expand(slots).contiguous()
        for band in self.bands:
            band.state = band.begin(spec)

    @property
    def arenas(self) -> tuple[Tensor, ...]:
        """Return nothing: keys and values are not ours."""
        return ()

    @property
    def widest(self) -> int:
        """Return the slots that a view shows: those of the longest row."""
        return self.longest

    def slots(self, at: slice) -> Slots:
        """Return the slots in use of some of the ``layers * requests`` rows."""
        assert self.memory is not None
        size = self.widest
        own = (t.flatten(0, 1)[at][..., :size] for t in (self.positions, self.order))
        return Slots(*self.memory.slots(at, size), *own)

    def in_order(self, index: int) -> Tensor:
        """Return the positions of a layer's slots in use, ascending: ``[requests, H, S]``, -1 behind the last."""
        return self.positions[index].gather(-1, self.order[index, ..., : self.longest].to(torch.int64))

    def spans(self, band: Band, most: int) -> Iterator[Span]:
        """Yield all rows of a band, at most ``most`` at once, of one layer where layers lie apart."""
        assert self.memory is not None
        return band.spans(most, by_layer=not self.memory.joined)

    def state_of(self, band: Band, span: Span) -> State:
        """Return what a policy remembers of the slots in use."""
        return tuple(
            held and StageState(tuple(t[:, :, : self.widest] for t in held.slots), held.rows)
            for held in band.state_of(span)
        )

    def remember(self, band: Band, span: Span, state: State) -> None:
        """Take over what a policy remembers of the slots in use; modifies the band's tensors."""
        for mine, new in zip(self.state_of(band, span), state, strict=True):
            if mine is not None and new is not None:
                for held, given in zip((*mine.slots, *mine.rows), (*new.slots, *new.rows), strict=True):
                    held.copy_(given)

    def _move(self, at: slice, source: Tensor, target: Tensor) -> None:
        assert self.memory is not None
        self.memory.move_(at, source, target)
