"""The attention that slots receive, computed in blocks that fit into the workspace."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from kvpolicy.log_sum_exp import LOG2_E, received_by_lse
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
    group = queries.shape[1] // h
    dtype = view.compute_dtype
    keys, positions = view.keys.flatten(0, 1), view.positions.flatten(0, 1)[:, None]
    asked = queries.reshape(b * h, group, window, dim)
    asked_at = query_positions.repeat_interleave(h, 0)[..., None]
    inside = chosen.flatten(0, 1)[..., None]
    bias = torch.where(chosen, 0.0, _MASKED).to(dtype).flatten(0, 1)[:, None]
    weights = weight.to(dtype).repeat_interleave(h, 0)[:, None]
    sinks = None
    if view.sink_logits is not None:
        sinks = view.sink_logits.reshape(b * h, group, 1, 1).to(dtype) * (LOG2_E / temperature)
    out = torch.zeros(b * h, 1, s, dtype=dtype, device=keys.device)
    bytes_per_query = group * s * torch.finfo(dtype).bits // 8
    several = max(1, min(window, view.workspace // 8 // bytes_per_query))
    scratch = out.new_empty(0)
    for at in blocks(view, several * bytes_per_query):
        # Whatever else the slots hold is not read: nan plus a bias would still be nan.
        held = keys[at].to(dtype).masked_fill(~inside[at], 0).transpose(1, 2)
        received_here = out[at]
        for some in (slice(first, first + several) for first in range(0, window, several)):
            now = asked[at, :, some].flatten(1, 2).to(dtype)
            n, lines = now.shape[:2]
            if not scratch.numel():  # the first block is the largest; pages are touched once, not in every block
                scratch = out.new_empty(n * lines * s)
            logits = scratch[: n * lines * s].view(n, lines, s)
            by_query = (n, group, lines // group, s)
            _logits(view, now, held, bias[at], temperature, logits)
            future = (positions[at] > asked_at[at, some])[:, None] if causal else None
            if future is not None:
                logits.view(by_query).masked_fill_(future, _MASKED)
            further = None if sinks is None else sinks[at].expand(-1, -1, lines // group, -1).flatten(1, 2)
            total = _powers(logits, further)
            if future is not None:  # a query older than every slot pays nothing
                logits.view(by_query).masked_fill_(future, 0)
            # Queries are weighed and divided at once: their powers are read once more, and not written.
            weighs = weights[at, :, some].repeat(1, 1, group) / total.mT
            if reduce == "max":
                received_here.copy_(received_here.maximum(logits.mul_(weighs.mT).amax(1, keepdim=True)))
            else:
                received_here.baddbmm_(weighs / group, logits)
    return torch.where(chosen, out.view(b, h, s), 0)


def _logits(view: View, asked: Tensor, keys: Tensor, bias: Tensor, temperature: float, out: Tensor) -> None:
    """Write the logits of ``[N, Q, D]`` queries and ``[N, D, S]`` keys into ``out``, over the logarithm of 2."""
    if view.softcap is None:
        torch.baddbmm(bias.expand_as(out), asked, keys, alpha=view.scaling * LOG2_E / temperature, out=out)
        return
    torch.bmm(asked, keys, out=out)
    out.mul_(view.scaling / view.softcap).tanh_().mul_(view.softcap * LOG2_E / temperature).add_(bias)


def _powers(logits: Tensor, sinks: Tensor | None) -> Tensor:
    """Replace logits by ``2 ** (logit - highest)``, and return their sums, ``[N, Q, 1]``, with a sink's where it is."""
    highest = logits.amax(-1, keepdim=True)
    if sinks is not None:
        highest = torch.maximum(highest, sinks)
    total = logits.sub_(highest).exp2_().sum(-1, keepdim=True)
    return total if sinks is None else total + torch.exp2(sinks - highest)
