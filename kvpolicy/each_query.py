"""The attention that each query pays each slot, in blocks that fit into the workspace."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kvpolicy.tiles import LOG2_E, logits_, pieces
from kvpolicy.view import View

__all__ = ["each_query", "uncounted"]

_MASKED = -1e30  #: finite, so that a query which sees nothing gives a number and not nan
_CPU_BLOCK = 4 * 2**20  #: bytes of logits that a core's caches like, as in ``probabilities``


def uncounted(view: View, window: int) -> tuple[Tensor, Tensor]:
    """Return the newest ``window`` queries, and the positions of those that are new since the row was last seen.

    Returns:
        ``[B, Hq, window, D]``, and ``[B, window]``, -1 where a query is absent or was counted before.
    """
    assert view.queries is not None
    assert view.query_positions is not None
    positions = view.query_positions[:, -window:]
    first = view.seen - (view.fresh >= 0).sum(-1)[:, 0]
    return view.queries[:, :, -window:], torch.where(positions >= first[:, None], positions, -1)


def each_query(
    view: View,
    queries: Tensor,
    query_positions: Tensor,
    *,
    noise: Callable[[slice, slice], Tensor] | None = None,
    temperature: Tensor | None = None,
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Yield the probabilities with which queries attend to the slots, the mean over the heads of a group.

    The softmax runs over the slots that hold a token no newer than the query. Of each (row, head) pair, older
    queries come first.

    Args:
        view: keys, positions, and what the model does to logits.
        queries: ``[B, Hq, W, D]``.
        query_positions: ``[B, W]``; a query at -1 sees nothing.
        noise: returns what to add to the logits of some pairs and queries, ``[n, group, w, S]``.
        temperature: ``[B, W]``, divides the logits after that.

    Yields:
        Which of the ``B * H`` pairs; ``[n, w, S]`` probabilities in ``view.compute_dtype``, 0 where a query
        does not see a slot; ``[n, w, S]`` bool, where it does; ``[n, w]`` positions of the queries.
    """
    b, h, s = view.shape
    window, dim = queries.shape[2], queries.shape[3]
    group, dtype = queries.shape[1] // h, view.compute_dtype
    limit = view.workspace // 8
    if view.keys.device.type == "cpu":
        limit = min(limit, _CPU_BLOCK)
    line = group * s * torch.finfo(dtype).bits // 8 * (4 if noise is not None else 1)  # noise is drawn in 64 bits
    several = max(1, min(window, limit // line))
    keys, positions = view.keys.flatten(0, 1), view.positions.flatten(0, 1)
    asked = queries.reshape(b * h, group, window, dim)
    asked_at = query_positions.repeat_interleave(h, 0)
    divisor = None if temperature is None else temperature.to(dtype).repeat_interleave(h, 0)
    sinks = None
    if view.sink_logits is not None:
        sinks = view.sink_logits.reshape(b * h, group, 1, 1).to(dtype) * LOG2_E
    for at in pieces(b * h, max(1, limit // (line * several))):
        held, where = keys[at].to(dtype), positions[at]
        for some in pieces(window, several):
            now = asked[at, :, some].flatten(1, 2).to(dtype)
            logits = logits_(now.new_empty(*now.shape[:2], s), view, now, held).view(len(now), group, -1, s)
            sink = sinks if sinks is None else sinks[at]
            if noise is not None:
                logits = logits + noise(at, some) * LOG2_E
            if divisor is not None:
                by = divisor[at, some][:, None, :, None]
                logits, sink = logits / by, sink if sink is None else sink / by
            seen = (where[:, None] >= 0) & (where[:, None] <= asked_at[at, some, None])
            logits = logits.masked_fill(~seen[:, None], _MASKED)
            highest = logits.amax(-1, keepdim=True)
            highest = highest if sink is None else torch.maximum(highest, sink)
            powers = torch.exp2(logits - highest)
            total = powers.sum(-1, keepdim=True)
            total = total if sink is None else total + torch.exp2(sink - highest)
            yield at, torch.where(seen, (powers / total).mean(1), 0), seen, asked_at[at, some]
