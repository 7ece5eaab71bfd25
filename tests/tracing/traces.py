"""Traces to test with: of tiny random models, and one that is made up."""

from __future__ import annotations

import functools
from typing import Any

import torch

from kvpolicy.tracing import Trace, trace
from tests.cli.tools import byte_tokenizer
from tests.models import tiny

HOSTILE = "Close it: </script><b>bold</b> &amp; é ]]> <!-- "
VASE = "vase(24, interval=8, recent=4)"


@functools.cache
def model(family: str = "llama", **changes: Any) -> Any:
    """Return a tiny random model that reads bytes."""
    return tiny(family, vocab_size=258, **changes)


def recorded(policy: Any = VASE, prompt: str = HOSTILE, new: int = 40, family: str = "llama") -> Trace:
    """Return the trace of a tiny model's generation."""
    return trace(model(family), byte_tokenizer(None), policy, prompt, max_new_tokens=new)


@functools.cache
def usual() -> Trace:
    """Return one that many tests read."""
    return recorded()


def made_up(tokens: int, layers: int, heads: int, budget: int = 256, interval: int = 64) -> Trace:
    """Return a trace of a policy that keeps some large values, some recent tokens, and chance's choice of the rest."""
    lines, prompt, noise = layers * heads, 100, torch.Generator().manual_seed(0)
    values = torch.rand(lines, tokens, generator=noise).exp() * (1 + torch.arange(lines)[:, None])
    dropped, first, last, tier = (torch.zeros(lines, tokens, dtype=torch.int32) for _ in range(4))
    evictions: list[int] = []
    for seen in range(prompt + interval, tokens, interval):
        held = (dropped == 0) & (torch.arange(tokens) < seen)
        if held[0].sum() <= budget:
            continue
        evictions.append(seen)
        large = torch.where(held, values, -1).topk(budget // 4, 1).indices
        score = torch.where(held, torch.rand(lines, tokens, generator=noise), -1).scatter_(1, large, 2)
        score[:, seen - 64 : seen] = 3
        kept = torch.zeros_like(held).scatter_(1, score.topk(budget, 1).indices, True)
        safe = torch.zeros_like(held).scatter_(1, large, True)
        dropped[held & ~kept] = len(evictions)
        first[safe & (first == 0)] = len(evictions)
        last[safe] = len(evictions)
        tier[safe] = 2
    steps = tuple(range(prompt, tokens + 1))
    return Trace(
        run={"model": "made up", "policy": "TopK(256)", "prompt": "?", "versions": {"kvpolicy": "0"}},
        ids=tuple(range(tokens + 1)),
        pieces=(" token",) * (tokens + 1),
        prompt_length=prompt,
        heads=tuple((layer, head) for layer in range(layers) for head in range(heads)),
        evictions=tuple(evictions),
        steps=steps,
        nbytes=(4_000_000,) * len(steps),
        used_nbytes=tuple(min(step, budget) * lines * 512 for step in steps),
        full_nbytes=tuple(step * lines * 512 for step in steps),
        norm="range",
        dropped=dropped,
        values=values,
        protected_first=first,
        protected_last=last,
        tier=tier,
    )
