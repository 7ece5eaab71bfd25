"""What a model says of a known text under a policy: :func:`replay`, and :func:`replays` for many policies at once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from kvpolicy import _check
from kvpolicy.adapters.hf.cache import EvictionCache
from kvpolicy.adapters.hf.losses import Losses, losses
from kvpolicy.errors import UsageError
from kvpolicy.policy import EvictionPolicy
from kvpolicy.receipt import Receipt

__all__ = ["Replay", "replay", "replays"]

_PROBED = 16  #: tokens at the end whose attention is asked for
_UNLIMITED = 256  #: tokens at once where nothing is evicted behind the prompt


@dataclass(frozen=True, eq=False)
class Replay:
    """Hold what a model says of the tokens behind a prompt, ``N`` of them.

    Attributes:
        columns: ``[N]`` int64, which columns of the text these tokens are.
        log_probs: ``[requests, N]`` float32 (float64 of a float64 model), of the tokens of the text
            under the policy, in nats.
        full_log_probs: the same with the full cache, or None if it was not asked for.
        kl: ``[requests, N]``, of the full cache's distribution from the policy's, in nats, or None.
        agreement: ``[requests, N]`` bool, whether both prefer the same token, or None.
        receipt: what the cache held at the end.
        first_eviction: of each request, the tokens seen when something was evicted first; all of them if nothing was.
        shares: of each request, slots used / tokens seen, a mean over the tokens behind the prompt.
        losses: what the attention of the last tokens lost in each layer, or None.
    """

    columns: Tensor
    log_probs: Tensor
    full_log_probs: Tensor | None
    kl: Tensor | None
    agreement: Tensor | None
    receipt: Receipt
    first_eviction: tuple[int, ...]
    shares: tuple[float, ...]
    losses: Losses | None = None


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
    (found,) = replays(
        model,
        [policy],
        tokens,
        prompt_length,
        attention_mask=attention_mask,
        full=full,
        seeds=seeds,
        progress=progress,
    )
    return found


@torch.no_grad()
def replays(
    model: PreTrainedModel,
    policies: Sequence[EvictionPolicy | Sequence[EvictionPolicy]],
    tokens: Tensor,
    prompt_length: int,
    *,
    attention_mask: Tensor | None = None,
    full: bool = True,
    probe: bool = False,
    columns: Sequence[int] | None = None,
    seeds: Sequence[int] | None = None,
    requests: Sequence[int] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Replay]:
    """Feed a known text to a model under many policies side by side, each as :func:`replay` does.

    The full cache is computed once for all of them. All are fed up to the first eviction that any
    of them is due, so that policies with one interval go fastest together.

    Args:
        model: a decoder of transformers.
        policies: what to keep, each one for all rows or one for each row.
        tokens: ``[requests, columns]`` integers, left-padded.
        prompt_length: columns of the prompt, pads among them.
        attention_mask: ``[requests, columns]``, 0 where a pad stands, or None.
        full: compare with the full cache, which must fit into memory.
        probe: ask, too, what the attention of the last 16 tokens lost, of what was held before them; needs
            ``full``, and rows without pads.
        columns: compare these columns of the text alone, ascending, all of them behind the prompt: most of the
            time goes into the vocabulary.
        seeds: of each request's randomness.
        requests: names of the requests, integers that key randomness beside the seeds.
        progress: called with the columns done and all of them.

    Raises:
        UsageError: there is no prompt, or nothing behind it, or ``probe`` is asked for where it cannot be had.

    Example::

        for found in replays(model, [vase(256), rkv(256)], tokens, prompt_length=512):
            print(found.kl.mean(), found.receipt.policy)
    """
    mask = _checked(tokens, attention_mask, prompt_length)
    compared = _compared(columns, prompt_length, tokens.shape[1])
    if probe and not (full and bool(mask.all())):
        raise UsageError(
            "probe=True compares with the full cache, without pads: write full=True, and rows of one length"
        )
    behind = tokens.shape[1] - prompt_length
    if probe and behind < 2:
        raise UsageError("probe=True asks tokens behind the prompt, and all but the last one are prompt")
    with ExitStack() as stack:
        runs = [
            _Run(
                stack.enter_context(
                    EvictionCache(
                        model,
                        policy,
                        max_new_tokens=behind,
                        prompt_length=prompt_length,
                        seeds=seeds,
                        requests=requests,
                    )
                )
            )
            for policy in policies
        ]
        reference = DynamicCache(config=model.config) if full else None
        edge = max(prompt_length, tokens.shape[1] - 1 - _PROBED)
        before: DynamicCache | None = None
        first, stop = 0, prompt_length
        while first < stop:
            probing = probe and first == edge
            targets = compared[(first < compared) & (compared <= stop)]
            before = copy.deepcopy(reference) if probing else before  # not every cache can go back
            known = None if reference is None else _log_softmax(model, reference, tokens, mask, first, stop, targets)
            for run in runs:
                run.kept = run.cache.receipt() if probing else run.kept
                run.take(_log_softmax(model, run.cache, tokens, mask, first, stop, targets), known, tokens[:, targets])
                run.count(stop - first, in_prompt=first == 0)
            if progress is not None:
                progress(stop, tokens.shape[1])
            first = stop
            stop = min(first + min(_UNLIMITED, *(run.cache.until_eviction() for run in runs)), tokens.shape[1] - 1)
            stop = min(stop, edge) if probe and first < edge else stop
        for run in runs:
            run.receipt = run.cache.receipt()
    lost: list[Losses] | list[None] = [None] * len(runs)
    if before is not None:
        lost = losses(model, before, tokens, edge, [run.kept for run in runs if run.kept is not None])
    return [run.finished(compared, one) for run, one in zip(runs, lost, strict=True)]


@dataclass
class _Run:
    """Hold what one policy has come to so far."""

    cache: EvictionCache
    log_probs: list[Tensor] = field(default_factory=list)
    full_log_probs: list[Tensor] = field(default_factory=list)
    kl: list[Tensor] = field(default_factory=list)
    agreement: list[Tensor] = field(default_factory=list)
    kept: Receipt | None = None
    receipt: Receipt | None = None
    first_eviction: list[int] = field(default_factory=list)
    shares: list[list[float]] = field(default_factory=list)
    slots: list[float] = field(default_factory=list)

    def count(self, new: int, *, in_prompt: bool) -> None:
        """Note what is held behind ``new`` more tokens, and which share of the tokens each of them found held."""
        seen, evictions = self.cache.seen, self.cache.evictions
        self.first_eviction = self.first_eviction or [0] * len(seen)
        self.shares = self.shares or [[] for _ in seen]
        for r, count in enumerate(seen):
            if evictions[r] and not self.first_eviction[r]:
                self.first_eviction[r] = count
            if not in_prompt:
                self.shares[r] += [(self.slots[r] + i) / (count - new + i) for i in range(1, new + 1)]
        self.slots = self.cache.slots

    def take(self, found: Tensor, known: Tensor | None, targets: Tensor) -> None:
        """Compare two ``[requests, n, vocabulary]`` log-probabilities of ``[requests, n]`` tokens."""
        self.log_probs.append(_of(found, targets))
        if known is not None:
            self.full_log_probs.append(_of(known, targets))
            self.kl.append((known.exp() * (known - found)).sum(-1))
            self.agreement.append(known.argmax(-1) == found.argmax(-1))

    def finished(self, columns: Tensor, lost: Losses | None) -> Replay:
        """Return all of it."""
        assert self.receipt is not None

        def whole(parts: list[Tensor]) -> Tensor | None:
            return torch.cat(parts, 1) if parts else None

        return Replay(
            columns,
            torch.cat(self.log_probs, 1),
            whole(self.full_log_probs),
            whole(self.kl),
            whole(self.agreement),
            self.receipt,
            tuple(first or seen for first, seen in zip(self.first_eviction, self.receipt.seen, strict=True)),
            tuple(sum(shares) / len(shares) if shares else 1.0 for shares in self.shares),
            lost,
        )


def _checked(tokens: Tensor, attention_mask: Tensor | None, prompt_length: int) -> Tensor:
    """Return the mask of ``[requests, columns]`` tokens, all of which can be fed."""
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
    return mask


def _compared(columns: Sequence[int] | None, prompt_length: int, stop: int) -> Tensor:
    """Return the columns that are compared, ``[N]`` on the host."""
    if columns is None:
        return torch.arange(prompt_length, stop)
    found = torch.as_tensor(columns, dtype=torch.int64)
    if not (found.dim() == 1 and len(found) and bool((found.diff() > 0).all())) or not (
        prompt_length <= int(found[0]) and int(found[-1]) < stop
    ):
        raise UsageError(f"columns={columns!r}: name columns from {prompt_length} to {stop - 1}, ascending")
    return found


def _log_softmax(
    model: PreTrainedModel, cache: Any, tokens: Tensor, mask: Tensor, first: int, stop: int, targets: Tensor
) -> Tensor:
    """Feed the new columns, and return the log-probabilities of what stands in ``targets``."""
    positions = (mask[:, :stop].cumsum(1) - 1).clamp(min=0)[:, first:]
    logits = model(
        input_ids=tokens[:, first:stop],
        attention_mask=None if mask.all() else mask[:, :stop],
        position_ids=positions,
        past_key_values=cache,
        logits_to_keep=(targets - 1 - first).to(model.device),
    ).logits
    return torch.log_softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))


def _of(log_probs: Tensor, tokens: Tensor) -> Tensor:
    return log_probs.gather(-1, tokens[..., None].to(log_probs.device))[..., 0]
