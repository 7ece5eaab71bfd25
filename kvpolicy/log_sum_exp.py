"""The attention that slots receive, from the log-sum-exp that the attention kernel returned."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from kvpolicy.view import View

__all__ = ["LOG2_E", "received_by_lse"]

LOG2_E = math.log2(math.e)  #: powers of 2 cost a CPU a third of those of e
_CPU_BLOCK = 3 * 2**19  #: bytes of keys and logits, which a core's own caches hold until they are added up; measured


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
    shift = lse.to(dtype).masked_fill(left_out, torch.inf).mul(-LOG2_E).reshape(b * h, lines, 1)  # 2 ** -inf is 0
    weights = weight.to(dtype).repeat_interleave(h, 0).repeat(1, group)[:, None]
    keys, out = view.keys.flatten(0, 1), torch.zeros(b * h, s, dtype=dtype, device=queries.device)
    pairs, columns = _block(view, (lines + dim) * torch.finfo(dtype).bits // 8)
    scratch = torch.empty(min(pairs, b * h) * lines * columns, dtype=dtype, device=queries.device)
    # Only the newest slots hide from a query of the window. They are computed twice: here, as if all were
    # seen, and below with a mask, which the others so do without.
    for at in _pieces(b * h, pairs):
        now, subtract, weigh = asked[at].to(dtype), shift[at], weights[at]
        for some in _pieces(s, columns):
            held = keys[at, some].to(dtype)
            logits = scratch[: len(now) * lines * held.shape[1]].view(len(now), lines, -1)
            probabilities = _powers(view, now, held.mT, subtract, logits)
            out[at, some] = _reduced(probabilities, weigh, group, reduce)
    slots = _newest_slots(view, window)
    for at in _pieces(b * h, max(1, pairs * columns // window)):
        place = slots[at]
        held = keys[torch.arange(b * h, device=place.device)[at, None], place].to(dtype)
        now, subtract = asked[at].to(dtype), shift[at]
        probabilities = _powers(view, now, held.mT, subtract, held.new_empty(len(held), lines, place.shape[1]))
        future = view.positions.flatten(0, 1)[at].gather(1, place)[:, None] > _by_head(query_positions, h)[at, :, None]
        probabilities.view(len(held), group, window, -1).masked_fill_(future[:, None], 0)
        out[at].scatter_(1, place, _reduced(probabilities, weights[at], group, reduce))
    return torch.where(view.valid, out.view(b, h, s), 0)


def _block(view: View, bytes_per_slot: int) -> tuple[int, int]:
    """Return how many (row, head) pairs, and how many of their slots, are computed at once."""
    limit = view.workspace // 8
    if view.keys.device.type == "cpu":
        limit = min(limit, _CPU_BLOCK)
    room = max(1, limit // bytes_per_slot)
    columns = min(room, view.shape[2])
    return room // columns, columns


def _pieces(size: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def _by_head(by_row: Tensor, heads: int) -> Tensor:
    return by_row.repeat_interleave(heads, 0)


def _newest_slots(view: View, count: int) -> Tensor:
    """Return the slots of the newest tokens of each head, ``[B * H, min(count, S)]``; others where it has fewer."""
    count = min(count, view.shape[2])
    last = (view.lengths[..., None] - count).clamp(min=0) + torch.arange(count, device=view.order.device)
    return view.order.gather(-1, last).to(torch.int64).flatten(0, 1)


def _powers(view: View, asked: Tensor, keys: Tensor, shift: Tensor, out: Tensor) -> Tensor:
    """Write ``2 ** (log2(e) * logit + shift)`` of ``[N, Q, D]`` queries and ``[N, D, C]`` keys into ``out``."""
    if view.softcap is None:
        torch.baddbmm(shift.expand_as(out), asked, keys, alpha=view.scaling * LOG2_E, out=out)
    else:
        torch.bmm(asked, keys, out=out)
        out.mul_(view.scaling / view.softcap).tanh_().mul_(view.softcap * LOG2_E).add_(shift)
    return out.exp2_()


def _reduced(probabilities: Tensor, weights: Tensor, group: int, reduce: Literal["mean", "max"]) -> Tensor:
    """Return what ``[N, Q, C]`` probabilities give to each column, ``[N, C]``; modifies them."""
    if reduce == "max":
        return probabilities.mul_(weights.mT).amax(1)
    return torch.bmm(weights / group, probabilities)[:, 0]
