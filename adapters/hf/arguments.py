"""What the arguments of a forward pass say: :func:`read`, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvpolicy.errors import UsageError

__all__ = ["Arguments", "check_continues", "read", "tokens_of"]


@dataclass(frozen=True, eq=False)
class Arguments:
    """Say what a forward pass brings.

    Attributes:
        requests: rows.
        width: columns, pads among them.
        counts: new tokens of each row.
        last: the position that the model gives each row's newest token: told, or one number for all
            where the model counts columns itself; None where it is no single number.
    """

    requests: int
    width: int
    counts: list[int]
    last: Tensor | int | None


def read(arguments: dict[str, Any], columns: int, seen: Sequence[int]) -> Arguments:
    """Return what a forward pass brings to a cache.

    Args:
        arguments: of the decoder's forward.
        columns: seen by the cache, pads among them.
        seen: tokens of each row; empty before the first pass.

    Raises:
        UsageError: these arguments cannot give a right answer.
    """
    tokens = tokens_of(arguments)
    if arguments.get("output_attentions"):
        raise UsageError("evicted tokens have no attention weights to show: leave output_attentions out")
    requests, width = tokens.shape[0], tokens.shape[1]
    if not width:
        raise UsageError(
            "there is no new token: reset() the cache for a new prompt, or give the whole conversation and what is new"
        )
    if arguments.get("use_cache") is False:
        raise UsageError("use_cache=False asks for no cache: leave it out, or leave past_key_values out")
    if columns and requests != len(seen):
        raise UsageError(
            f"the cache holds {len(seen)} requests, and the batch has {requests} rows; "
            "a batch keeps its size until reset()"
        )
    counts = _counts(arguments.get("attention_mask"), columns, width, list(seen) if columns else [0] * requests)
    return Arguments(requests, width, counts, _last(arguments.get("position_ids"), requests, columns + width - 1))


def tokens_of(arguments: dict[str, Any]) -> Tensor:
    """Return the new tokens of a forward pass, ``[requests, columns]`` or their embeddings."""
    tokens = arguments.get("input_ids")
    tokens = arguments.get("inputs_embeds") if tokens is None else tokens
    if tokens is None:
        raise UsageError("the forward pass has neither input_ids nor inputs_embeds")
    return tokens


def _last(positions: Any, requests: int, column: int) -> Tensor | int | None:
    """Return the position that the model gives each row's newest token, where it is one number."""
    if positions is None:
        return column
    if isinstance(positions, Tensor) and positions.dim() == 3 and positions.shape[0] == 4:
        positions = positions[0]  # of the text; behind it, where a token stands in an image
    if not isinstance(positions, Tensor) or positions.dim() != 2:
        return None
    return positions[:, -1].expand(requests).clone()  # the caller may count on in place


def check_continues(before: Tensor | int | None, new: Arguments, *, padded: bool) -> None:
    """Refuse a new prompt on a used cache: its positions begin again.

    Args:
        before: the position of each row's newest token so far.
        new: what the forward pass brings.
        padded: whether some columns seen were pads, so that a column is no position.
    """
    if before is None or not isinstance(new.last, Tensor) or (isinstance(before, int) and padded):
        return
    known = [before] * new.requests if isinstance(before, int) else before.tolist()
    for r, (old, now, count) in enumerate(zip(known, new.last.tolist(), new.counts, strict=True)):
        if now != old + count:
            raise UsageError(
                f"row {r} brings {count} tokens that end at position {now}, and the cache's last token is at {old}; "
                "reset() the cache for a new prompt, or continue with the whole conversation"
            )


def _counts(mask: Any, columns: int, width: int, seen: list[int]) -> list[int]:
    """Return the new tokens of each row, which an attention mask tells from pads."""
    if mask is None:
        if any(one != columns for one in seen):
            raise UsageError("some rows were padded: pass the attention_mask with every later call, too")
        return [width] * len(seen)
    if isinstance(mask, dict):  # one for each kind of layer, as generate() makes them for static caches
        mask = mask.get("full_attention")
        if mask is None:
            return _counts(None, columns, width, seen)
    if isinstance(mask, Tensor) and mask.dim() == 4:
        return _counts_of_causal(mask, width, len(seen))
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        raise UsageError("an EvictionCache takes a two-dimensional attention_mask, of ones and zeros, or none")
    if tuple(mask.shape) != (len(seen), columns + width):
        raise UsageError(
            f"attention_mask is {tuple(mask.shape)}; it must cover {len(seen)} rows and the {columns} columns seen "
            f"with the {width} new ones: ({len(seen)}, {columns + width})"
        )
    new = (mask[:, columns:] != 0).to(torch.int64)
    steps = torch.stack([(mask[:, :columns] != 0).sum(1), new.sum(1), (new.diff(dim=1) < 0).sum(1), new[:, -1]])
    before, counts, falls, last = steps.tolist()
    for r in range(len(seen)):
        if falls[r] or not last[r]:
            raise UsageError(
                f"row {r} of attention_mask has a pad behind a token; pad on the left: tokenizer.padding_side = 'left'"
            )
        if before[r] != seen[r]:
            raise UsageError(
                f"row {r} of attention_mask shows {before[r]} tokens among the columns seen, and the cache has seen "
                f"{seen[r]}; tokens cannot be hidden later"
            )
    return [int(count) for count in counts]


def _counts_of_causal(mask: Tensor, width: int, requests: int) -> list[int]:
    """Return the new tokens of each row from the mask that ``generate()`` makes of a two-dimensional one."""
    visible = mask if mask.dtype == torch.bool else mask >= 0
    if visible.shape[1:] == (1, width, width):
        valid = visible[:, 0, -1].expand(requests, -1)  # the last token sees every other
        causal = torch.ones(width, width, dtype=torch.bool, device=mask.device).tril()
        right = ((visible[:, 0] == (causal & valid[:, None])) | ~valid[..., None]).all()
        if bool(right & valid[:, -1].all() & (valid.to(torch.int8).diff(dim=1) >= 0).all()):
            return [int(count) for count in valid.sum(1).tolist()]
    raise UsageError(
        f"attention_mask is {tuple(mask.shape)}; of four-dimensional masks, an EvictionCache takes a causal one with "
        f"pads on the left, of the {width} new columns alone: ({requests}, 1, {width}, {width}); better give a "
        "two-dimensional one of ones and zeros"
    )
