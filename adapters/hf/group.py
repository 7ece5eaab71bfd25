"""Layers that share an arena: :class:`Group`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from kvpolicy.adapters.hf.latent import Latent
from kvpolicy.adapters.hf.ranks import Ranks
from kvpolicy.adapters.hf.static import StaticSlots
from kvpolicy.adapters.hf.weights import Weights
from kvpolicy.errors import UnsupportedError
from kvpolicy.eviction import LogitSpec, evict_due
from kvpolicy.policy import LayerPlan
from kvpolicy.row import Row
from kvpolicy.store import Store

__all__ = ["Group"]


@dataclass(eq=False)
class Group:
    """Hold the layers that share a device, a shape and a plan, and so an arena.

    Attributes:
        layers: indices.
        plans: of each of them; one that all requests share, or one a request; none where the policies
            leave them alone.
        device: where they live.
        num_layers: layers of the model.
        workspace: bytes that the temporaries of one eviction may take.
        ranks: the processes that share the heads.
        latents: how each layer expands its latents, where that is what it caches.
        weights: what policies read of the model's.
        store: allocated when the first tokens come.
        logits: what each layer's attention was last called with.
        unsettled: the rows as they were before tokens that may still be taken back.
        static: where compiled code finds the next slots, or None.
        turn_nbytes: what the largest turn so far held of one layer, besides the slots.
    """

    layers: tuple[int, ...]
    plans: tuple[LayerPlan, ...]
    device: torch.device
    num_layers: int
    workspace: int
    ranks: Ranks
    latents: dict[int, Latent]
    weights: Weights
    store: Store | None = None
    logits: dict[int, dict[str, Any]] = field(default_factory=dict)
    unsettled: list[Row] | None = None
    static: StaticSlots | None = None
    turn_nbytes: int = 0

    @property
    def evicts(self) -> bool:
        """Return whether policies evict from these layers, and do not leave them alone."""
        return bool(self.plans)

    @property
    def capacity(self) -> int:
        """Return the slots that the plans ask for, 0 without any."""
        return max((plan.capacity for plan in self.plans), default=0)

    def index(self, layer: int) -> int:
        """Return the place of a layer in the store."""
        return self.layers.index(layer)

    def part(self, layers: Sequence[int]) -> Group:
        """Return an empty group of some of these layers."""
        latents = {layer: latent for layer, latent in self.latents.items() if layer in layers}
        return replace(self, layers=tuple(layers), latents=latents, store=None, logits={}, unsettled=None, static=None)

    def fork(self, requests: Sequence[int]) -> Group:
        """Return a group of the same layers whose rows are copies of some of these."""
        plans = tuple(self.plans[r] for r in requests) if len(self.plans) > 1 else self.plans
        unsettled = None
        if self.unsettled is not None:
            unsettled = [self.unsettled[r] for r in requests]
        store = None if self.store is None else self.store.fork(requests)
        logits = dict(self.logits)
        return replace(self, plans=plans, store=store, logits=logits, unsettled=unsettled, static=None)

    def positions(self) -> dict[int, Tensor]:
        """Return a copy of the kept positions of each layer that evicts, ascending, -1 behind the last."""
        if self.store is None or not self.evicts:
            return {}
        return self.store.kept()

    def evict_after(self, before: Sequence[Row], *, turn: bool) -> None:
        """Evict where it is due, now that the tokens since ``before`` are there to stay."""
        assert self.store is not None
        evict_due(self.store, before, self.logit_spec, turn=turn)

    def settle(self) -> None:
        """Evict where it is due, now that no more tokens will be taken back."""
        if self.unsettled is not None:
            self.evict_after(self.unsettled, turn=False)
            self.unsettled = None

    def logit_spec(self, layers: Sequence[int] | None = None) -> LogitSpec:
        """Return what attention does to logits, the same for all layers of a store, or some, but for sinks."""
        assert self.store is not None
        spec, found = self.store.spec, [self.logits[layer] for layer in layers or self.layers]
        first = found[0]
        if any(one["scaling"] != first["scaling"] or one["softcap"] != first["softcap"] for one in found):
            raise UnsupportedError("layers scale their logits differently, which is not supported yet")
        sinks = None if first["s_aux"] is None else torch.stack([one["s_aux"].detach() for one in found])
        num_heads, head_offset = self.ranks.heads(spec.num_heads)
        return LogitSpec(
            scaling=float(first["scaling"] or (spec.query_dim or spec.head_dim) ** -0.5),
            softcap=first["softcap"],
            sinks=sinks,
            num_layers=self.num_layers,
            num_heads=num_heads,
            head_offset=head_offset,
            all_reduce=self.ranks.all_reduce,
            workspace=self.workspace,
            absorb=self._absorbed if self.latents else None,
            output=self.weights.output_of(layers or self.layers, spec),
            rotary=self.weights.rotary_of(spec),
        )

    def _absorbed(self, index: int, queries: Tensor) -> Tensor:
        """Return queries of a layer, counted within the store, that ask the latents it holds."""
        return self.latents[self.layers[index]].absorbed(queries)
