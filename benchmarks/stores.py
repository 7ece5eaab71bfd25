"""Stores full of random tokens, about to be evicted."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvpolicy.eviction import LogitSpec
from kvpolicy.policy import EvictionPolicy, ModelSpec
from kvpolicy.row import Row
from kvpolicy.store import Store
from kvpolicy.view import DEFAULT_WORKSPACE, LayerSpec

__all__ = ["Shape", "filled", "grow", "logits_of"]


@dataclass(frozen=True)
class Shape:
    """Give the sizes of a layer."""

    heads: int
    group: int
    dim: int
    dtype: torch.dtype = torch.float32


def filled(
    policy: EvictionPolicy,
    shape: Shape,
    layers: range,
    kind: type[Store] = Store,
    *,
    requests: int = 1,
    device: torch.device | str = "cpu",
) -> Store:
    """Return a store that holds its budget; :func:`grow` makes an eviction due."""
    plan = policy.plan(ModelSpec(len(layers))).layers[0]
    assert plan is not None
    heads = shape.heads * shape.group
    spec = LayerSpec(shape.heads, heads, shape.dim, shape.dim, plan.capacity, shape.dtype, torch.device(device))
    store = kind(policy, plan, spec, layers, [Row() for _ in range(requests)])
    _add(store, plan.budget, decoding=False)
    return store


def grow(store: Store) -> None:
    """Add an interval of random tokens."""
    _add(store, store.plans[0].capacity - store.plans[0].budget, decoding=True)


def _add(store: Store, count: int, *, decoding: bool) -> None:
    spec, window, requests = store.spec, store.plans[0].window, len(store.rows)

    def random(heads: int, tokens: int, dim: int) -> Tensor:
        return torch.randn(requests, heads, tokens, dim, device=spec.device).to(spec.dtype)

    for index in range(len(store.layers)):
        keys, values = (random(spec.num_heads, count, dim) for dim in (spec.head_dim, spec.value_dim))
        store.append(index, keys, values, [count] * requests)
        store.observe(index, random(spec.num_query_heads, min(count, window), spec.head_dim), [count] * requests)
    store.advance([row.advanced(count, decoding=decoding) for row in store.rows])


def logits_of(store: Store, workspace: int = DEFAULT_WORKSPACE) -> LogitSpec:
    """Return what an ordinary model's attention does."""
    return LogitSpec(
        scaling=store.spec.head_dim**-0.5,
        num_layers=len(store.layers),
        num_heads=store.spec.num_heads,
        workspace=workspace,
    )
