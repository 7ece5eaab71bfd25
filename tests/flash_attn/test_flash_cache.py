"""A FlashCache gives what a full cache gives in which the evicted tokens are hidden, and what transformers gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kvpolicy import KeyNorm, PerLayer, Policy, TopK
from kvpolicy.adapters.flash_attn import FlashCache
from kvpolicy.adapters.hf import EvictionCache
from tests.flash_attn.llama import forward
from tests.hf.zoo import zoo
from tests.models import tiny
from tests.oracle import Oracle

ZOO = zoo(24)
POLICIES = ("vase", "snapkv", "h2o", "streaming_llm", "knorm", "mixture")


def made(model: Any, policy: Policy, batch_size: int = 1, **options: Any) -> FlashCache:
    config = model.config
    return FlashCache(
        policy,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_key_value_heads,
        num_query_heads=config.num_attention_heads,
        head_dim=config.head_dim,
        batch_size=batch_size,
        dtype=model.dtype,
        **options,
    )


def padded(lengths: list[int]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(len(lengths))
    tokens = torch.randint(2, 97, (len(lengths), max(lengths)), generator=generator)
    return tokens, (torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]).long()


def feed(model: Any, cache: FlashCache, tokens: Tensor, counts: list[int] | None = None) -> Tensor:
    positions = cache.next_positions(tokens.shape[1], counts)
    out = forward(model, tokens, positions, lambda layer, q, k, v: cache.attend(layer, q, k, v, counts))
    cache.step()
    return out


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("lengths", [[40], [40, 33, 9]], ids=["one", "ragged"])
@pytest.mark.parametrize("name", POLICIES)
def test_it_agrees_with_the_oracle(name: str, lengths: list[int], dtype: torch.dtype) -> None:
    model, (tokens, mask) = tiny("llama", dtype), padded(lengths)
    oracle, cache = Oracle(model, ZOO[name]), made(model, ZOO[name], len(lengths))
    worst = scale = 0.0
    counts: list[int] | None = lengths
    addresses = [t.data_ptr() for group in cache.groups for t in group.store.tensors()]
    for step in range(90):
        expected = oracle.forward(tokens, mask)
        found = feed(model, cache, tokens, counts)
        worst = max(worst, (found - expected).abs().max().item())
        scale = max(scale, expected.abs().max().item())
        tokens = expected.argmax(-1, keepdim=True)
        if step == 50:  # a later turn
            tokens = tokens.repeat(1, 7)
        counts = None
        mask = torch.cat([mask, torch.ones_like(tokens)], 1)
        receipt = cache.receipt()
        for layer in receipt.layers:
            assert torch.equal(receipt.positions(layer), oracle.kept(layer)), f"layer {layer}"
    cache.check_integrity()
    assert min(cache.receipt().evictions) >= 5
    assert addresses == [t.data_ptr() for group in cache.groups for t in group.store.tensors()]
    assert worst <= (1e-12 if dtype == torch.float64 else 1e-6) * max(1.0, scale)


@pytest.mark.parametrize("name", POLICIES)
def test_it_keeps_what_the_transformers_adapter_keeps(name: str) -> None:
    model, (tokens, mask) = tiny("llama", torch.float64), padded([40, 21])
    cache = made(model, ZOO[name], 2)
    counts: list[int] | None = [40, 21]
    with EvictionCache(model, ZOO[name]) as theirs:
        for _ in range(60):
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
            out = model(tokens, attention_mask=mask, position_ids=positions, past_key_values=theirs)
            found = feed(model, cache, tokens, counts)
            tokens, counts = out.logits[:, -1:].argmax(-1), None
            mask = torch.cat([mask, torch.ones_like(tokens)], 1)
            assert torch.allclose(found, out.logits[:, -1], atol=1e-9)
        mine, hers = cache.receipt(), theirs.receipt()
    assert mine.evictions == hers.evictions
    assert min(mine.evictions) >= 5
    for layer in mine.layers:
        assert mine.positions(layer).equal(hers.positions(layer))


@pytest.mark.parametrize("layers", [(24, None, 24), (None, 24, 20)])
def test_a_layer_left_alone_grows(layers: tuple[int | None, ...]) -> None:
    """Beyond the slots it began with, and behind a fork, which has none to spare."""
    policy = Policy(KeyNorm() >> TopK(PerLayer(layers)), interval=8, recent=8)
    model, (tokens, mask) = tiny("llama", torch.float64), padded([40, 33])
    oracle, cache, counts = Oracle(model, policy), made(model, policy, 2), [40, 33]
    for step in range(60):
        expected = oracle.forward(tokens, mask)
        assert (feed(model, cache, tokens, counts) - expected).abs().max() <= 1e-9
        tokens, counts = expected.argmax(-1, keepdim=True), [1, 1]
        mask = torch.cat([mask, torch.ones_like(tokens)], 1)
        if step in (5, 50):
            cache = cache.fork()
    assert min(cache.receipt().evictions) >= 5
