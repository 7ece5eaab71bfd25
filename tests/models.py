"""Models for tests: the real one, and a tiny random one of each family."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

_SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_LAYERS = ["sliding_attention", "full_attention"] * 2

FAMILIES: dict[str, tuple[type[Any], type[Any], dict[str, Any]]] = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {}),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": None}),
    "gemma3": (
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        {
            "sliding_window": 16,
            "num_hidden_layers": 4,
            "layer_types": _LAYERS,
            "query_pre_attn_scalar": 8,
        },
    ),
    "gpt_oss": (
        GptOssForCausalLM,
        GptOssConfig,
        {
            "sliding_window": 16,
            "num_hidden_layers": 4,
            "layer_types": _LAYERS,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
    "qwen3_next": (
        Qwen3NextForCausalLM,
        Qwen3NextConfig,
        {
            "num_hidden_layers": 4,
            "layer_types": ["linear_attention", "full_attention"] * 2,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
    ),
}


def tiny(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Return a tiny model of random weights, the same at every call; ``changes`` of its configuration."""
    model_class, config_class, options = FAMILIES[family]
    torch.manual_seed(0)
    model = model_class(config_class(**{**_SMALL, **options, **changes}))
    with torch.no_grad():  # sharper than initialised: attention that prefers some tokens
        for name, parameter in model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                parameter.mul_(12)
    if dtype == torch.float64 and hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the grouped kernels know no float64
    return model.to(dtype).eval()


def default_folder() -> str:
    """Return the folder of the default model, fetched once."""
    from kvpolicy.cli.default_model import default_model

    return os.environ.get("KVPOLICY_TEST_MODEL") or str(default_model(quiet=True))


@functools.cache
def real() -> Any:
    """Return the real model, in float32."""
    return AutoModelForCausalLM.from_pretrained(default_folder(), dtype=torch.float32).eval()


@functools.cache
def tokenizer() -> Any:
    """Return the real model's tokenizer."""
    return AutoTokenizer.from_pretrained(Path(default_folder()))
