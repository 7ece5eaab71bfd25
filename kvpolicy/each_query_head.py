"""The probabilities of each query by itself, for scorers that do more with them than add them up."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kvpolicy.probabilities import blocks
from kvpolicy.view import View

__all__ = ["each_query_head"]

_MASKED = -1e30  #: finite, so that a query which sees nothing gives zeros and not nan


def each_query_head(view: View, window: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield what each of the newest ``window`` queries gives to each slot, some heads at a time.

    The softmax runs over every slot that is not newer than the query. One query head of a group at a time:
    a block holds ``W * S`` numbers of a head, not those of its whole group.

    Args:
        view: with queries.
        window: how many of the newest are asked.

    Yields:
        Which of the ``B * H`` (row, head) pairs these are; probabilities ``[N, W, S]`` in
        ``view.compute_dtype``, 0 where a slot is free or newer, and everywhere for a query that is
        absent; ``[N, W]`` bool, which queries are there. Each pair comes once for each member of its group.
    """
    assert view.queries is not None
    assert view.query_positions is not None
    (b, h, s), dtype = view.shape, view.compute_dtype
    queries, asked_at = view.queries[:, :, -window:], view.query_positions[:, -window:]
    window, dim = queries.shape[2:]
    queries = queries.reshape(b * h, -1, window, dim)
    sinks = None if view.sink_logits is None else view.sink_logits.reshape(b * h, -1).to(dtype)
    keys, positions, valid = (t.flatten(0, 1) for t in (view.keys, view.positions, view.valid))
    asked_at = asked_at.repeat_interleave(h, 0)
    for at in blocks(view, (s * (dim + 2 * window)) * torch.finfo(dtype).bits // 8):
        held = keys[at].to(dtype).transpose(1, 2)
        there = asked_at[at] >= 0
        seen = valid[at, None] & (positions[at, None] <= asked_at[at, :, None])
        for member in range(queries.shape[1]):
            logits = torch.bmm(queries[at, member].to(dtype), held) * view.scaling
            if view.softcap is not None:
                logits = view.softcap * torch.tanh(logits / view.softcap)
            logits = torch.where(seen, logits, _MASKED)
            if sinks is not None:
                logits = torch.cat([logits, sinks[at, member, None, None].expand(-1, window, 1)], -1)
            shares = torch.softmax(logits, -1)[..., :s]
            yield at, torch.where(seen, shares, 0), there
