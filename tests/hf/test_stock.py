"""Where nothing is evicted, or another cache is used, a bound model is the unbound one."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, StaticCache

from kvpolicy.adapters.hf import EvictionCache
from kvpolicy.policies import h2o, vase, vase_dkv
from tests.hf.zoo import zoo
from tests.models import FAMILIES, real, tiny, tokenizer

PROMPT = [{"role": "user", "content": "Explain in detail why the sky is blue."}]


@pytest.mark.model
@pytest.mark.slow
def test_a_budget_beyond_the_length_gives_the_stock_tokens_on_the_real_model() -> None:
    model = real()
    inputs = tokenizer().apply_chat_template(PROMPT, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    options = {"max_new_tokens": 200, "min_new_tokens": 200, "do_sample": False}
    expected = model.generate(**inputs, **options)
    for policy in (vase(512), vase_dkv(512), h2o(512)):
        with EvictionCache(model, policy) as cache:
            tokens = model.generate(**inputs, **options, past_key_values=cache)
            assert cache.receipt().evictions == (0,)
        assert torch.equal(tokens, expected), repr(policy)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_budget_beyond_the_length_gives_the_stock_tokens(family: str) -> None:
    model = tiny(family)
    tokens = torch.randint(2, 97, (2, 21), generator=torch.Generator().manual_seed(5))
    options = {"max_new_tokens": 60, "do_sample": False}
    expected = model.generate(tokens, **options)
    policies = zoo(128)
    for name in policies if family == "llama" else ("vase", "h2o"):
        policy = policies[name]
        with EvictionCache(model, policy) as cache:
            assert torch.equal(model.generate(tokens, **options, past_key_values=cache), expected), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("padding", [0, 5])
def test_an_ordinary_cache_on_a_bound_model(family: str, padding: int) -> None:
    model = tiny(family)
    tokens = torch.randint(2, 97, (2, 24), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(tokens)
    mask[1, :padding] = 0
    options = {"attention_mask": mask, "max_new_tokens": 30, "do_sample": False}
    expected = model.generate(tokens, **options)
    logits = model(tokens, attention_mask=mask).logits
    with EvictionCache(model, zoo(24)["vase"]):
        cache = DynamicCache(config=model.config)
        assert torch.equal(model.generate(tokens, **options, past_key_values=cache), expected)
        assert torch.equal(model.generate(tokens, **options), expected)
        assert torch.equal(model.generate(tokens, **options, use_cache=False), expected)
        assert torch.equal(model(tokens, attention_mask=mask).logits, logits)
        if family == "llama":
            static = StaticCache(config=model.config, max_cache_len=64)
            assert torch.equal(model.generate(tokens, **options, past_key_values=static), expected)


def test_leaving_restores_the_model() -> None:
    model = tiny("llama")
    before = (model.config._attn_implementation, dict(model.model._forward_hooks), set(vars(model)))
    tokens = torch.randint(2, 97, (1, 40))
    with EvictionCache(model, zoo(24)["vase"]) as cache:
        assert model.config._attn_implementation == "kvpolicy"
        model.generate(tokens, max_new_tokens=9, do_sample=False, past_key_values=cache)
    after = (model.config._attn_implementation, dict(model.model._forward_hooks), set(vars(model)))
    assert after == before
    assert cache.receipt().seen == (48,)  # the proof outlives the binding


def test_the_last_of_two_caches_restores_the_model() -> None:
    model = tiny("llama")
    first, second = EvictionCache(model, zoo(24)["vase"]), EvictionCache(model, zoo(24)["knorm"])
    first.unbind()
    first.unbind()  # twice does no harm
    assert model.config._attn_implementation == "kvpolicy"
    second.unbind()
    assert model.config._attn_implementation == "sdpa"


def test_a_forgotten_cache_restores_the_model() -> None:
    model = tiny("llama")
    EvictionCache(model, zoo(24)["vase"])
    import gc

    gc.collect()
    assert model.config._attn_implementation == "sdpa"


def test_an_error_inside_the_block_restores_the_model() -> None:
    model = tiny("llama")
    with pytest.raises(RuntimeError, match="on purpose"), EvictionCache(model, zoo(24)["vase"]):
        raise RuntimeError("on purpose")
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_eager_attention_is_stood_in_for_too(family: str) -> None:
    model, tokens = tiny(family, torch.float64), torch.randint(2, 97, (2, 40))
    outputs = []
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        with EvictionCache(model, zoo(24)["vase"]) as cache:
            model(tokens, past_key_values=cache)
            steps = [model(tokens[:, i : i + 1], past_key_values=cache).logits for i in range(30)]
        outputs.append(torch.stack(steps))
        assert model.config._attn_implementation == implementation
    assert (outputs[0] - outputs[1]).abs().max() <= 1e-6  # eager attention rounds to float32
