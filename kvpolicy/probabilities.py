"""The attention that slots receive, computed in blocks that fit into the workspace."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from kvpolicy.view import View

__all__ = ["blocks", "received"]

_MASKED = -1e30  #: finite, so that a query which sees nothing gives a number and not nan
_CPU_BLOCK = 4 * 2**20  #: bytes of logits that a core's caches like; measured, see benchmarks


def blocks(view: View, bytes_per_head: int) -> Iterator[slice]:
    """Yield slices of the ``B * H`` (row, head) pairs whose temporaries fit into the workspace."""
    limit = view.workspace // 2
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

    Returns:
        ``[B, H, S]`` in ``view.compute_dtype``, 0 where not chosen.
    """
    b, h, s = view.shape
    window, dim = queries.shape[2], queries.shape[3]
    group = queries.shape[1] // h
    dtype = view.compute_dtype
    keys = view.keys.flatten(0, 1)
    asked = queries.reshape(b * h, group * window, dim)
    inside = chosen.flatten(0, 1)[..., None]
    bias = torch.where(chosen, 0.0, _MASKED).to(dtype).flatten(0, 1)[:, None]
    weights = weight[:, None, None].expand(b, h, group, window).reshape(b * h, 1, group * window)
    sinks = None if view.sink_logits is None else view.sink_logits.reshape(b * h, group, 1, 1).to(dtype)
    if causal:
        future = (view.positions[:, :, None] > query_positions[:, None, :, None]).flatten(0, 1)
    out = torch.empty(b * h, s, dtype=dtype, device=keys.device)
    for at in blocks(view, group * window * s * torch.finfo(dtype).bits // 8):
        # Whatever stands in the other slots is not read: nan plus a bias would still be nan.
        block = keys[at].to(dtype).masked_fill(~inside[at], 0)
        logits = _logits(view, asked[at], block, bias[at], temperature, dtype)
        if causal:
            by_query = logits.view(-1, group, window, s)
            by_query.masked_fill_(future[at][:, None], _MASKED)
        probabilities = _softmax(logits, None if sinks is None else _per_query(sinks[at], window, temperature))
        if causal:  # a query older than every slot pays nothing
            probabilities.view(-1, group, window, s).masked_fill_(future[at][:, None], 0)
        if reduce == "max":
            out[at] = (probabilities * weights[at].transpose(1, 2)).amax(1)
        else:
            out[at] = torch.bmm(weights[at] / group, probabilities)[:, 0]
    return torch.where(chosen, out.view(b, h, s), 0)


def _logits(view: View, asked: Tensor, keys: Tensor, bias: Tensor, temperature: float, dtype: torch.dtype) -> Tensor:
    asked, keys = asked.to(dtype), keys.transpose(1, 2)
    bias = bias.expand(-1, asked.shape[1], -1)
    if view.softcap is None:
        return torch.baddbmm(bias, asked, keys, alpha=view.scaling / temperature)
    capped = view.softcap * torch.tanh(torch.bmm(asked, keys) * (view.scaling / view.softcap))
    return capped / temperature + bias


def _softmax(logits: Tensor, sinks: Tensor | None) -> Tensor:
    """Return the softmax over the last axis, with a further logit in each denominator if there is one."""
    if sinks is None:
        return torch.softmax(logits, -1)
    highest = torch.maximum(logits.amax(-1, keepdim=True), sinks)
    mass = torch.exp(logits - highest)
    return mass / (mass.sum(-1, keepdim=True) + torch.exp(sinks - highest))


def _per_query(sinks: Tensor, window: int, temperature: float) -> Tensor:
    return (sinks / temperature).expand(-1, -1, window, 1).flatten(1, 2)
