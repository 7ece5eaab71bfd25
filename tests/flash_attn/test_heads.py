"""Heads of different budgets in a FlashCache: each (row, head) is a sequence of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kvpolicy import Adaptive, Attention, PerHead, Policy, TopK, UnsupportedError, UsageError
from kvpolicy.adapters.flash_attn import EvictionState, FlashCache
from kvpolicy.adapters.hf import EvictionCache
from kvpolicy.ragged import RaggedStore
from tests.flash_attn.test_flash_cache import feed, made, padded
from tests.hf.test_heads import POLICIES
from tests.models import tiny
from tests.oracle import Oracle

SPLIT = Policy(Attention(16) >> TopK(PerHead((40, 16))), interval=8, recent=8)
SIZES: dict[str, Any] = {"num_layers": 1, "num_heads": 2, "num_query_heads": 4, "head_dim": 8, "dtype": torch.float32}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", POLICIES)
def test_it_agrees_with_the_oracle(name: str, dtype: torch.dtype) -> None:
    lengths = [40, 33, 9]
    model, (tokens, mask), policy = tiny("llama", dtype), padded(lengths), POLICIES[name]
    oracle, cache, counts = Oracle(model, policy), made(model, policy, 3), [40, 33, 9]
    worst = scale = 0.0
    addresses = [t.data_ptr() for group in cache.groups for t in group.store.tensors()]
    for step in range(90):
        expected = oracle.forward(tokens, mask)
        found = feed(model, cache, tokens, counts)
        worst = max(worst, (found - expected).abs().max().item())
        scale = max(scale, expected.abs().max().item())
        tokens = expected.argmax(-1, keepdim=True)
        if step == 50:  # a later turn, beside what each head holds
            tokens = tokens.repeat(1, 7)
        mask, counts = torch.cat([mask, torch.ones_like(tokens)], 1), [tokens.shape[1]] * 3
        receipt = cache.receipt()
        for layer in receipt.layers:
            assert torch.equal(receipt.positions(layer), oracle.kept(layer)), f"layer {layer}"
    cache.check_integrity()
    assert min(cache.receipt().evictions) >= 5
    assert addresses == [t.data_ptr() for group in cache.groups for t in group.store.tensors()]
    assert worst <= (1e-12 if dtype == torch.float64 else 1e-6) * max(1.0, scale)


def test_it_keeps_what_the_transformers_adapter_keeps() -> None:
    model, (tokens, _), policy = tiny("llama", torch.float64), padded([40, 40]), POLICIES["vase, adaptive"]
    cache = made(model, policy, 2)
    with EvictionCache(model, policy) as theirs:
        for _ in range(60):
            out = model(tokens, past_key_values=theirs).logits
            assert torch.allclose(feed(model, cache, tokens), out[:, -1], atol=1e-9)
            tokens = out[:, -1:].argmax(-1)
        mine, hers = cache.receipt(), theirs.receipt()
    assert min(mine.evictions) >= 5
    for layer in mine.layers:
        assert mine.positions(layer).equal(hers.positions(layer))


def test_forks_and_reordered_rows_go_on_as_their_own() -> None:
    model, (tokens, _), policy = tiny("llama", torch.float64), padded([40, 40]), POLICIES["vase, adaptive"]
    cache = made(model, policy, 2)
    feed(model, cache, tokens)
    fork = cache.fork([1, 0])
    cache.reorder([1, 0])
    for _ in range(20):
        assert torch.equal(feed(model, cache, tokens[:, :1]), feed(model, fork, tokens[:, :1]))
    fork.check_integrity()
    cache.check_integrity()
    assert all(a.equal(b) for a, b in zip(cache.receipt().kept.values(), fork.receipt().kept.values(), strict=True))


@pytest.mark.parametrize("floor", [0, 0.2])
def test_a_turn_beside_layers_whose_heads_differ_more(floor: float) -> None:
    """A layer takes a turn while another has a head that is longer than any of its own."""
    policy = Policy(Attention(over="all") >> TopK(Adaptive(40, floor=floor)), interval=4, recent=4)
    sizes = {"num_layers": 2, "num_heads": 2, "num_query_heads": 4, "head_dim": 16, "dtype": torch.float64}
    cache, generator = FlashCache(policy, **sizes), torch.Generator().manual_seed(0)
    for width in (200, 5, 1, 1, 1, 1, 7, 1):
        before = cache.receipt() if any(cache.seen) else None
        for layer in range(2):
            q, k, v = (torch.randn(1, width, n, 16, generator=generator, dtype=torch.float64) for n in (4, 2, 2))
            if layer:
                k = k * torch.tensor([0.01, 40.0]).to(k)[:, None]
            keys, values = (t if before is None else held(cache, layer, t, n) for n, t in enumerate((k, v)))
            out = cache.attend(layer, q, k, v)
            assert torch.allclose(out, attended(q, keys, values), atol=1e-9)
        cache.step()
        cache.check_integrity()
    longest = [int(store.held.max()) for store in [cache.groups[0].store] if isinstance(store, RaggedStore)]
    assert longest


def held(cache: FlashCache, layer: int, new: Tensor, which: int) -> list[Tensor]:
    """Return the keys or values of each head of a row, the new tokens behind them."""
    store = cache.groups[0].store
    assert isinstance(store, RaggedStore)
    return [torch.cat([pair[which][:-1], new[0, :, head]]) for head, pair in enumerate(store.heads_of(layer)[0])]


def attended(q: Tensor, keys: Tensor | list[Tensor], values: Tensor | list[Tensor]) -> Tensor:
    """Attend by hand, head by head."""
    lines, (_, width, heads, _) = [], q.shape
    for head in range(heads):
        k, v = (t[head // 2] if isinstance(t, list) else t[0, :, head // 2] for t in (keys, values))
        logits = q[0, :, head] @ k.T * q.shape[-1] ** -0.5
        hidden = torch.ones(width, len(k), dtype=torch.bool).triu(len(k) - width + 1)
        lines.append(logits.masked_fill(hidden, -torch.inf).softmax(-1) @ v)
    return torch.stack(lines, 1)[None]


def test_the_slots_of_heads_are_freed() -> None:
    cache = FlashCache(SPLIT, **SIZES, batch_size=3)
    store = cache.groups[0].store
    assert isinstance(store, RaggedStore)
    assert store.keys.shape == (1, 3, 40 + 8 + 16 + 8, 8)


def test_what_one_length_a_row_cannot_say_is_refused() -> None:
    cache = FlashCache(SPLIT, **SIZES)
    with pytest.raises(UsageError, match="heads of layer 0 have slots of different numbers"):
        cache.cache(0)
    with pytest.raises(UnsupportedError, match="budgets of their own"):
        EvictionState(SPLIT, slots=64, **SIZES)
    with pytest.raises(UnsupportedError, match=r"head_lengths|varlen"):
        FlashCache(Policy(TopK(Adaptive(24)), recent=8), **SIZES, backend="sdpa")
