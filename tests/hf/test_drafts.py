"""Assisted and prompt-lookup decoding: drafts are taken back, and only what stays is evicted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kvpolicy import UnsupportedError, UsageError
from kvpolicy.adapters.hf import EvictionCache
from kvpolicy.adapters.hf.compat import ANNOUNCES_DRAFTS
from tests.hf.zoo import zoo
from tests.models import real, tiny, tokenizer
from tests.oracle import Oracle

DRAFTS = 5
NAMES = ("vase", "h2o", "snapkv", "tova", "vase_dkv", "streaming_llm", "mixture")

pytestmark = pytest.mark.skipif(not ANNOUNCES_DRAFTS, reason="transformers before 5.14 does not announce drafts")


def tokens(rows: int, width: int, seed: int = 0) -> Tensor:
    return torch.randint(2, 97, (rows, width), generator=torch.Generator().manual_seed(seed))


def compare(model: Any, name: str, rows: int, prompt: int, passes: int, *, budget: int = 24) -> float:
    """Draft at random, take some back, and return the largest difference of logits from the oracle."""
    policy, random, worst = zoo(budget)[name], torch.Generator().manual_seed(prompt), 0.0
    oracle = Oracle(model, policy, drafts=DRAFTS)
    with EvictionCache(model, policy, max_draft_tokens=DRAFTS) as cache:
        width, seed = prompt, 100
        for _ in range(passes):
            ids = tokens(rows, width, seed)
            expected = oracle.forward(ids)
            if not cache.columns:
                cache.activate_past_recording()
            worst = max(worst, (model(ids, past_key_values=cache).logits[:, -1] - expected).abs().max().item())
            back = int(torch.randint(0, min(width, DRAFTS + 1), (), generator=random))
            oracle.crop(back)
            cache.crop(-back)
            receipt = cache.receipt()
            for layer in receipt.layers:
                assert torch.equal(receipt.positions(layer), oracle.kept(layer)), f"layer {layer}"
            for group in cache.groups:
                assert group.store is not None
                group.store.check_integrity()
            width, seed = 1 + int(torch.randint(0, DRAFTS + 1, (), generator=random)), seed + 1
        assert min(cache.receipt().evictions) >= 6
    return worst


@pytest.mark.parametrize("prompt", [60, 26, 12])
@pytest.mark.parametrize("name", NAMES)
def test_drafts_equal_the_oracle(name: str, prompt: int) -> None:
    assert compare(tiny("llama", torch.float64), name, 2, prompt, 40) <= 1e-9


@pytest.mark.parametrize("family", ["gemma3", "gpt_oss"])
def test_layers_left_alone_take_drafts_back_too(family: str) -> None:
    model, policy = tiny(family, torch.float64), zoo(200)["vase"]
    ids = tokens(1, 60)
    with EvictionCache(model, policy, max_draft_tokens=DRAFTS) as cache:
        cache.activate_past_recording()
        model(ids[:, :40], past_key_values=cache)
        cache.crop(0)
        for start in range(40, 56, 2):
            wrong = torch.cat([ids[:, start : start + 2], tokens(1, 3, start)], 1)
            model(wrong, past_key_values=cache)
            cache.crop(-3)
        found = model(ids[:, 56:57], past_key_values=cache).logits
    assert (found - model(ids[:, :57]).logits[:, -1:]).abs().max() <= 1e-9


def test_prompt_lookup_equals_plain_decoding_where_nothing_is_evicted() -> None:
    model, ids = tiny("llama", torch.float64), tokens(1, 30).repeat(1, 2)
    expected = model.generate(ids, max_new_tokens=40, do_sample=False)
    with EvictionCache(model, zoo(200)["vase"], max_draft_tokens=DRAFTS) as cache:
        found = model.generate(
            ids, max_new_tokens=40, do_sample=False, prompt_lookup_num_tokens=DRAFTS, past_key_values=cache
        )
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["vase", "h2o", "snapkv"])
def test_prompt_lookup_with_evictions_equals_the_oracle(name: str) -> None:
    model, policy = tiny("llama", torch.float64), zoo(24)[name]
    ids = tokens(1, 20).repeat(1, 3)
    calls: list[tuple[str, Any]] = []
    with EvictionCache(model, policy, max_draft_tokens=DRAFTS) as cache:
        crop = cache.crop

        def note(count: int) -> None:
            calls.append(("crop", count))
            crop(count)

        cache.crop = note  # type: ignore[method-assign, assignment]
        hook = model.register_forward_pre_hook(
            lambda _, args, kwargs: calls.append(("forward", kwargs["input_ids"])), with_kwargs=True
        )
        out = model.generate(
            ids, max_new_tokens=60, do_sample=False, prompt_lookup_num_tokens=DRAFTS, past_key_values=cache
        )
        hook.remove()
        assert cache.receipt().evictions[0] >= 4
        oracle = Oracle(model, policy, drafts=DRAFTS)
        for what, given in calls:
            if what == "forward":
                assert torch.isfinite(oracle.forward(given)).all()
            else:
                oracle.crop(-given)
        assert any(given < 0 for what, given in calls if what == "crop"), "no draft was taken back"
        assert torch.equal(cache.receipt().positions(0), oracle.kept(0))
        assert out.shape == (1, 120)


@pytest.mark.model
@pytest.mark.slow
def test_assisted_decoding_on_the_real_model() -> None:
    model, assistant = real(), tiny_assistant()
    policy = zoo(64, interval=16, recent=16)["vase"]
    ids = tokenizer()("The tide rose, and the tide fell. " * 12, return_tensors="pt").input_ids
    expected = model.generate(ids, max_new_tokens=24, do_sample=False)
    with EvictionCache(model, zoo(400)["vase"], max_draft_tokens=20) as cache:
        found = model.generate(
            ids, max_new_tokens=24, do_sample=False, assistant_model=assistant, past_key_values=cache
        )
        assert torch.equal(found, expected)
    with EvictionCache(model, policy, max_draft_tokens=10) as cache:
        found = model.generate(
            ids, max_new_tokens=48, do_sample=False, prompt_lookup_num_tokens=10, past_key_values=cache
        )
        receipt = cache.receipt()
        assert receipt.evictions[0] >= 2
        assert receipt.slots[0] <= receipt.capacity == 64 + 16 + 10


def tiny_assistant() -> Any:
    """Return a random model with the real one's vocabulary."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=real().config.vocab_size,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    ).eval()


# Refusals


def test_assisted_decoding_without_slots_for_drafts_is_refused() -> None:
    model, ids = tiny("llama"), tokens(1, 30)
    with (
        EvictionCache(model, zoo(24)["vase"]) as cache,
        pytest.raises(UnsupportedError, match=r"write EvictionCache\(..., max_draft_tokens=20\)"),
    ):
        model.generate(ids, max_new_tokens=9, prompt_lookup_num_tokens=4, past_key_values=cache)


def test_more_tokens_than_are_certainly_there_cannot_be_taken_back() -> None:
    model = tiny("llama")
    with EvictionCache(model, zoo(24)["vase"]) as cache:
        with pytest.raises(UsageError, match="no token has been seen"):
            cache.crop(-1)
        model(tokens(1, 60), past_key_values=cache)
        before = cache.receipt()
        with pytest.raises(UsageError, match="only the newest 8 are"):
            cache.crop(-9)
        assert cache.receipt() == before
        cache.crop(-8)
        assert cache.receipt().seen == (52,)
        assert cache.get_seq_length() == 52


def test_what_crop_does_not_take() -> None:
    model, ids = tiny("llama", torch.float64), tokens(1, 30)
    with EvictionCache(model, zoo(24)["vase"], max_draft_tokens=4) as cache:
        model(ids, past_key_values=cache)
        with pytest.raises(UsageError, match=r"crop\(1.5\): write a number of tokens"):
            cache.crop(1.5)
        with pytest.raises(
            UsageError, match=r"6 tokens were drafted, .* write EvictionCache\(..., max_draft_tokens=6\)"
        ):
            cache.crop(-6)
        assert cache.receipt().seen == (30,)


def test_without_drafts_the_prompt_is_cut_as_ever() -> None:
    model, ids = tiny("llama"), tokens(1, 40)
    texts = []
    for drafts in (0, DRAFTS):
        with EvictionCache(model, zoo(24)["vase"], max_draft_tokens=drafts) as cache:
            texts.append(model.generate(ids, max_new_tokens=40, do_sample=False, past_key_values=cache))
    assert torch.equal(*texts)
