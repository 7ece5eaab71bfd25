"""What ``generate()`` should give: the stock cache, and a loop of forward passes to read at a glance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvpolicy.adapters.hf import EvictionCache
from tests.hf.zoo import zoo

PLENTY = zoo(200)["vase"]  #: a budget beyond every length here
TIGHT = zoo(24)["vase"]  #: a budget that every prompt of 30 tokens exceeds
PROMPT, NEW = 30, 24
SIX = ["llama", "qwen3", "mistral", "gemma3", "gpt_oss", "qwen3_next"]  #: families of each kind of layers

Pick = Callable[[Tensor], Tensor]


def tokens(rows: int, width: int, seed: int = 0) -> Tensor:
    """Return token ids, none of which is a special one."""
    return torch.randint(2, 97, (rows, width), generator=torch.Generator().manual_seed(seed))


def both(model: Any, *args: Any, drafts: int = 0, **options: Any) -> tuple[Any, Any]:
    """Generate with the cache that transformers makes, and with ours where nothing is evicted."""
    torch.manual_seed(0)
    expected = model.generate(*args, **options)
    torch.manual_seed(0)
    with EvictionCache(model, PLENTY, max_draft_tokens=drafts) as cache:
        found = model.generate(*args, **options, past_key_values=cache)
        assert set(cache.receipt().evictions) == {0}
    return expected, found


def ours(model: Any, *args: Any, static: bool = False, **options: Any) -> Any:
    """Generate with our cache where much is evicted."""
    torch.manual_seed(0)
    with EvictionCache(model, TIGHT, static=static) as cache:
        found = model.generate(*args, **options, past_key_values=cache)
        assert min(cache.receipt().evictions) >= 3
    return found


def greedy(logits: Tensor) -> Tensor:
    """Return the best token of each row."""
    return logits.argmax(-1)


def loop(model: Any, ids: Tensor, pick: Pick = greedy, new: int = NEW) -> tuple[Tensor, Tensor]:
    """Decode with our cache where much is evicted, one forward pass after the other.

    Returns:
        The tokens, the prompt among them, and the logits of each new one, ``[rows, new, vocabulary]``.
    """
    torch.manual_seed(0)
    logits: list[Tensor] = []
    with EvictionCache(model, TIGHT) as cache:
        fed = ids
        for _ in range(new):
            logits.append(model(fed, past_key_values=cache).logits[:, -1].float())
            fed = pick(logits[-1])[:, None]
            ids = torch.cat([ids, fed], 1)
        assert min(cache.receipt().evictions) >= 3
    return ids, torch.stack(logits, 1)


def log_probs(model: Any, ids: Tensor, prompt: int) -> Tensor:
    """Return the log-probability of each token behind the prompt, fed one at a time where much is evicted."""
    text = iter(ids[:, prompt:].T)
    _, logits = loop(model, ids[:, :prompt], lambda _: next(text), new=ids.shape[1] - prompt)
    return logits.log_softmax(-1).gather(-1, ids[:, prompt:, None])[..., 0]
