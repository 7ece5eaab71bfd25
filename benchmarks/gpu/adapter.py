"""The cache for transformers, beside transformers' own, on a model of random weights."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.deadline import Deadline
from benchmarks.gpu.decoder import ModelShape
from benchmarks.gpu.device import peak_bytes, reset_peak, timed
from benchmarks.report import Cell, Section

__all__ = ["run"]

EMPTY = "–"


def run(
    name: str,
    shape: ModelShape,
    context: int,
    budgets: list[int],
    interval: int,
    dtype: torch.dtype,
    deadline: Deadline,
) -> Section:
    """Decode one request with every cache, after a prompt.

    Args:
        name: of the shape.
        shape: of the model.
        context: tokens of the prompt.
        budgets: of the evicting caches.
        interval: tokens between two evictions, and steps that are timed; as many warm up.
        dtype: of weights, keys and values.
        deadline: cases beyond it are skipped.
    """
    section = Section(
        "transformers",
        f"decoding one request with transformers behind {context} tokens, a Qwen3 of random weights, shape {name}, "
        f"{str(dtype).removeprefix('torch.')}, eager; {interval} steps, with one eviction where there are any; peak "
        "while decoding, weights included",
        ["cache", "tokens/s", "ms a step", "peak GiB", "to DynamicCache"],
    )
    if importlib.util.find_spec("transformers") is None:
        section.notes.append("skipped: transformers is not installed here")
        return section
    model = deadline.attempt(partial(_model, shape, context + 2 * interval, dtype, deadline.device))
    if isinstance(model, str):
        section.notes.append(f"no model: {model}")
        return section
    base: float | None = None
    with torch.no_grad():
        for label, make in _caches(model, context + 2 * interval, budgets, interval).items():
            found = deadline.attempt(partial(_decode, model, make, context, interval))
            if isinstance(found, str):
                section.rows.append([label, found, *[EMPTY] * 3])
                continue
            ms, peak = found
            base = ms if label == "DynamicCache" else base
            ratio: Cell = EMPTY if base is None else base / ms
            section.rows.append([label, 1e3 / ms, ms, EMPTY if peak is None else peak / 2**30, ratio])
    return section


def _model(shape: ModelShape, positions: int, dtype: torch.dtype, device: torch.device) -> Any:
    from transformers import AutoModelForCausalLM, Qwen3Config

    config = Qwen3Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.query_heads,
        num_key_value_heads=shape.heads,
        head_dim=shape.head_dim,
        max_position_embeddings=max(40960, positions),
        tie_word_embeddings=True,
    )
    make: Callable[..., Any] = AutoModelForCausalLM.from_config
    with device:
        return make(config, dtype=dtype).eval()


def _caches(model: Any, slots: int, budgets: list[int], interval: int) -> dict[str, Callable[[], Any]]:
    from transformers import DynamicCache, StaticCache

    from kvpolicy.adapters.hf import EvictionCache
    from kvpolicy.policies import vase

    def evicting(budget: int) -> Any:
        return EvictionCache(model, vase(budget, interval=interval, recent=min(64, interval)))

    ours = {f"vase({budget})": partial(evicting, budget) for budget in budgets}
    return {
        "DynamicCache": lambda: DynamicCache(config=model.config),
        "StaticCache": lambda: StaticCache(model.config, max_cache_len=slots),
        **ours,
    }


def _decode(model: Any, make: Callable[[], Any], context: int, steps: int) -> tuple[float, int | None]:
    """Return the milliseconds of a step, and the peak of memory while decoding."""
    device = model.device
    cache = make()
    try:
        prompt = torch.randint(model.config.vocab_size, (1, context), device=device)
        for part in torch.split(prompt, 1024, 1):
            model(part, past_key_values=cache, use_cache=True, logits_to_keep=1)
        token = prompt[:, -1:]

        def decode() -> None:
            for _ in range(steps):
                model(token, past_key_values=cache, use_cache=True)

        decode()
        reset_peak(device)
        ms = timed(decode, device) / steps
        return ms, peak_bytes(device)
    finally:
        if hasattr(cache, "unbind"):
            cache.unbind()
