"""Feeding a known text up to each eviction at once is decoding it token by token."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from kvpolicy import ParameterError, Policy, UsageError
from kvpolicy.adapters.hf import EvictionCache, replay
from kvpolicy.policies import snapkv
from tests.families import KINDS, ROUNDING
from tests.hf.test_oracle import padded
from tests.hf.zoo import zoo
from tests.models import real, tiny, tokenizer

NAMES = ("vase", "h2o", "tova", "vase_dkv", "streaming_llm", "mixture")


def one_by_one(model: Any, policy: Policy, ids: Tensor, mask: Tensor, prompt: int) -> tuple[Tensor, Any]:
    """Return log-probabilities of the text behind the prompt, decoded token by token."""
    found = []
    with EvictionCache(model, policy) as cache:
        for first, stop in [(0, prompt), *((t, t + 1) for t in range(prompt, ids.shape[1] - 1))]:
            positions = (mask[:, :stop].cumsum(1) - 1).clamp(min=0)[:, first:]
            out = model(
                ids[:, first:stop], attention_mask=mask[:, :stop], position_ids=positions, past_key_values=cache
            )
            logits = out.logits[:, -1].log_softmax(-1)
            found.append(logits.gather(-1, ids[:, stop : stop + 1]))
        return torch.cat(found, 1), cache.receipt()


@pytest.mark.parametrize(
    ("family", "name"),
    [*(("llama", name) for name in NAMES), *((family, "vase") for family in KINDS if family != "llama")],
)
def test_replay_is_decoding(family: str, name: str) -> None:
    model, policy = tiny(family, torch.float64), zoo(24)[name]
    prompts, mask = padded([40, 33, 9], 97)
    text = torch.randint(2, 97, (3, 61), generator=torch.Generator().manual_seed(5))
    ids, mask = torch.cat([prompts, text], 1), torch.cat([mask, torch.ones_like(text)], 1)
    expected, receipt = one_by_one(model, policy, ids, mask, 40)
    found = replay(model, policy, ids, 40, attention_mask=mask)
    # Linear attention has a formula for one token and another, in float32, for several.
    assert (found.log_probs - expected).abs().max() <= 10 * ROUNDING.get(family, 1e-10)
    assert found.log_probs.shape == (3, 61)
    assert min(found.receipt.evictions) >= 6
    assert found.receipt.evictions == receipt.evictions
    for layer in receipt.layers:
        assert torch.equal(found.receipt.positions(layer), receipt.positions(layer))


@pytest.mark.parametrize("name", ["vase", "h2o"])
def test_the_full_cache_beside_it(name: str) -> None:
    model = tiny("llama", torch.float64)
    ids = torch.randint(2, 97, (2, 90), generator=torch.Generator().manual_seed(1))
    logits = model(ids).logits[:, 29:-1].log_softmax(-1)
    calls: list[tuple[int, int]] = []
    same = replay(model, zoo(200)[name], ids, 30, full=True, progress=lambda done, of: calls.append((done, of)))
    assert same.full_log_probs is not None
    assert same.kl is not None
    assert same.agreement is not None
    assert (same.full_log_probs - logits.gather(-1, ids[:, 30:, None])[..., 0]).abs().max() <= 1e-9
    assert same.kl.abs().max() <= 1e-9
    assert same.agreement.all()
    assert calls[-1] == (89, 90)
    cut = replay(model, zoo(24)[name], ids, 30, full=True)
    assert cut.kl is not None
    assert cut.agreement is not None
    assert (cut.kl >= -1e-12).all()
    assert cut.kl.mean() > 1e-4
    assert (cut.log_probs - same.log_probs).abs().max() > 1e-3
    assert 0.5 < cut.agreement.float().mean() < 1


def test_a_policy_that_evicts_the_prompt_alone() -> None:
    model = tiny("llama", torch.float64)
    ids = torch.randint(2, 97, (1, 400), generator=torch.Generator().manual_seed(1))
    found = replay(model, snapkv(40, window=8), ids, 100)
    assert found.receipt.evictions == (1,)
    assert found.receipt.slots == (40 + 299,)


def test_what_cannot_be_replayed() -> None:
    model, ids = tiny("llama"), torch.ones(1, 30, dtype=torch.long)
    with pytest.raises(UsageError, match="at least one column behind the prompt"):
        replay(model, zoo(24)["vase"], ids, 30)
    with pytest.raises(UsageError, match="at least one column behind"):
        replay(model, zoo(24)["vase"], ids[0], 10)
    with pytest.raises(ParameterError, match="prompt_length"):
        replay(model, zoo(24)["vase"], ids, 0)


@pytest.mark.model
@pytest.mark.slow
def test_the_real_model() -> None:
    # In float64: rounding may turn two scores of a real model that are nearly equal.
    model, policy = copy.deepcopy(real()).double(), zoo(64, interval=16, recent=16)["vase"]
    text = "The tide rose, and the tide fell; the sailor wrote the hour in his book. " * 12
    ids = tokenizer()(text, return_tensors="pt").input_ids[:, :170]
    expected, receipt = one_by_one(model, policy, ids, torch.ones_like(ids), 100)
    found = replay(model, policy, ids, 100, full=True)
    assert (found.log_probs - expected).abs().max() <= 1e-4  # rotations are computed in float32
    assert torch.equal(found.receipt.positions(0), receipt.positions(0))
    assert found.receipt.evictions == receipt.evictions == (5,)
    assert found.kl is not None
    assert found.kl.mean() > 0
