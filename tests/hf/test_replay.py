"""Feeding a known text up to each eviction at once is decoding it token by token."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from kvpolicy import Adaptive, Attention, ParameterError, PerHead, Policy, Pyramid, TopK, UsageError
from kvpolicy.adapters.hf import EvictionCache, replay, replays
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


# --- many policies side by side


def padded_text() -> tuple[Tensor, Tensor]:
    """Return three rows of 101 columns, the first 40 of which are prompts of 40, 33 and 9 tokens, and their mask."""
    prompts, mask = padded([40, 33, 9], 97)
    text = torch.randint(2, 97, (3, 61), generator=torch.Generator().manual_seed(5))
    return torch.cat([prompts, text], 1), torch.cat([mask, torch.ones_like(text)], 1)


def side_by_side() -> list[Any]:
    """Return policies whose evictions are due at different tokens, the last one for each row."""
    one = [zoo(24)["vase"], zoo(30, interval=5)["h2o"], snapkv(20, window=8), zoo(200)["vase"]]
    return [*one, [one[1], one[0], one[1]]]


def test_many_policies_side_by_side_equal_each_alone() -> None:
    model = tiny("llama", torch.float64)
    ids, mask = padded_text()
    how: dict[str, Any] = {"attention_mask": mask, "seeds": [7, 8, 9], "full": True}
    found = replays(model, side_by_side(), ids, 40, **how)
    assert [min(one.receipt.evictions) for one in found] == [6, 8, 0, 0, 8]
    for policy, one in zip(side_by_side(), found, strict=True):
        alone = replay(model, policy, ids, 40, **how)
        assert (one.log_probs - alone.log_probs).abs().max() <= 1e-10
        assert (one.kl - alone.kl).abs().max() <= 1e-10
        assert torch.equal(one.agreement, alone.agreement)
        assert one.first_eviction == alone.first_eviction
        assert one.shares == pytest.approx(alone.shares, abs=1e-12)
        assert one.receipt == alone.receipt
        for layer in alone.receipt.layers:
            assert torch.equal(one.receipt.positions(layer), alone.receipt.positions(layer))


def test_some_columns_are_those_of_all() -> None:
    model = tiny("llama", torch.float64)
    ids, mask = padded_text()
    some = [40, 47, 48, 49, 77, 100]
    all_, few = (
        replays(model, side_by_side()[:2], ids, 40, attention_mask=mask, columns=columns) for columns in (None, some)
    )
    for whole, one in zip(all_, few, strict=True):
        assert whole.columns.tolist() == list(range(40, 101))
        assert one.columns.tolist() == some
        at = torch.tensor(some) - 40
        assert whole.agreement is not None
        for name in ("log_probs", "full_log_probs", "kl"):
            assert (getattr(one, name) - getattr(whole, name)[:, at]).abs().max() <= 1e-10
        assert torch.equal(one.agreement, whole.agreement[:, at])
        assert one.shares == whole.shares


@pytest.mark.parametrize("columns", [[], [39], [101], [50, 45], [50, 50], [-1], [[50]]])
def test_wrong_columns_are_refused(columns: list[Any]) -> None:
    ids, mask = padded_text()
    with pytest.raises(UsageError, match="name columns from 40 to 100, ascending"):
        replays(tiny("llama"), side_by_side()[:1], ids, 40, attention_mask=mask, columns=columns)


def test_first_eviction_and_shares_are_counted_token_by_token() -> None:
    model, policy = tiny("llama", torch.float64), zoo(24)["vase"]
    ids, mask = padded_text()
    shares: list[list[float]] = [[], [], []]
    lengths = [min(24, prompt) for prompt in (40, 33, 9)]  # the prompt is cut at its end
    with EvictionCache(model, policy) as cache:
        for first, stop in [(0, 40), *((t, t + 1) for t in range(40, 100))]:
            positions = (mask[:, :stop].cumsum(1) - 1).clamp(min=0)[:, first:]
            model(ids[:, first:stop], attention_mask=mask[:, :stop], position_ids=positions, past_key_values=cache)
            for r, seen in enumerate(cache.seen if first else []):
                shares[r].append((lengths[r] + 1) / seen)
                lengths[r] += 1
                if (stop - 40) % 8 == 0:
                    lengths[r] = min(24, lengths[r])
            assert cache.slots == lengths
    found = replay(model, policy, ids, 40, attention_mask=mask)
    assert found.first_eviction == (40, 33, 25)  # 9 + 16 are the first above 24 where evictions are due
    assert found.shares == pytest.approx([sum(row) / 60 for row in shares], abs=1e-12)
    plenty = replay(model, zoo(200)["vase"], ids, 40, attention_mask=mask)
    assert plenty.first_eviction == plenty.receipt.seen == (100, 93, 69)
    assert plenty.shares == (1.0, 1.0, 1.0)


# --- what a cache says of itself between passes

HEADS = {
    "vase": TopK(24),
    "per head": TopK(PerHead((40, 16))),
    "adaptive": TopK(Adaptive(24)),
    "pyramid": TopK(Pyramid(24, 4)),
}


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_next"])
@pytest.mark.parametrize("budget", HEADS)
def test_slots_and_bytes_are_those_of_the_receipt(family: str, budget: str) -> None:
    model = tiny(family)
    policy = Policy(Attention(16, over="all") >> HEADS[budget], interval=8, recent=8)
    prompts, mask = padded([40, 33], 97)
    with EvictionCache(model, policy) as cache:
        assert [cache.slots, cache.evictions, cache.seen] == [[], [], []]
        for step in range(20):
            width = 1 if step else 40
            positions = (mask.cumsum(1) - 1)[:, -width:].clamp(min=0)
            model(prompts[:, -width:], attention_mask=mask, position_ids=positions, past_key_values=cache)
            mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
            receipt = cache.receipt()
            counts = torch.stack([(receipt.positions(i) >= 0).sum(-1) for i in receipt.layers]).double()
            assert cache.slots == pytest.approx(counts.mean((0, 2)).tolist(), abs=1e-9)
            assert cache.nbytes() == receipt.peak_nbytes + receipt.other_nbytes
            assert cache.evictions == list(receipt.evictions)
            assert cache.seen == list(receipt.seen)
        assert bool(cache.receipt().other_nbytes) == (family != "llama")
