"""The memory that a policy takes of a model, to the byte, before anything is allocated.

Nothing is computed a second time: the stores that a cache would allocate are made on torch's ``meta`` device,
which has shapes and no memory, and asked for their bytes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvpolicy.policy import EvictionPolicy, LayerPlan, ModelSpec
from kvpolicy.ragged import new_store
from kvpolicy.row import Row
from kvpolicy.store import Store
from kvpolicy.view import LayerSpec

__all__ = ["Footprint", "footprint", "planned_store", "token_nbytes"]


@dataclass(frozen=True)
class Footprint:
    """Say how many bytes layers take under a policy, and without one.

    Attributes:
        pairs: keys and values.
        places: the position of each slot, and their order.
        window: the newest queries.
        state: what the stages remember.
        alone: keys and values of layers that the policy leaves alone.
        full: keys and values of every token, in all of the layers.
    """

    pairs: int
    places: int
    window: int
    state: int
    alone: int
    full: int

    @property
    def total(self) -> int:
        """Return the bytes under the policy."""
        return self.pairs + self.places + self.window + self.state + self.alone


def planned_store(policy: EvictionPolicy, plan: LayerPlan, layer: LayerSpec, rows: int) -> Store:
    """Return the store of one layer, on the meta device: shapes, and no memory."""
    spec = dataclasses.replace(layer, capacity=plan.capacity, device=torch.device("meta"))
    return new_store(policy, plan, spec, [0], [Row() for _ in range(rows)])


def token_nbytes(layer: LayerSpec) -> int:
    """Return the bytes of one token's keys and values."""
    numbers = layer.head_dim + (0 if layer.values_in_keys else layer.value_dim)
    return layer.num_heads * numbers * layer.dtype.itemsize


def footprint(
    policy: EvictionPolicy, layers: Sequence[LayerSpec], *, batch: int, tokens: int, max_new_tokens: int | None = None
) -> Footprint:
    """Return the bytes that layers take under a policy, and with a full cache.

    What the transformers adapter allocates; the others do as much, and may keep log-sum-exps beside the queries.
    A prompt takes besides, while it is read, its own keys and values of one layer at a time.

    Args:
        policy: planned for these layers.
        layers: those that evict, in order; their capacity and device do not matter.
        batch: requests.
        tokens: of each, in the full cache and in layers that the policy leaves alone.
        max_new_tokens: decoded at most, for a policy that evicts at the end of a turn only.

    Raises:
        BudgetError: the policy does not fit, or nobody says how many tokens will be decoded.

    >>> import torch
    >>> from kvpolicy.policies import vase
    >>> layer = LayerSpec(8, 32, 128, 128, 0, torch.bfloat16, torch.device("meta"))
    >>> found = footprint(vase(1024), [layer] * 36, batch=1, tokens=32768)
    >>> found.total, found.full
    (183075840, 4831838208)
    """
    heads = {layer.num_heads for layer in layers}
    plan = policy.plan(ModelSpec(len(layers), max_new_tokens, heads.pop() if len(heads) == 1 else None))

    @functools.cache
    def parts(plan: LayerPlan, layer: LayerSpec) -> tuple[int, int, int, int]:
        store = planned_store(policy, plan, layer, batch)
        pairs, window = sum(t.nbytes for t in store.arenas), store.window.nbytes()
        state = sum(t.nbytes for band in store.bands for t in band.tensors())
        return pairs, store.nbytes() - pairs - window - state, window, state

    found = [parts(one, layer) for one, layer in zip(plan.layers, layers, strict=True) if one is not None]
    pairs, places, window, state = (sum(column) for column in zip(*found, strict=True)) if found else (0, 0, 0, 0)
    alone = [layer for one, layer in zip(plan.layers, layers, strict=True) if one is None]
    sizes = [sum(map(token_nbytes, some)) * tokens * batch for some in (alone, layers)]
    return Footprint(pairs, places, window, state, *sizes)
