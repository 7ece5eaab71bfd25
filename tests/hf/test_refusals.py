"""Models, caches and ways to generate that cannot be right with an eviction cache are refused by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from kvpolicy import UnsupportedError, policies
from kvpolicy.adapters.hf import EvictionCache
from tests.families import DEEPSEEK, SMALL
from tests.hf.zoo import zoo
from tests.models import tiny

VASE = zoo(24)["vase"]
_INDEX = {**SMALL, **DEEPSEEK, "index_topk": 8, "index_n_heads": 2, "index_head_dim": 8}
_OLD = {"vocab_size": 97, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
_SHARED = {
    **SMALL,
    "num_hidden_layers": 6,
    "num_kv_shared_layers": 3,
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
    "vocab_size_per_layer_input": 97,
    "hidden_size_per_layer_input": 8,
}
_WHISPER = {
    "vocab_size": 97,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "decoder_start_token_id": 1,
}


@dataclass(frozen=True)
class Refused:
    """Name a model that cannot be bound, its configuration, and what the refusal says."""

    model: str
    options: dict[str, Any]
    says: str
    why: str
    config: str = ""

    def make(self) -> Any:
        """Return the model."""
        found = getattr(transformers, self.model)
        return found((getattr(transformers, self.config) if self.config else found.config_class)(**self.options))


_INTERFACE = "does not take its attention from transformers' AttentionInterface"
REFUSED = [
    Refused("DeepseekV32ForCausalLM", _INDEX, "by an index of its own", "sparse attention with an indexer"),
    Refused("GlmMoeDsaForCausalLM", _INDEX, "by an index of its own", "sparse attention with an indexer"),
    Refused("Gemma4ForCausalLM", _SHARED, "KV sharing", "layers that share keys", config="Gemma4TextConfig"),
    Refused(
        "Gemma3nForCausalLM",
        {**_SHARED, "laurel_rank": 4, "activation_sparsity_pattern": [0.0] * 6},
        "KV sharing",
        "layers that share keys",
        config="Gemma3nTextConfig",
    ),
    Refused(
        "T5ForConditionalGeneration",
        {"d_model": 16, "d_ff": 16, "num_layers": 1, "num_heads": 2},
        "encoder-decoder",
        "encoder-decoder",
    ),
    Refused("WhisperForConditionalGeneration", _WHISPER, "encoder-decoder", "encoder-decoder"),
    Refused("MllamaForCausalLM", {**SMALL, "cross_attention_layers": [1]}, "cross-attention", "cross-attention",
            config="MllamaTextConfig"),
    Refused("MptForCausalLM", {"d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": 97}, _INTERFACE, "ALiBi"),
    Refused("BloomForCausalLM", _OLD, _INTERFACE, "ALiBi"),
    Refused("FalconForCausalLM", {**_OLD, "alibi": True}, _INTERFACE, "an attention of its own, with or without ALiBi"),
    Refused(
        "GPTJForCausalLM",
        {"n_embd": 32, "n_head": 4, "n_layer": 2, "vocab_size": 97, "rotary_dim": 4, "bos_token_id": 1,
         "eos_token_id": 2},
        _INTERFACE,
        "an attention of its own",
    ),
    Refused(
        "FalconH1ForCausalLM",
        {**SMALL, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4},
        "attends and is recurrent at once",
        "attention and a recurrence in one layer",
    ),
    Refused("DogeForCausalLM", SMALL, "masks by a rule of its own", "a mask of its own"),
    Refused(
        "MambaForCausalLM",
        {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 97, "state_size": 4},
        "does not attend at all",
        "no attention",
    ),
]  # fmt: skip


@pytest.mark.parametrize("refused", REFUSED, ids=lambda refused: refused.model)
def test_models_that_cannot_be_bound(refused: Refused) -> None:
    model = refused.make()
    before = model.config._attn_implementation
    with pytest.raises(UnsupportedError, match=refused.says) as error:
        EvictionCache(model, VASE)
    assert refused.model.removesuffix("ForCausalLM").removesuffix("ForConditionalGeneration") in str(error.value)
    assert model.config._attn_implementation == before


def test_a_model_that_mixes_values_between_its_cache_and_its_attention() -> None:
    torch.manual_seed(0)
    model = transformers.DiffLlamaForCausalLM(transformers.DiffLlamaConfig(**SMALL)).eval()
    with EvictionCache(model, VASE) as cache, pytest.raises(UnsupportedError, match="other keys and values than"):
        model(torch.arange(2, 42)[None], past_key_values=cache)


def test_a_layer_that_attends_twice() -> None:
    model = tiny("llama")
    attention = model.model.layers[1].self_attn
    inner = attention.forward

    def twice(*args: Any, **kwargs: Any) -> Any:
        cache = kwargs["past_key_values"]
        take, given = cache.take, []

        def taken(*new: Any) -> Any:
            given.append(take(*new))
            return given[-1]

        cache.take = taken
        out = inner(*args, **kwargs)
        cache.attend(attention, lambda *a, **k: (a[1], None), "sdpa", torch.zeros(1, 4, 40, 8), *given[-1], None)
        return out

    attention.forward = twice
    with EvictionCache(model, VASE) as cache, pytest.raises(UnsupportedError, match="layer 1 attends twice"):
        model(torch.arange(2, 42)[None], past_key_values=cache)


def test_positions_that_bias_logits() -> None:
    class Biased(nn.Module):
        layer_idx = 0

    some = torch.zeros(1, 4, 1, 8)
    with EvictionCache(tiny("llama"), VASE) as cache:
        cache._step = object()  # type: ignore[assignment]
        with pytest.raises(UnsupportedError, match="position_bias"):
            cache.attend(Biased(), lambda *a, **k: None, "sdpa", some, some, some, None, position_bias=some)


def test_continuous_batching_refuses_a_bound_model() -> None:
    """It keeps keys in pages of its own: a cache that is bound would evict nothing, and nobody would know."""
    model = tiny("llama")
    prompts, config = [[5, 6, 7, 8], [9, 10, 11]], transformers.GenerationConfig(max_new_tokens=4, do_sample=False)
    with EvictionCache(model, VASE):
        with pytest.raises(ValueError, match="kvpolicy is not supported for continuous batching"):
            model.generate_batch(prompts, generation_config=config)
        with pytest.raises(UnsupportedError, match="generate_batch"):  # where it switches to flash attention first
            model(torch.tensor([prompts[0]]), cache=object())
    assert model.config._attn_implementation == "sdpa"


def test_another_kind_of_cache_beside_ours() -> None:
    model, ids = tiny("llama"), torch.arange(2, 42)[None]
    with EvictionCache(model, VASE) as cache:
        for kind in ("quantized", "static", "dynamic", "offloaded"):
            with pytest.raises(ValueError, match="cache_implementation"):
                model.generate(ids, past_key_values=cache, cache_implementation=kind, max_new_tokens=4)
        assert cache.num_requests == 0


def test_a_model_whose_source_cannot_be_read_is_refused_where_it_is_needed() -> None:
    model, names = tiny("llama"), {"torch": torch}
    exec("def forward(self, *args, **kwargs):\n    raise NotImplementedError", names)
    attention = model.model.layers[1].self_attn
    attention.__class__ = type("Typed", (type(attention),), {"forward": names["forward"]})
    with pytest.raises(UnsupportedError, match=r"in a way of its own"):
        EvictionCache(model, policies.expected_attention(24, interval=8, recent=8))
