"""Answers through transformers, a batch at a time: :class:`TransformersEngine`."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from kvpolicy.adapters.hf import EvictionCache
from kvpolicy.evaluation.generation import Finish, Generation
from kvpolicy.evaluation.rendering import Asked
from kvpolicy.generation import held_bytes
from kvpolicy.loading import Loaded
from kvpolicy.policy import EvictionPolicy

__all__ = ["Drawing", "TransformersEngine", "batches"]

_AT_ONCE = 256  #: tokens fed at once to a full cache


@dataclass(frozen=True)
class Drawing:
    """Say how tokens are drawn.

    Attributes:
        temperature: 0 takes the likeliest.
        top_p: draw from the likeliest tokens that make up this share.
        seed: of the draws, and of the policy's noise.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


def batches(asked: Sequence[Asked], size: int) -> list[list[int]]:
    """Return which problems are answered together, the longest first.

    Rows are padded at their left; those that are fed in several pieces, or with text behind the
    prompt, go together only where all pieces are equally long.
    """
    simple = [i for i, one in enumerate(asked) if len(one.pieces) == 1 and not one.behind]
    groups: dict[tuple[int, ...], list[int]] = {}
    for i in sorted(set(range(len(asked))) - set(simple)):
        groups.setdefault(asked[i].shape, []).append(i)
    found: list[list[int]] = []
    for group in (sorted(simple, key=lambda i: -asked[i].length), *groups.values()):
        found += [group[at : at + size] for at in range(0, len(group), size)]
    return sorted(found, key=lambda batch: -max(asked[i].length for i in batch))


class TransformersEngine:
    """Answer batches of problems with a model of transformers, under a policy or with the full cache.

    Args:
        loaded: the model and its tokenizer.
    """

    def __init__(self, loaded: Loaded) -> None:
        self.model = loaded.model
        self.ends = _ends(loaded)

    @torch.inference_mode()
    def generate(
        self, asked: Sequence[Asked], policy: EvictionPolicy | None, drawing: Drawing, names: Sequence[int]
    ) -> list[Generation]:
        """Return an answer to each of some problems that go into one batch.

        Args:
            asked: the problems.
            policy: None for the full cache.
            drawing: how tokens are drawn.
            names: of the problems, integers: noise and draws are keyed by them, so that an answer does
                not depend on what else is in the batch.
        """
        rows = [_Row(one.max_new_tokens, _generator(drawing, name)) for one, name in zip(asked, names, strict=True)]
        with self._cache(asked, policy, drawing, names) as cache:
            mask, logits, shares = self._feed(cache, asked)
            for row in rows:
                row.nbytes = cache.nbytes() // len(rows) if isinstance(cache, EvictionCache) else 0
            self._answer(cache, mask, logits, shares, rows, drawing)
        return [row.generation() for row in rows]

    def _cache(
        self, asked: Sequence[Asked], policy: EvictionPolicy | None, drawing: Drawing, names: Sequence[int]
    ) -> AbstractContextManager[Any]:
        if policy is None:
            return nullcontext(DynamicCache(config=self.model.config.get_text_config(decoder=True)))
        most = max(len(one.behind) + one.max_new_tokens for one in asked)
        prompt = sum(map(len, asked[0].pieces)) if asked[0].behind else None  # else told by the first single token
        return EvictionCache(
            self.model,
            policy,
            max_new_tokens=most,
            prompt_length=prompt,
            seeds=[drawing.seed] * len(asked),
            requests=list(names),
        )

    def _feed(self, cache: Any, asked: Sequence[Asked]) -> tuple[Tensor, Tensor, list[float]]:
        """Feed all that stands before the answers; return the mask of its columns, the last logits, and shares held."""
        device, count = self.model.device, len(asked[0].pieces)
        width = max(len(one.pieces[0]) for one in asked)
        mask = torch.ones(len(asked), width, dtype=torch.int64)
        first = torch.zeros(len(asked), width, dtype=torch.int64)
        for r, one in enumerate(asked):
            piece = one.pieces[0]
            first[r, width - len(piece) :] = torch.tensor(piece)
            mask[r, : width - len(piece)] = 0
        mask = mask.to(device)
        logits, shares = self._forward(cache, first.to(device), mask), [1.0] * len(asked)  # a prompt sees all of itself
        for i in range(1, count):
            mask, logits, shares = self._continue(cache, mask, torch.tensor([one.pieces[i] for one in asked]))
        behind = torch.tensor([one.behind for one in asked], dtype=torch.int64)
        while behind.shape[1]:
            most = cache.until_eviction() if isinstance(cache, EvictionCache) else _AT_ONCE
            mask, logits, shares = self._continue(cache, mask, behind[:, : min(most, _AT_ONCE)])
            behind = behind[:, min(most, _AT_ONCE) :]
        return mask, logits, shares

    def _continue(self, cache: Any, mask: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, list[float]]:
        """Feed more tokens; return the mask, the logits, and which share of the tokens seen the last one found."""
        shares = _shares(cache, tokens.shape[0], tokens.shape[1])
        mask = torch.cat([mask, mask.new_ones(len(tokens), tokens.shape[1])], 1)
        return mask, self._forward(cache, tokens.to(mask.device), mask), shares

    def _forward(self, cache: Any, tokens: Tensor, mask: Tensor) -> Tensor:
        """Return ``[rows, vocabulary]`` logits behind the last token."""
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        return self.model(
            input_ids=tokens,
            attention_mask=None if mask.all() else mask,
            position_ids=positions,
            past_key_values=cache,
            logits_to_keep=1,
        ).logits[:, -1]

    def _answer(
        self, cache: Any, mask: Tensor, logits: Tensor, shares: list[float], rows: list[_Row], drawing: Drawing
    ) -> None:
        """Decode until every row has ended; rows that have are dropped whenever they are half of the batch."""
        while True:
            tokens = _pick(logits, rows, drawing)
            for r, row in enumerate(rows):
                if row.finish is None:
                    row.take(tokens[r], shares[r], self.ends)
                    if row.finish is not None:
                        nbytes, row.evictions = _held(cache, mask, r)
                        row.nbytes = max(row.nbytes, nbytes)
            alive = [r for r, row in enumerate(rows) if row.finish is None]
            if not alive:
                return
            if 2 * len(alive) <= len(rows) and _can_drop(cache):
                cache, mask = _only(cache, alive), mask[alive]
                rows, tokens = [rows[r] for r in alive], [tokens[r] for r in alive]
            mask, logits, shares = self._continue(cache, mask, torch.tensor(tokens)[:, None])


class _Row:
    """Collect the answer of one problem."""

    def __init__(self, most: int, generator: torch.Generator) -> None:
        self.most, self.generator = most, generator
        self.tokens: list[int] = []
        self.finish: Finish | None = None
        self.shares: list[float] = []
        self.nbytes = 0
        self.evictions = 0

    def take(self, token: int, share: float, ends: frozenset[int]) -> None:
        """Take the next token, chosen while the cache held a share of the tokens seen."""
        self.shares.append(share)
        if token in ends:
            self.finish = "stop"
            return
        self.tokens.append(token)
        if len(self.tokens) == self.most:
            self.finish = "length"

    def generation(self) -> Generation:
        """Return the finished answer."""
        assert self.finish is not None
        share = sum(self.shares) / len(self.shares)
        return Generation(tuple(self.tokens), self.finish, share, self.nbytes, self.evictions)


def _ends(loaded: Loaded) -> frozenset[int]:
    """Return the tokens that end an answer."""
    given = loaded.model.generation_config.eos_token_id
    ends = given if isinstance(given, list) else [given]
    return frozenset(end for end in [*ends, loaded.tokenizer.eos_token_id] if end is not None)


def _generator(drawing: Drawing, name: int) -> torch.Generator:
    # On a CPU torch takes 32 bits of a seed.
    return torch.Generator().manual_seed(zlib.crc32(f"{drawing.seed} {name}".encode()))


def _pick(logits: Tensor, rows: Sequence[_Row], drawing: Drawing) -> list[int]:
    """Return the next token of each row, of ``[rows, vocabulary]`` logits."""
    if drawing.temperature == 0:
        found: list[int] = logits.argmax(-1).tolist()
        return found
    probabilities = torch.softmax(logits.double().cpu() / drawing.temperature, -1)
    sorted_, order = probabilities.sort(-1, descending=True)
    sorted_[sorted_.cumsum(-1) - sorted_ >= drawing.top_p] = 0
    drawn = [torch.multinomial(one, 1, generator=row.generator) for one, row in zip(sorted_, rows, strict=True)]
    return [int(order[r, place]) for r, place in enumerate(drawn)]


def _shares(cache: Any, rows: int, new: int) -> list[float]:
    """Return slots used / tokens seen of each row, once ``new`` more tokens are fed and before anything is evicted."""
    if not isinstance(cache, EvictionCache):
        return [1.0] * rows
    return [(slots + new) / (seen + new) for slots, seen in zip(cache.slots, cache.seen, strict=True)]


def _held(cache: Any, mask: Tensor, row: int) -> tuple[int, int]:
    """Return the bytes that the cache holds of one row, pads apart, and its evictions."""
    if isinstance(cache, EvictionCache):
        return cache.nbytes(turns=False) // cache.num_requests, cache.evictions[row]
    return held_bytes(cache) * int(mask[row].sum()) // mask.numel(), 0


def _can_drop(cache: Any) -> bool:
    """Return whether rows can be taken out of a cache: of transformers' linear layers, they cannot."""
    return isinstance(cache, EvictionCache) or all(hasattr(one, "batch_select_indices") for one in cache.layers)


def _only(cache: Any, rows: list[int]) -> Any:
    """Return the cache of some rows alone."""
    if isinstance(cache, EvictionCache):
        fewer = cache.fork(rows)
        cache.unbind()
        return fewer
    cache.batch_select_indices(torch.tensor(rows))
    return cache
