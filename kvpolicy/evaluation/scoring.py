"""How likely a model finds known continuations under a policy: :func:`score`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvpolicy.adapters.hf.cache import EvictionCache
from kvpolicy.adapters.hf.replay import _UNLIMITED, _log_softmax, _of
from kvpolicy.policy import EvictionPolicy

__all__ = ["Scored", "score"]


@dataclass(frozen=True)
class Scored:
    """Hold what a model says of one continuation.

    Attributes:
        log_prob: of all its tokens together, in nats.
        greedy: whether each of its tokens is the likeliest one.
        evictions: those that came before its last token was predicted; later ones could not change anything.
    """

    log_prob: float
    greedy: bool
    evictions: int


@torch.no_grad()
def score(
    model: PreTrainedModel,
    policy: EvictionPolicy,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    seed: int = 0,
) -> list[Scored]:
    """Return how likely each continuation is, read behind its context as if the model had written it.

    The context is a prompt: it is attended to in full and cut once at its end, and the first token behind
    it is predicted before that cut. What follows is evicted as decoded tokens are.

    Args:
        model: a decoder of transformers.
        policy: what to keep.
        pairs: token ids of context and continuation, at least one of each. A row of the batch equals its
            own single run.
        seed: of the policy's noise.
    """
    prompt, behind = (max(len(pair[side]) for pair in pairs) for side in (0, 1))
    tokens = torch.zeros(len(pairs), prompt + behind, dtype=torch.long)
    mask = torch.ones_like(tokens)
    for row, (context, continuation) in enumerate(pairs):
        # Behind the end of a short continuation any token may stand: those before do not see it.
        tokens[row, prompt - len(context) : prompt + len(continuation)] = torch.tensor([*context, *continuation])
        mask[row, : prompt - len(context)] = 0
    tokens, mask = tokens.to(model.device), mask.to(model.device)
    last = [prompt + len(continuation) - 2 for _, continuation in pairs]  # the column that predicts the last token
    evictions = [0] * len(pairs)
    log_probs: list[Tensor] = []
    likeliest: list[Tensor] = []
    seeds = [seed] * len(pairs)
    with EvictionCache(model, policy, max_new_tokens=behind, prompt_length=prompt, seeds=seeds) as cache:
        first, stop = 0, prompt
        while first < stop:
            so_far = cache.evictions or evictions
            evictions = [so_far[row] if first <= last[row] else evictions[row] for row in range(len(pairs))]
            targets = torch.arange(max(first + 1, prompt), stop + 1)
            found = _log_softmax(model, cache, tokens, mask, first, stop, targets)
            log_probs.append(_of(found, tokens[:, targets]))
            likeliest.append(found.argmax(-1) == tokens[:, targets].to(found.device))
            first = stop
            stop = min(first + min(_UNLIMITED, cache.until_eviction()), prompt + behind - 1)
    by_token, right = torch.cat(log_probs, 1).cpu(), torch.cat(likeliest, 1).cpu()
    return [
        Scored(float(by_token[row, :n].sum()), bool(right[row, :n].all()), evictions[row])
        for row, n in enumerate(len(continuation) for _, continuation in pairs)
    ]
