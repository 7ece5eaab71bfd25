"""Budgets that differ over the heads of a layer: exact, and freed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kvpolicy import (
    AccumulatedAttention,
    Adaptive,
    Allocator,
    Attention,
    BudgetError,
    KeyNorm,
    PerHead,
    Policy,
    Recency,
    Sinks,
    Stochastic,
    TopK,
    UnsupportedError,
    ValueGuard,
)
from kvpolicy.adapters.hf import EvictionCache, replay
from kvpolicy.ragged import RaggedStore
from tests.families import FAMILIES, ROUNDING
from tests.hf.test_oracle import padded, run
from tests.hf.test_replay import one_by_one
from tests.hf.test_rows import rows_alone
from tests.models import real, tiny, tokenizer
from tests.oracle import Oracle


def vase(allocator: Allocator, interval: int = 8) -> Policy:
    chain = Attention(16, over="all") >> ValueGuard(sinks=2) >> Stochastic() >> TopK(allocator)
    return Policy(chain, interval=interval, recent=8)


POLICIES = {
    "vase, adaptive": vase(Adaptive(24)),
    "vase, adaptive, refreshed": vase(Adaptive(24, floor=0.5, refresh=2)),
    "snapkv, adaptive": Policy(Attention(16, over="all") >> TopK(Adaptive(20)), interval=8, recent=8),
    "h2o, adaptive": Policy(AccumulatedAttention(16) >> TopK(Adaptive(20, floor=0.3)), interval=8, recent=8),
    "key norm, adaptive": Policy(KeyNorm() >> TopK(Adaptive(24, floor=0)), interval=8, recent=8),
    "vase, split": vase(PerHead((40, 16))),
    "streaming, split": Policy(Recency() >> Sinks(2) >> TopK(PerHead((200, 16))), interval=8, recent=8),
    "h2o, split": Policy(AccumulatedAttention(16) >> TopK(PerHead((16, 30))), interval=8, recent=8),
}


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_equal_to_the_oracle(family: str, name: str) -> None:
    model = tiny(family, torch.float64)
    tokens, mask = padded([40, 33, 9], 97)
    worst, scale, evictions = run(model, POLICIES[name], tokens, mask, 90)
    assert evictions >= 5
    assert worst <= FAMILIES[family].tolerance * max(1.0, scale)


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.parametrize("allocator", [Adaptive(56), PerHead((96, 40, 32))])
def test_the_real_model(allocator: Allocator) -> None:
    policy = Policy(Attention(16) >> ValueGuard() >> Stochastic() >> TopK(allocator), interval=8, recent=16)
    text = "The history of the lighthouse begins in Alexandria, where a tower of stone, " * 5
    tokens = tokenizer()(text, return_tensors="pt").input_ids[:, :72]
    worst, scale, evictions = run(real(), policy, tokens, torch.ones_like(tokens), 66)
    assert evictions >= 5
    assert worst <= 2e-5 * scale
