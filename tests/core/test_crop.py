"""Tokens taken back count for nothing: drafts that were rejected leave sums and windows right."""

from __future__ import annotations

import torch

from kvpolicy import AccumulatedAttention, LayerSpec, ModelSpec, Policy, TopK
from kvpolicy.eviction import LogitSpec, evict
from kvpolicy.row import Row
from kvpolicy.store import Store


def test_queries_after_a_crop_are_counted_again() -> None:
    policy = Policy(AccumulatedAttention(4) >> TopK(20), interval=4, recent=2)
    plan = policy.plan(ModelSpec(1)).layers[0]
    assert plan is not None
    spec = LayerSpec(1, 1, 4, 4, plan.capacity, torch.float32, torch.device("cpu"))
    store = Store(policy, plan, spec, [0], [Row()])
    generator = torch.Generator().manual_seed(0)

    def add(n: int) -> None:
        keys = torch.randn(1, 1, n, 4, generator=generator)
        store.append(0, keys, keys, [n])
        store.observe(0, keys, [n])
        store.advance([row.advanced(n, decoding=False) for row in store.rows])
        evict(store, [False], LogitSpec(0.5))

    add(8)
    add(2)
    store.crop([2])
    held = store.bands[0].state[0]
    assert held is not None
    before = held.slots[0].sum()
    add(2)
    held = store.bands[0].state[0]
    assert held is not None
    assert (held.slots[0].sum() - before - 2).abs() < 1e-4  # each query gives a mass of 1
