"""Engines of vLLM in this process, models for them, and what transformers answers with the same policy."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from vllm import LLM, SamplingParams, TokensPrompt

from kvpolicy import Policy
from kvpolicy.adapters.hf import EvictionCache
from kvpolicy.adapters.vllm.manager import EvictionManager

CHUNK = 256
BLOCK = 32


def tiny_llama(folder: Path, **sizes: Any) -> LlamaForCausalLM:
    """Return a random model, and save it where vLLM finds it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **{
            "vocab_size": 512,
            "hidden_size": 128,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,  # of 32: the kernels for the CPU have no smaller ones
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "bos_token_id": None,
            "eos_token_id": None,
            "initializer_range": 0.1,
            **sizes,
        }
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    return model


def engine(model: Path | str, kvpolicy: Any = None, **options: Any) -> LLM:
    """Return an engine in this process, which evicts where ``kvpolicy`` says how."""
    gc.collect()  # an engine that has gone takes the groups of processes with it: now, and not from the next one
    given: dict[str, Any] = {
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 2048,
        "block_size": BLOCK,
        "max_num_batched_tokens": CHUNK,
        "max_num_seqs": 4,
        "additional_config": {} if kvpolicy is None else {"kvpolicy": kvpolicy},
    }
    return LLM(str(model), **(given | options))


def params(count: int, asked: Any = None, **more: Any) -> SamplingParams:
    """Return how to answer greedily with so many tokens, and what to ask kvpolicy for."""
    extra = None if asked is None else {"kvpolicy": asked}
    given: dict[str, Any] = {"temperature": 0, "ignore_eos": True, "detokenize": False, "extra_args": extra}
    return SamplingParams(max_tokens=count, **(given | more))


def prompt_of(tokens: Sequence[int]) -> TokensPrompt:
    return TokensPrompt(prompt_token_ids=list(tokens))


def answers(llm: LLM, prompts: Sequence[Sequence[int]], asked: Any) -> list[list[int]]:
    """Return the answers to prompts that are sent at once."""
    found = llm.generate([prompt_of(one) for one in prompts], asked, use_tqdm=False)
    return [list(one.outputs[0].token_ids) for one in found]


def reference(model: Any, tokens: Sequence[int], policy: str, count: int) -> list[int]:
    """Return what transformers answers, greedily."""
    cache, given = EvictionCache(model, Policy.parse(policy)), torch.tensor([list(tokens)])
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": count, "eos_token_id": None}
    with torch.no_grad():  # a mask: without, a token with the number of pads would be taken for one
        out = model.generate(given, attention_mask=torch.ones_like(given), past_key_values=cache, **options)
    return out[0, len(tokens) :].tolist()


def agreeing(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many tokens are the same, from the first one on."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


def managers(llm: LLM) -> list[EvictionManager]:
    """Return the managers of the groups that evict, of an engine in this process."""
    coordinator = scheduler(llm).kv_cache_manager.coordinator
    return [one for one in coordinator.single_type_managers if isinstance(one, EvictionManager)]


def scheduler(llm: LLM) -> Any:
    return llm.llm_engine.engine_core.engine_core.scheduler


def preempted(llm: LLM) -> list[str]:
    """Return a list that tells, from now on, which requests were preempted."""
    found: list[str] = []
    core = scheduler(llm)
    stock = core._preempt_request

    def preempt(request: Any, *rest: Any, **more: Any) -> Any:
        found.append(request.request_id)
        return stock(request, *rest, **more)

    core._preempt_request = preempt
    return found


def stand_in(**changes: Any) -> Any:
    """Return as much of a VllmConfig as is looked at; ``cache__cache_dtype`` is ``cache_config.cache_dtype``."""
    found = SimpleNamespace(
        cache_config=SimpleNamespace(cache_dtype="auto", kv_sharing_fast_prefill=False, kv_offloading_size=None),
        parallel_config=SimpleNamespace(
            decode_context_parallel_size=1,
            prefill_context_parallel_size=1,
            pipeline_parallel_size=1,
            tensor_parallel_size=2,
            data_parallel_size=1,
            use_ubatching=False,
        ),
        model_config=SimpleNamespace(
            use_mla=False,
            runner_type="generate",
            is_encoder_decoder=False,
            enable_prompt_embeds=False,
            is_mm_prefix_lm=False,
            is_moe=False,
            get_total_num_kv_heads=lambda: 2,
        ),
        attention_config=SimpleNamespace(hisparse_config=None),
        speculative_config=None,
        kv_transfer_config=None,
    )
    for name, value in changes.items():
        part, _, field = name.partition("__")
        setattr(getattr(found, f"{part}_config") if field else found, field or part, value)
    return found
