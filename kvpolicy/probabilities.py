"""The attention that slots receive, computed in blocks that fit into the workspace."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from kvpolicy.host import readable
from kvpolicy.log_sum_exp import received_by_lse
from kvpolicy.tiles import LOG2_E, logits_, pieces, reduced, tile
from kvpolicy.view import View

__all__ = ["blocks", "received"]

_MASKED = -1e30  #: finite, so that a query which sees nothing gives a number and not nan
_CPU_BLOCK = 4 * 2**20  #: bytes of logits that a core's caches like; measured, see benchmarks


def blocks(view: View, bytes_per_head: int) -> Iterator[slice]:
    """Yield slices of the ``B * H`` (row, head) pairs, four temporaries of which fit into half the workspace."""
    limit = view.workspace // 8
    if view.keys.device.type == "cpu":
        limit = min(limit, _CPU_BLOCK)
    b, h, _ = view.shape
    step = max(1, limit // max(1, bytes_per_head))
    for start in range(0, b * h, step):
        yield slice(start, min(start + step, b * h))


def received(
    view: View,
    queries: Tensor,
    query_positions: Tensor,
    chosen: Tensor,
    weight: Tensor,
    *,
    causal: bool,
    temperature: float,
    reduce: Literal["mean", "max"],
    lse: Tensor | None = None,
) -> Tensor:
    """Return the probability mass that ``queries`` give to each slot.

    The softmax runs over the chosen slots. The query heads of a group are averaged (or the
    largest taken); the queries of the window are added with their weights (or the largest taken).

    Args:
        view: keys, positions, and what the model does to logits.
        queries: ``[B, Hq, W, D]``.
        query_positions: ``[B, W]``.
        chosen: ``[B, H, S]`` bool, the slots that take part.
        weight: ``[B, W]``, of each query; 0 leaves it out.
        causal: hide slots newer than a query. Leave it out where none can be.
        temperature: divides the logits.
        reduce: over queries and group.
        lse: ``[B, Hq, W]``, of the logits of each query over the chosen slots that are not newer, with
            the sink logit, or None: nothing is then summed, unless the temperature makes other
            logits of them.

    Returns:
        ``[B, H, S]`` in ``view.compute_dtype``, 0 where not chosen.
    """
    if lse is not None and causal and temperature == 1:
        return received_by_lse(view, queries, query_positions, lse, weight, reduce=reduce)
    b, h, s = view.shape
    window, dim = queries.shape[2], queries.shape[3]
    group, dtype = queries.shape[1] // h, view.compute_dtype
    item = torch.finfo(dtype).bits // 8
    keys, positions, inside = (t.flatten(0, 1) for t in (view.keys, view.positions, chosen))
    asked = queries.reshape(b * h, group, window, dim)
    asked_at = query_positions.repeat_interleave(h, 0) if causal else None
    hidden = ~inside if asked_at is None else ~inside | (positions > asked_at.amin(1, keepdim=True))
    weights = weight.to(dtype).repeat_interleave(h, 0)[:, None]
    sinks = None
    if view.sink_logits is not None:
        sinks = view.sink_logits.reshape(b * h, group, 1, 1).to(dtype) * (LOG2_E / temperature)
    out = torch.zeros(b * h, s, dtype=dtype, device=keys.device)
    several = max(1, min(window, view.workspace // 8 // (group * s * item)))
    pairs, columns = tile(view, (several * group + dim) * item)
    on_cpu = keys.device.type == "cpu"
    scratch = out.new_empty(min(pairs, b * h) * several * group * s)
    for at in pieces(b * h, pairs):
        for some in pieces(window, several):
            now = asked[at, :, some].flatten(1, 2).to(dtype)
            n, lines = now.shape[:2]
            powers, highest, total = [], [], []
            for where in pieces(s, columns):
                logits = scratch[n * lines * where.start : n * lines * where.stop].view(n, lines, -1)
                held = keys[at, where].to(dtype, copy=on_cpu)  # a product reads keys more than once: from caches
                logits_(logits, view, now, held, temperature)
                if (span := _span(hidden[at, where], where)) is not None:
                    mask = ~inside[at, None, span]
                    if asked_at is not None:
                        mask = mask | (positions[at, None, span] > asked_at[at, some, None])
                    there = logits[..., span.start - where.start : span.stop - where.start]
                    # Filled, and not biased: whatever else the slots hold is not read, not even nan.
                    there.view(n, group, lines // group, -1).masked_fill_(mask[:, None], _MASKED)
                highest.append(logits.amax(-1, keepdim=True))
                powers.append(logits.sub_(highest[-1]).exp2_())
                total.append(logits.sum(-1, keepdim=True))
            further = None if sinks is None else sinks[at].expand(-1, -1, lines // group, -1).flatten(1, 2)
            factors = _factors(torch.stack(highest), torch.stack(total), further).view(-1, n, 1, lines)
            factors.view(-1, n, group, lines // group).mul_(weights[at, :, some])
            for where, held, factor in zip(pieces(s, columns), powers, factors, strict=True):
                found = reduced(held, factor, group, reduce)
                before = out[at, where]
                before.copy_(before.maximum(found)) if reduce == "max" else before.add_(found)
    return torch.where(chosen, out.view(b, h, s), 0)


def _span(hidden: Tensor, columns: slice) -> slice | None:
    """Return the columns that a mask has to be laid over, of those of ``hidden``, ``[N, C]``, or None.

    Only a CPU can look for them. Other devices would have to wait, and a compiled graph would have shapes that
    depend on data: these mask every column.
    """
    if not readable(hidden):
        return columns
    found = hidden.any(0).nonzero()
    return slice(columns.start + int(found[0]), columns.start + int(found[-1]) + 1) if len(found) else None


def _factors(highest: Tensor, total: Tensor, sinks: Tensor | None) -> Tensor:
    """Return what turns ``2 ** (logit - highest)`` into probabilities, where each tile has a highest of its own.

    Args:
        highest: ``[tiles, N, Q, 1]``.
        total: ``[tiles, N, Q, 1]``, sums of the powers.
        sinks: ``[N, Q, 1]``, a logit that adds to the sum, or None.

    Returns:
        ``[tiles, N, Q, 1]``, 0 for a query that sees nothing.
    """
    overall = highest.amax(0)
    if sinks is not None:
        overall = torch.maximum(overall, sinks)
    scale = torch.exp2(highest - overall)
    whole = (scale * total).sum(0)
    if sinks is not None:
        whole = whole + torch.exp2(sinks - overall)
    return scale.masked_fill_(highest <= _MASKED, 0).div_(whole)
