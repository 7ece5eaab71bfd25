"""What an evicting engine cannot do is refused by name when it starts, before it serves anything."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from kvpolicy.adapters.vllm.refusals import insist_on_engine, insist_on_layer, insist_on_some
from kvpolicy.errors import UnsupportedError
from tests.vllm.engine import stand_in
from tests.vllm.runner import run

pytestmark = pytest.mark.vllm


@pytest.mark.parametrize("dtype", ["auto", "float32", "float16", "bfloat16"])
def test_engine_that_can(dtype: str) -> None:
    insist_on_engine(stand_in(cache__cache_dtype=dtype))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__use_mla": True}, "attention of latents"),
        ({"cache__cache_dtype": "fp8"}, "a fp8 KV cache: leave --kv-cache-dtype out"),
        ({"cache__cache_dtype": "fp8_e5m2"}, "a fp8_e5m2 KV cache"),
        ({"speculative_config": object()}, "speculative decoding"),
        ({"kv_transfer_config": object()}, "a KV connector"),
        ({"parallel__decode_context_parallel_size": 2}, "decode context parallelism"),
        ({"parallel__prefill_context_parallel_size": 2}, "prefill context parallelism"),
        ({"parallel__pipeline_parallel_size": 2}, "pipeline parallelism"),
        ({"parallel__use_ubatching": True}, "dual batch overlap"),
        ({"parallel__tensor_parallel_size": 4}, "4 processes for 2 KV heads: .* --tensor-parallel-size 2, or less"),
        ({"parallel__data_parallel_size": 2, "model__is_moe": True}, "data parallelism of a mixture of experts"),
        ({"model__runner_type": "pooling"}, "a pooling model"),
        ({"model__is_encoder_decoder": True}, "an encoder-decoder"),
        ({"model__enable_prompt_embeds": True}, "prompt embeddings"),
        ({"cache__kv_sharing_fast_prefill": True}, "fast prefill of layers that share keys"),
        ({"cache__kv_offloading_size": 1.0}, "offloaded to the host"),
        ({"attention__hisparse_config": object()}, "HiSparse"),
        ({"model__is_mm_prefix_lm": True}, "a multimodal prefix"),
    ],
)
def test_engine_that_cannot(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        insist_on_engine(stand_in(**changes))


def layer(**changes: Any) -> tuple[Any, Any]:
    """Return an attention module and the spec of its cache."""
    module = SimpleNamespace(
        impl=SimpleNamespace(alibi_slopes=None), kv_sharing_target_layer_name=None, sliding_window=None
    )
    spec = SimpleNamespace(
        sliding_window=None, attention_chunk_size=None, non_causal=False, kv_quant_mode=_Mode(0, "NONE")
    )
    for name, value in changes.items():
        part, _, field = name.partition("__")
        setattr({"impl": module.impl, "module": module, "spec": spec}[part], field, value)
    return module, spec


class _Mode(int):
    """Stand for vLLM's IntEnum."""

    name: str

    def __new__(cls, value: int, name: str) -> _Mode:
        found = super().__new__(cls, value)
        found.name = name
        return found


def test_layer_that_can() -> None:
    insist_on_layer("layers.3", *layer())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"impl__alibi_slopes": torch.ones(4)}, "ALiBi"),
        ({"module__kv_sharing_target_layer_name": "layers.1"}, "keys that another layer made"),
        ({"spec__sliding_window": 32}, "a sliding window"),
        ({"module__sliding_window": 32}, "a sliding window"),
        ({"spec__attention_chunk_size": 64}, "chunks of local attention"),
        ({"spec__non_causal": True}, "not causal"),
        ({"spec__kv_quant_mode": _Mode(1, "FP8_PER_TENSOR")}, "a quantised cache .FP8_PER_TENSOR"),
    ],
)
def test_layer_that_cannot(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedError, match=f"cannot evict from layers.3, which has .*{message}"):
        insist_on_layer("layers.3", *layer(**changes))


def test_model_without_a_layer_that_evicts() -> None:
    insist_on_some(True)
    with pytest.raises(UnsupportedError, match="no layer of this model has full attention"):
        insist_on_some(False)


VASE = "vase(64, interval=32, recent=8)"
END = ", interval=32, recent=8)"

#: model, what is asked for, arguments of the engine, message
STARTS: dict[str, tuple[str, Any, dict[str, Any], str]] = {
    "latents": ("deepseek", VASE, {}, "an attention of latents (MLA)"),
    "alibi": ("bloom", VASE, {}, "which has ALiBi"),
    "sliding": ("mistral", VASE, {}, "no layer of this model has full attention"),
    "fp8": ("llama", VASE, {"kv_cache_dtype": "fp8"}, "a fp8 KV cache"),
    "ngram": (
        "llama",
        VASE,
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}},
        "speculative decoding",
    ),
    "pooling": ("llama", VASE, {"runner": "pooling"}, "a pooling model"),
    "layers": ("llama", f"Policy(KeyNorm() >> TopK(PerLayer((64, 48))){END}", {}, "gives layers budgets of their own"),
    "pyramid": ("llama", f"Policy(KeyNorm() >> TopK(Pyramid(64)){END}", {}, "gives layers budgets of their own"),
    "heads": ("llama", f"Policy(KeyNorm() >> TopK(PerHead((64, 48))){END}", {}, "gives heads budgets of their own"),
    "adaptive": ("llama", f"Policy(KeyNorm() >> TopK(Adaptive(64)){END}", {}, "gives heads budgets of their own"),
    "no interval": ("llama", "Policy(KeyNorm() >> TopK(64), interval=None, recent=8)", {}, "write an interval"),
    "unknown key": ("llama", {"policy": VASE, "intervall": 3}, {}, "'intervall' (did you mean 'interval'?)"),
    "no policy": ("llama", {}, {}, "kvpolicy in additional_config is {}"),
    "not a text": ("llama", "vase((", {}, "cannot read 'vase(('"),
}
SMALL = {
    "vocab_size": 128,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
}
_MLA = {
    "num_key_value_heads": 4,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "first_k_dense_replace": 2,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
}


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    path: Path = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    bloom = {"vocab_size": 128, "hidden_size": 128, "n_layer": 2, "n_head": 4, "bos_token_id": None}
    made = {
        "llama": LlamaForCausalLM(LlamaConfig(**SMALL)),
        "mistral": MistralForCausalLM(MistralConfig(**SMALL, head_dim=32, sliding_window=32)),
        "bloom": BloomForCausalLM(BloomConfig(**bloom, eos_token_id=None)),
        "deepseek": DeepseekV2ForCausalLM(DeepseekV2Config(**{**SMALL, **_MLA})),
    }
    for name, model in made.items():
        model.save_pretrained(path / name)

    def one(model: str, asked: Any, options: dict[str, Any]) -> dict[str, Any]:
        sizes = {"max_model_len": 256, "max_num_seqs": 4, "additional_config": {"kvpolicy": asked}}
        return {"engine": {"model": str(path / model), **sizes, **options}, "may_fail": True}

    names = ["served", *STARTS]
    asked = [one("llama", VASE, {}), *(one(*case[:3]) for case in STARTS.values())]
    return dict(zip(names, run(asked, timeout=240), strict=True))


def test_the_same_engine_starts_without_what_is_refused(started: dict[str, dict[str, Any]]) -> None:
    assert "facts" in started["served"], started["served"]


@pytest.mark.parametrize("name", STARTS)
def test_does_not_start(name: str, started: dict[str, dict[str, Any]]) -> None:
    assert started[name].get("started") is False, started[name]
    assert STARTS[name][3] in "\n".join(started[name]["errors"])
