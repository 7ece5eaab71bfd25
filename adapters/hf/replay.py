"""What a model says of a known text under a policy: :func:`replay`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from kvpolicy import _check
from kvpolicy.adapters.hf.cache import EvictionCache
from kvpolicy.errors import UsageError
from kvpolicy.policy import EvictionPolicy
from kvpolicy.receipt import Receipt

__all__ = ["Replay", "replay"]

_UNLIMITED = 256  #: tokens at once where nothing is evicted behind the prompt


@dataclass(frozen=True, eq=False)
class Replay:
    """Hold what a model says of each token behind a prompt, ``N`` of them.

    Attributes:
        log_probs: ``[requests, N]`` float32 (float64 of a float64 model), of the tokens of the text
            under the policy, in nats.
        full_log_probs: the same with the full cache, or None if it was not asked for.
        kl: ``[requests, N]``, of the full cache's distribution from the policy's, in nats, or None.
        agreement: ``[requests, N]`` bool, whether both prefer the same token, or None.
        receipt: what the cache held at the end.
    """

    log_probs: Tensor
    full_log_probs: Tensor | None
    kl: Tensor | None
    agreement: Tensor | None
    receipt: Receipt


@torch.no_grad()
def replay(
    model: PreTrainedModel,
    policy: EvictionPolicy | Sequence[EvictionPolicy],
    tokens: Tensor,
    prompt_length: int,
    *,
    attention_mask: Tensor | None = None,
    full: bool = False,
    seeds: Sequence[int] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Replay:
    """Feed a known text to a model under a policy, as if it were decoded, at the speed of a prefill.

    Behind the prompt, tokens are fed up to the next eviction at once. Each attends to exactly what
    it would attend to if it were decoded alone, so kept sets and probabilities are those of
    decoding this text token by token.

    Args:
        model: a decoder of transformers.
        policy: what to keep, or one for each row.
        tokens: ``[requests, columns]`` integers, left-padded.
        prompt_length: columns of the prompt, pads among them.
        attention_mask: ``[requests, columns]``, 0 where a pad stands, or None.
        full: compare with the full cache, which must fit into memory.
        seeds: of each request's randomness.
        progress: called with the columns done and all of them.

    Raises:
        UsageError: there is no prompt, or nothing behind it.

    Example::

        found = replay(model, vase(256), tokens, prompt_length=512, full=True)
        print(found.log_probs.mean(), found.kl.mean(), found.agreement.float().mean())
    """
    _check.integer("replay", "prompt_length", prompt_length, 1)
    if not isinstance(tokens, Tensor) or tokens.is_floating_point():
        raise UsageError(f"tokens are a {type(tokens).__name__}: give a tensor of token ids, [requests, columns]")
    if tokens.dim() != 2 or not prompt_length < tokens.shape[1]:
        raise UsageError(
            f"tokens are {tuple(tokens.shape)} and prompt_length={prompt_length}: give [requests, columns] with at "
            "least one column behind the prompt"
        )
    mask = torch.ones_like(tokens) if attention_mask is None else attention_mask.to(tokens)
    if mask.shape != tokens.shape:
        raise UsageError(f"attention_mask is {tuple(mask.shape)}, and tokens are {tuple(tokens.shape)}")
    if not bool(mask[:, prompt_length - 1].all()):
        raise UsageError(f"some row has no token in the first {prompt_length} columns: its prompt begins later")
    behind = tokens.shape[1] - prompt_length
    log_probs: list[Tensor] = []
    full_log_probs: list[Tensor] = []
    kl: list[Tensor] = []
    agreement: list[Tensor] = []
    with EvictionCache(model, policy, max_new_tokens=behind, prompt_length=prompt_length, seeds=seeds) as cache:
        reference = DynamicCache(config=model.config) if full else None
        for first, stop in _chunks(cache, tokens.shape[1], prompt_length):
            new = _logits(model, cache, tokens, mask, first, stop)
            targets = tokens[:, max(first + 1, prompt_length) : stop + 1]
            found = _log_softmax(new)
            log_probs.append(_of(found, targets))
            if reference is not None:
                known = _log_softmax(_logits(model, reference, tokens, mask, first, stop))
                full_log_probs.append(_of(known, targets))
                kl.append((known.exp() * (known - found)).sum(-1))
                agreement.append(known.argmax(-1) == found.argmax(-1))
            if progress is not None:
                progress(stop, tokens.shape[1])
        receipt = cache.receipt()

    def whole(parts: list[Tensor]) -> Tensor | None:
        return torch.cat(parts, 1) if full else None

    return Replay(torch.cat(log_probs, 1), whole(full_log_probs), whole(kl), whole(agreement), receipt)


def _chunks(cache: EvictionCache, columns: int, prompt_length: int) -> Iterator[tuple[int, int]]:
    """Yield which columns to feed next: the prompt, then up to each eviction. The last one predicts nothing."""
    first, stop = 0, prompt_length
    while first < stop:
        yield first, stop
        first = stop
        stop = min(first + min(cache.until_eviction(), _UNLIMITED), columns - 1)


def _logits(model: PreTrainedModel, cache: Any, tokens: Tensor, mask: Tensor, first: int, stop: int) -> Tensor:
    """Return the logits of the new columns, of a prompt those of the last column alone."""
    positions = (mask[:, :stop].cumsum(1) - 1).clamp(min=0)[:, first:]
    out = model(
        input_ids=tokens[:, first:stop],
        attention_mask=None if mask.all() else mask[:, :stop],
        position_ids=positions,
        past_key_values=cache,
        logits_to_keep=1 if first == 0 else stop - first,
    )
    return out.logits


def _log_softmax(logits: Tensor) -> Tensor:
    return torch.log_softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))


def _of(log_probs: Tensor, tokens: Tensor) -> Tensor:
    return log_probs.gather(-1, tokens[..., None].to(log_probs.device))[..., 0]
