"""Kept sets and logits equal those of a full cache in which the evicted tokens are hidden."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kvpolicy import Policy
from kvpolicy.adapters.hf import EvictionCache
from tests.hf.zoo import zoo
from tests.models import FAMILIES, real, tiny, tokenizer
from tests.oracle import Oracle

ZOO = zoo(24)
EVERY_POLICY = ("llama", "gemma3", "gpt_oss", "deepseek_v3")
SOME_POLICIES = ("vase", "h2o", "mixture")


def padded(lengths: list[int], vocabulary: int) -> tuple[Tensor, Tensor]:
    """Return random left-padded prompts and their mask."""
    generator = torch.Generator().manual_seed(len(lengths))
    tokens = torch.randint(2, vocabulary, (len(lengths), max(lengths)), generator=generator)
    columns = torch.arange(max(lengths))
    mask = (columns >= max(lengths) - torch.tensor(lengths)[:, None]).long()
    return tokens, mask


def run(model: Any, policy: Policy, tokens: Tensor, mask: Tensor, steps: int) -> tuple[float, float, int]:
    """Decode greedily by the oracle, forcing its tokens on the cache.

    Returns the largest difference of logits, their scale, and the fewest evictions of a row.
    """
    oracle, worst, scale = Oracle(model, policy), 0.0, 0.0
    with EvictionCache(model, policy) as cache:
        for _ in range(steps):
            expected = oracle.forward(tokens, mask)
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
            out = model(tokens, attention_mask=mask, position_ids=positions, past_key_values=cache)
            logits = out.logits[:, -1]
            assert torch.isfinite(logits).all()
            worst = max(worst, (logits - expected).abs().max().item())
            scale = max(scale, expected.abs().max().item())
            tokens = expected.argmax(-1, keepdim=True)
            mask = torch.cat([mask, torch.ones_like(tokens)], 1)
            receipt = cache.receipt()
            for layer in receipt.layers:
                assert torch.equal(receipt.positions(layer), oracle.kept(layer)), f"layer {layer}"
        receipt = cache.receipt()
        for group in cache.groups:
            assert group.store is not None
            group.store.check_integrity()
        return worst, scale, min(receipt.evictions)


def cases() -> list[tuple[str, str]]:
    """Return every policy on families that differ in what a policy sees, and three on each other one."""
    return [(family, name) for family in FAMILIES for name in (ZOO if family in EVERY_POLICY else SOME_POLICIES)]


@pytest.mark.parametrize(("family", "name"), cases())
def test_a_ragged_batch_on_every_family(family: str, name: str) -> None:
    tokens, mask = padded([40, 33, 9], 97)
    model = tiny(family, FAMILIES[family].dtype)
    worst, scale, evictions = run(model, ZOO[name], tokens, mask, 90)
    assert evictions >= 8
    assert worst <= FAMILIES[family].tolerance * max(1.0, scale)


@pytest.mark.parametrize("name", ZOO)
def test_float32(name: str) -> None:
    tokens, mask = padded([40, 33, 9], 97)
    worst, scale, evictions = run(tiny("llama"), ZOO[name], tokens, mask, 90)
    assert evictions >= 8
    assert worst <= 1e-5 * max(1.0, scale)


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_the_real_model(name: str) -> None:
    policy = zoo(48, interval=8, recent=16, window=16)[name]
    text = "The history of the lighthouse begins in Alexandria, where a tower of stone, " * 5
    tokens = tokenizer()(text, return_tensors="pt").input_ids[:, :72]
    worst, scale, evictions = run(real(), policy, tokens, torch.ones_like(tokens), 66)
    assert evictions >= 8
    assert worst <= 2e-5 * scale
