"""A tiny configuration of each family of models: enough layers to differ, small enough to be quick."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

SMALL = {
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
_TWICE = ["sliding_attention", "full_attention"] * 2
_SLIDING = {"sliding_window": 16, "num_hidden_layers": 4, "layer_types": _TWICE}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_MLA = {
    "num_key_value_heads": 4,
    "head_dim": 4,
    "kv_lora_rank": 12,
    "q_lora_rank": 10,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
}
DEEPSEEK = {
    **_MLA,
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "moe_intermediate_size": 16,
}
LINEAR = {"num_hidden_layers": 4, "layer_types": ["linear_attention", "full_attention"] * 2}


@dataclass(frozen=True)
class Family:
    """Name a model class, what its configuration adds to the small one, and what to know.

    Attributes:
        model: name of the class in transformers.
        options: of its configuration.
        config: name of the configuration, where it is not the model's own.
        dtype: of the comparison with the oracle.
        notes: what a user should know, for the page of models.
    """

    model: str
    options: dict[str, Any] = field(default_factory=dict)
    config: str = ""
    dtype: torch.dtype = torch.float64
    notes: str = ""

    @property
    def tolerance(self) -> float:
        """Return by how much logits may differ from the oracle's, beside a scale of 1."""
        return 1e-9 if self.dtype == torch.float64 else 1e-5

    def classes(self) -> tuple[type[Any], type[Any]]:
        """Return the classes of the model and of its configuration."""
        found = getattr(transformers, self.model)
        return found, getattr(transformers, self.config) if self.config else found.config_class


FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM"),
    "qwen2": Family("Qwen2ForCausalLM"),
    "qwen3": Family("Qwen3ForCausalLM"),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", _EXPERTS),
    "mistral": Family("MistralForCausalLM", {"sliding_window": None}),
    "mixtral": Family("MixtralForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "phi": Family("PhiForCausalLM"),
    "phi3": Family("Phi3ForCausalLM", notes="fused projections"),
    "smollm3": Family("SmolLM3ForCausalLM", {"no_rope_layer_interval": 2}, notes="layers without rotation evict, too"),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        {**_SLIDING, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 20.0},
        dtype=torch.float32,  # its eager attention, masked in float64, gives nan: the softmax is float32
        notes='logits are capped, which needs attn_implementation="eager", its default; scores are capped alike',
    ),
    "gemma3": Family("Gemma3ForCausalLM", {**_SLIDING, "query_pre_attn_scalar": 8}, config="Gemma3TextConfig"),
    "gpt_oss": Family(
        "GptOssForCausalLM",
        {**_SLIDING, "num_local_experts": 4, "num_experts_per_tok": 2},
        notes="its sink logits take part in scores, too",
    ),
    "qwen3_next": Family(
        "Qwen3NextForCausalLM",
        {
            **LINEAR,
            **_EXPERTS,
            "shared_expert_intermediate_size": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
    ),
    "qwen3_5": Family(
        "Qwen3_5ForCausalLM",
        {
            **LINEAR,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
        config="Qwen3_5TextConfig",
    ),
    "llama4": Family(
        "Llama4ForCausalLM",
        {
            "num_hidden_layers": 4,
            "intermediate_size_mlp": 32,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "attention_chunk_size": 16,
        },
        config="Llama4TextConfig",
        notes="attention in chunks is left alone, and kept by transformers as a sliding window",
    ),
    "gemma4": Family(
        "Gemma4ForCausalLM",
        {
            **_SLIDING,
            "num_kv_shared_layers": 0,
            "vocab_size_per_layer_input": 97,
            "hidden_size_per_layer_input": 8,
            "global_head_dim": 12,
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
        },
        config="Gemma4TextConfig",
        notes="models whose layers share keys (E2B, E4B) are refused",
    ),
    "lfm2": Family("Lfm2ForCausalLM", {"layer_types": ["conv", "full_attention", "conv"]}),
    "nemotron_h": Family(
        "NemotronHForCausalLM",
        {
            "num_hidden_layers": 4,
            "layers_block_type": ["mamba", "attention", "mlp", "attention"],
            "ssm_state_size": 4,
            "mamba_num_heads": 4,
            "mamba_head_dim": 8,
            "n_groups": 1,
        },
    ),
    "olmo2": Family("Olmo2ForCausalLM"),
    "granite": Family("GraniteForCausalLM", {"attention_multiplier": 0.35}),
    "glm4": Family("Glm4ForCausalLM", {"partial_rotary_factor": 0.5}),
    "cohere2": Family("Cohere2ForCausalLM", _SLIDING, notes="its global layers have no rotation"),
    "deepseek_v2": Family("DeepseekV2ForCausalLM", {**DEEPSEEK, "topk_method": "greedy"}, notes="latent attention"),
    "deepseek_v3": Family("DeepseekV3ForCausalLM", DEEPSEEK, notes="latent attention"),
    "glm4_moe_lite": Family("Glm4MoeLiteForCausalLM", DEEPSEEK, notes="latent attention"),
    "minicpm3": Family("MiniCPM3ForCausalLM", _MLA, notes="latent attention"),
    "longcat_flash": Family(
        "LongcatFlashForCausalLM",
        {
            **_MLA,
            "num_layers": 2,
            "num_hidden_layers": 4,
            "ffn_hidden_size": 32,
            "expert_ffn_hidden_size": 16,
            "n_routed_experts": 4,
            "zero_expert_num": 2,
            "moe_topk": 2,
        },
        notes="latent attention",
    ),
}

#: One family of each kind of cache: full, with sliding or linear layers, sink logits, latents.
KINDS = ("llama", "gemma3", "gpt_oss", "qwen3_next", "deepseek_v3")

#: How far logits of two right ways may differ: some layers compute in float32 whatever the model's dtype.
ROUNDING = {"qwen3_next": 1e-6, "deepseek_v3": 1e-7}
