"""What vLLM can do and an evicting engine cannot: refused when it starts, by name."""

from __future__ import annotations

from typing import Any

from kvpolicy.adapters.vllm.config import ADAPTER
from kvpolicy.errors import UnsupportedError

__all__ = ["insist_on_engine", "insist_on_layer", "insist_on_some"]


def insist_on_engine(vllm_config: Any) -> None:
    """Refuse an engine whose parts cannot work with eviction.

    A version of vLLM that has renamed one of these does not start: nothing is taken for absent.

    Raises:
        UnsupportedError: the message names what it is, and what to write instead.
    """
    cache, parallel, model = vllm_config.cache_config, vllm_config.parallel_config, vllm_config.model_config
    heads = model.get_total_num_kv_heads()
    cases = {
        "an attention of latents (MLA)": (model.use_mla, "use kvpolicy.adapters.hf, which evicts latents"),
        f"a {cache.cache_dtype} KV cache": (
            cache.cache_dtype not in ("auto", "float32", "float16", "bfloat16"),
            "leave --kv-cache-dtype out",
        ),
        "speculative decoding": (vllm_config.speculative_config is not None, "leave --speculative-config out"),
        "a KV connector": (vllm_config.kv_transfer_config is not None, "leave --kv-transfer-config out"),
        "decode context parallelism": (
            parallel.decode_context_parallel_size > 1,
            "leave --decode-context-parallel-size out; tensor parallelism works",
        ),
        "prefill context parallelism": (
            parallel.prefill_context_parallel_size > 1,
            "leave --prefill-context-parallel-size out",
        ),
        "pipeline parallelism": (
            parallel.pipeline_parallel_size > 1,
            "leave --pipeline-parallel-size out; tensor parallelism works",
        ),
        f"{parallel.tensor_parallel_size} processes for {heads} KV heads": (
            parallel.tensor_parallel_size > heads,
            f"copies of a head would keep different tokens; write --tensor-parallel-size {heads}, or less",
        ),
        "data parallelism of a mixture of experts": (
            parallel.data_parallel_size > 1 and model.is_moe,
            "leave --data-parallel-size out: a rank without requests runs batches that nothing tells from real ones",
        ),
        "dual batch overlap": (parallel.use_ubatching, "leave --enable-dbo out"),
        "a pooling model": (model.runner_type == "pooling", "nothing is decoded that could be forgotten"),
        "an encoder-decoder": (model.is_encoder_decoder, "use a decoder-only model"),
        "prompt embeddings": (model.enable_prompt_embeds, "leave --enable-prompt-embeds out"),
        "fast prefill of layers that share keys": (
            cache.kv_sharing_fast_prefill,
            "leave --kv-sharing-fast-prefill out",
        ),
        "a KV cache offloaded to the host": (
            cache.kv_offloading_size is not None,
            "leave --kv-offloading-size out",
        ),
        "HiSparse": (vllm_config.attention_config.hisparse_config is not None, "leave it out"),
        "tokens of an image that see each other (a multimodal prefix)": (
            model.is_mm_prefix_lm,
            "use the text model alone",
        ),
    }
    for what, (found, instead) in cases.items():
        if found:
            raise UnsupportedError(f"{ADAPTER} cannot evict with {what}: {instead}")


def insist_on_some(evicts: bool) -> None:
    """Refuse a model none of whose layers evicts."""
    if not evicts:
        raise UnsupportedError(
            f"{ADAPTER} was asked for, and no layer of this model has full attention under a backend that evicts: "
            "nothing would ever be forgotten; leave kvpolicy out of additional_config, or let VLLM_PLUGINS name it, too"
        )


def insist_on_layer(name: str, layer: Any, spec: Any) -> None:
    """Refuse a full-attention layer that cannot evict.

    Args:
        name: of the layer.
        layer: vLLM's attention module.
        spec: of its cache.
    """
    impl = layer.impl
    cases = {
        "ALiBi, whose biases count slots": getattr(impl, "alibi_slopes", None) is not None,
        "keys that another layer made": getattr(layer, "kv_sharing_target_layer_name", None) is not None,
        "a sliding window in a full-attention cache (leave --disable-hybrid-kv-cache-manager out)": (
            spec.sliding_window is not None or getattr(layer, "sliding_window", None) is not None
        ),
        "chunks of local attention": spec.attention_chunk_size is not None,
        "attention that is not causal": spec.non_causal,
        f"a quantised cache ({spec.kv_quant_mode.name})": int(spec.kv_quant_mode) != 0,
    }
    for what, found in cases.items():
        if found:
            raise UnsupportedError(f"{ADAPTER} cannot evict from {name}, which has {what}")
