"""A tiny model with a tokenizer, loaded as an evaluation loads one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from kvpolicy.evaluation.rendering import Asked
from kvpolicy.loading import Loaded
from tests.cli.tools import TEMPLATE, byte_tokenizer
from tests.models import tiny


def loaded(template: str | None = TEMPLATE, family: str = "llama", **changes: Any) -> Loaded:
    """Return a tiny model in float64, whose tokens are bytes, and which ends at no token but the tokenizer's end."""
    tokenizer = byte_tokenizer(template)
    model = tiny(family, torch.float64, vocab_size=len(tokenizer), **changes)
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] = 0  # near the middle of random logits: never the likeliest
    return Loaded("tiny", model, tokenizer)


def asked(length: int, new: int = 24, *, seed: int = 0, pieces: Sequence[int] = (), behind: int = 0) -> Asked:
    """Return random tokens, the same for the same numbers: a prompt, further pieces, and text behind them."""
    generator = torch.Generator().manual_seed(1000 * seed + length)

    def some(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(2, 250, (count,), generator=generator).tolist())

    return Asked((some(length), *map(some, pieces)), some(behind), new)
