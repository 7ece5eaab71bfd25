"""The attention that slots receive, from the log-sum-exp that the attention kernel returned."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from kvpolicy.tiles import LOG2_E, logits_, pieces, reduced, tile
from kvpolicy.view import View

__all__ = ["received_by_lse"]


def received_by_lse(
    view: View,
    queries: Tensor,
    query_positions: Tensor,
    lse: Tensor,
    weight: Tensor,
    *,
    reduce: Literal["mean", "max"],
) -> Tensor:
    """Return the probability mass that ``queries`` give to each slot, newer slots hidden.

    A probability is ``exp(logit - lse)``. No sum over slots is needed, so that blocks of slots are
    read once, each by itself, and no ``[queries, slots]`` matrix ever exists.

    Args:
        view: keys, positions, and what the model does to logits.
        queries: ``[B, Hq, W, D]``, of the last tokens, oldest first.
        query_positions: ``[B, W]``.
        lse: ``[B, Hq, W]``, of the logits of each query over all slots that are not newer, and the
            sink logit where there is one.
        weight: ``[B, W]``, of each query; 0 leaves it out.
        reduce: over queries and group.

    Returns:
        ``[B, H, S]`` in ``view.compute_dtype``, 0 in free slots.
    """
    b, h, s = view.shape
    window, dim = queries.shape[2], queries.shape[3]
    group, dtype = queries.shape[1] // h, view.compute_dtype
    lines = group * window
    asked = queries.reshape(b * h, lines, dim)
    left_out = (weight == 0)[:, None].expand(-1, queries.shape[1], -1)
    shift = lse.to(dtype).masked_fill(left_out, torch.inf).mul(LOG2_E).reshape(b * h, lines, 1)  # 2 ** -inf is 0
    weights = weight.to(dtype).repeat_interleave(h, 0).repeat(1, group)[:, None]
    keys, out = view.keys.flatten(0, 1), torch.zeros(b * h, s, dtype=dtype, device=queries.device)
    pairs, columns = tile(view, (lines + dim) * torch.finfo(dtype).bits // 8)
    scratch = torch.empty(min(pairs, b * h) * lines * columns, dtype=dtype, device=queries.device)
    # Only the newest slots hide from a query of the window. They are computed twice: here, as if all were
    # seen, and below with a mask, which the others so do without.
    for at in pieces(b * h, pairs):
        now, subtract, weigh = asked[at].to(dtype), shift[at], weights[at]
        for some in pieces(s, columns):
            held = keys[at, some].to(dtype)
            logits = scratch[: len(now) * lines * held.shape[1]].view(len(now), lines, -1)
            probabilities = logits_(logits, view, now, held).sub_(subtract).exp2_()
            out[at, some] = reduced(probabilities, weigh, group, reduce)
    slots = _newest_slots(view, window)
    for at in pieces(b * h, max(1, pairs * columns // window)):
        place = slots[at]
        held = keys[torch.arange(b * h, device=place.device)[at, None], place].to(dtype)
        now, subtract = asked[at].to(dtype), shift[at]
        logits = held.new_empty(len(held), lines, place.shape[1])
        probabilities = logits_(logits, view, now, held).sub_(subtract).exp2_()
        future = view.positions.flatten(0, 1)[at].gather(1, place)[:, None] > _by_head(query_positions, h)[at, :, None]
        probabilities.view(len(held), group, window, -1).masked_fill_(future[:, None], 0)
        out[at].scatter_(1, place, reduced(probabilities, weights[at], group, reduce))
    return torch.where(view.valid, out.view(b, h, s), 0)


def _by_head(by_row: Tensor, heads: int) -> Tensor:
    return by_row.repeat_interleave(heads, 0)


def _newest_slots(view: View, count: int) -> Tensor:
    """Return the slots of the newest tokens of each head, ``[B * H, min(count, S)]``; others where it has fewer."""
    count = min(count, view.shape[2])
    last = (view.lengths[..., None] - count).clamp(min=0) + torch.arange(count, device=view.order.device)
    return view.order.gather(-1, last).to(torch.int64).flatten(0, 1)
