"""Bytes and addresses stay what they were when the slots were allocated."""

from __future__ import annotations

import pytest
import torch

from kvpolicy.adapters.hf import EvictionCache
from kvpolicy.store import Store
from tests.hf.zoo import zoo
from tests.models import real, tiny


def formula(store: Store, per_slot: int, per_row: int) -> int:
    """Return the bytes that docs/concepts.md promises."""
    spec, plan = store.spec, store.plans[0]
    heads, slots, e = spec.num_heads, plan.budget + (plan.interval or 0), spec.dtype.itemsize
    each = heads * slots * (spec.head_dim + spec.value_dim) * e + 8 * heads * slots
    if plan.window:
        each += spec.num_query_heads * plan.window * spec.head_dim * e + 4 * plan.window
    each += heads * slots * per_slot + per_row
    return each * len(store.layers) * len(store.rows)


#: Bytes of state: one float a slot for each remembered number, and bytes a row.
STATE = {"vase": (4, 0), "streaming_llm": (0, 0), "h2o": (4, 0), "mixture": (8, 0), "knorm": (4, 0)}


@pytest.mark.parametrize("name", STATE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_equal_the_formula(name: str, dtype: torch.dtype) -> None:
    model = tiny("llama", dtype)
    with EvictionCache(model, zoo(24)[name]) as cache:
        model.generate(torch.randint(2, 97, (3, 40)), max_new_tokens=30, do_sample=False, past_key_values=cache)
        store = cache.groups[0].store
        assert store is not None
        assert cache.receipt().nbytes == store.nbytes() == formula(store, *STATE[name])


@pytest.mark.model
@pytest.mark.slow
def test_bytes_and_addresses_are_constant_to_token_2000_on_the_real_model() -> None:
    model = real()
    policy = zoo(64, interval=32, recent=16, window=16)["vase"]
    token = torch.tensor([[504]])
    with EvictionCache(model, policy) as cache:
        token = model(token.repeat(1, 70), past_key_values=cache).logits[:, -1:].argmax(-1)
        store = cache.groups[0].store
        assert store is not None
        addresses, nbytes = [t.data_ptr() for t in store.tensors()], store.nbytes()
        assert nbytes == formula(store, *STATE["vase"])
        while cache.columns < 2000:
            token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
            if cache.columns % 100 == 0:
                assert [t.data_ptr() for t in store.tensors()] == addresses
                assert store.nbytes() == nbytes
        receipt = cache.receipt()
        assert receipt.evictions[0] > 55
        assert receipt.slots[0] <= receipt.capacity == 96
        assert receipt.nbytes == nbytes
