"""Answers of vLLM, with an engine in this process: :class:`VLLMEngine`."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Final

import torch

from kvpolicy.adapters.vllm.accounts import rows_of
from kvpolicy.adapters.vllm.arena import Arena
from kvpolicy.adapters.vllm.board import counted
from kvpolicy.adapters.vllm.config import KEY, Config, followed
from kvpolicy.adapters.vllm.settings import Settings
from kvpolicy.errors import RunError, one_line
from kvpolicy.evaluation.errors import EvaluationError
from kvpolicy.evaluation.generation import Generation
from kvpolicy.grammar import text_of
from kvpolicy.policy import EvictionPolicy
from kvpolicy.view import LayerSpec

__all__ = ["VLLMEngine", "config_of"]

_IN_PROCESS: Final = "VLLM_ENABLE_V1_MULTIPROCESSING"


def config_of(policies: Sequence[EvictionPolicy]) -> Config | None:
    """Return what an engine is asked for that is to serve all these policies; None where there are none.

    Slots and queries are set aside when an engine starts: as many as the policy needs that needs most.

    Raises:
        UnsupportedError: a policy that vLLM's memory cannot follow.

    >>> from kvpolicy.policies import snapkv, vase
    >>> config_of([vase(128), vase(512, interval=32)]).plan.capacity
    544
    """
    plans = {text: followed(text)[1] for text in (text_of(policy) for policy in policies)}
    if not plans:
        return None
    largest = max(plans, key=lambda text: plans[text].capacity)
    return Config(largest, window=max(plan.window for plan in plans.values()) or None)


class VLLMEngine:
    """Answer prompts with vLLM, each call under a policy of its own.

    Args:
        model: a folder, or a name on the hub.
        policies: all that will be asked for; the engine sets memory aside for the largest one. Without any it is
            stock vLLM, and answers with the full cache only.
        options: more arguments of ``vllm.LLM``, such as ``dtype`` or ``max_model_len``.

    Raises:
        EvaluationError: vLLM is not installed, or was told to run in another process.
        UnsupportedError: a policy that vLLM's memory cannot follow.

    Example::

        engine = VLLMEngine("Qwen/Qwen3-8B", [vase(512), vase(1024)], max_model_len=8192)
        answers = engine.generate(prompts, vase(512), max_new_tokens=4096, temperature=0.6, seed=1)
    """

    def __init__(self, model: str | Path, policies: Sequence[EvictionPolicy] = (), **options: Any) -> None:
        self.config = config_of(policies)
        if os.environ.setdefault(_IN_PROCESS, "0") != "0":  # the bytes of blocks are asked of its scheduler
            raise EvaluationError(
                f"{_IN_PROCESS}={os.environ[_IN_PROCESS]}: evaluation has vLLM in its own process; unset it"
            )
        try:
            from vllm import LLM
        except ModuleNotFoundError as error:
            raise EvaluationError(f"{error.name} is not installed: pip install 'kvpolicy[vllm]'") from error
        asked = {} if self.config is None else {KEY: {"policy": self.config.policy, "window": self.config.window}}
        self._llm = LLM(str(model), additional_config=asked, **options)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        policy: EvictionPolicy | None,
        *,
        max_new_tokens: int | Sequence[int],
        temperature: float = 0.0,
        top_p: float = 1.0,
        seeds: Sequence[int] | None = None,
    ) -> list[Generation]:
        """Return the answers to prompts that are sent at once, in their order.

        Counts and bytes follow from lengths, as :func:`~kvpolicy.adapters.vllm.account` says: vLLM's outputs have
        no place for a receipt. Bytes are of the blocks that a request is given, and of what a worker remembers of it.

        Args:
            prompts: token ids of each.
            policy: what to keep, one of ``policies``; None keeps everything.
            max_new_tokens: at most, of all or of each.
            temperature: 0 takes the likeliest token.
            top_p: draw from the likeliest tokens that make up this share.
            seeds: of the sampling and of the policy's noise, of each prompt; 0 where None.

        Raises:
            KVPolicyError: the engine was not started for such a policy.
            RunError: a request was preempted after an eviction, and its answer is not that of an undisturbed one.
        """
        from vllm import SamplingParams, TokensPrompt
        from vllm.exceptions import VLLMValidationError

        most = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else max_new_tokens
        params = [
            SamplingParams(
                max_tokens=cap,
                temperature=temperature,
                top_p=top_p,
                seed=seed,
                detokenize=False,
                extra_args=self._asked(policy, seed),
            )
            for cap, seed in zip(most, seeds or [0] * len(prompts), strict=True)
        ]
        if self.config is not None:
            for one in params:
                Settings.of(self.config, one)  # refuses in one line what vLLM refuses in many
        before = _recomputed()
        try:
            found = self._llm.generate(
                [TokensPrompt(prompt_token_ids=list(one)) for one in prompts], params, use_tqdm=False
            )
        except VLLMValidationError as error:
            raise EvaluationError(f"vLLM refuses a request: {one_line(error)}") from error
        if again := _recomputed() - before:
            raise RunError(
                f"{again:g} requests were preempted after an eviction, and their answers are not exact: give vLLM more "
                "memory, or fewer seats (max_num_seqs)"
            )
        return [
            self._generation(len(prompt), one.outputs[0], policy) for prompt, one in zip(prompts, found, strict=True)
        ]

    def _asked(self, policy: EvictionPolicy | None, seed: int) -> dict[str, Any] | None:
        """Return what a request asks kvpolicy for."""
        if policy is None:
            return None if self.config is None else {KEY: "off"}
        if self.config is None:
            raise EvaluationError(
                f"the engine was started without policies and is asked for {policy!r}: name it in policies"
            )
        return {KEY: {"policy": text_of(policy), "seed": seed}}

    def _generation(self, prompt: int, output: Any, policy: EvictionPolicy | None) -> Generation:
        """Return an answer with what its lengths say."""
        tokens = tuple(output.token_ids)
        seen = prompt + len(tokens) - 1
        stopped = output.finish_reason == "stop"
        answer = tokens[:-1] if stopped else tokens  # the last one ended it
        if policy is None:
            return Generation(answer, "stop" if stopped else "length", 1.0, self._nbytes(prompt, seen, None), 0)
        rows = list(rows_of(policy, prompt, len(tokens)))
        compression = fmean(row.length / row.seen for row in rows)
        nbytes = self._nbytes(prompt, seen, policy)
        return Generation(answer, "stop" if stopped else "length", compression, nbytes, rows[-1].evictions)

    def _nbytes(self, prompt: int, seen: int, policy: EvictionPolicy | None) -> int:
        """Return the most that a request held: its blocks, and what is remembered of it beside them."""
        core: Any = self._llm.llm_engine.engine_core
        engine = self._llm.llm_engine.vllm_config
        total = 0
        for group in core.engine_core.scheduler.kv_cache_config.kv_cache_groups:
            spec, layers = group.kv_cache_spec, len(group.layer_names)
            if policy is not None and hasattr(spec, "reservation"):
                plan = followed(text_of(policy))[1]
                blocks = spec.reservation(plan).prefill(prompt)
                total += self._remembered(spec, layers, policy)
            else:
                blocks = math.ceil(min(seen, getattr(spec, "sliding_window", None) or seen) / spec.block_size)
            total += blocks * layers * spec.page_size_bytes
        return total * engine.parallel_config.tensor_parallel_size

    def _remembered(self, spec: Any, layers: int, policy: EvictionPolicy) -> int:
        """Return the bytes that a worker has for one request beside the cache."""
        assert self.config is not None
        engine = self._llm.llm_engine.vllm_config
        heads = spec.num_kv_heads, engine.model_config.get_num_attention_heads(engine.parallel_config)
        sizes = spec.head_size, spec.head_size_v, self.config.plan.capacity
        place = Arena(LayerSpec(*heads, *sizes, spec.dtype, torch.device("meta")), range(layers), 1, self.config.ring)
        place.set_aside(policy)
        return place.nbytes()


def _recomputed() -> float:
    return sum(numbers["recomputed_requests"] for numbers in counted().values())
