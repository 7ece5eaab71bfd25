"""The attention that each query pays each slot, in blocks that fit into the workspace."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kvpolicy.tiles import LOG2_E, logits_, pieces
from kvpolicy.view import View

__all__ = ["each_query"]

_MASKED = -1e30  #: finite, so that a query which sees nothing gives a number and not nan
_CPU_BLOCK = 4 * 2**20  #: bytes of logits that a core's caches like, as in ``probabilities``


def each_query(
    view: View,
    queries: Tensor,
    query_positions: Tensor,
    *,
    whole: bool = False,
    further: int = 0,
    noise: Callable[[slice, slice], Tensor] | None = None,
    temperature: Tensor | None = None,
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Yield the probabilities with which the query heads of a group attend to the slots.

    The softmax runs over the slots that hold a token no newer than the query. Of each (row, head) pair, older
    queries come first.

    Args:
        view: keys, positions, and what the model does to logits.
        queries: ``[B, Hq, W, D]``.
        query_positions: ``[B, W]``; a query at -1 sees nothing.
        whole: give all queries of a pair at once, and the members of its group in turn if need be: what is computed
            of them, such as a variance, wants every query.
        further: bytes that the caller makes of what a query pays a slot, to be counted in.
        noise: returns what to add to the logits of some pairs and queries, ``[n, group, w, S]``.
        temperature: ``[B, W]``, divides the logits after that.

    Yields:
        Which of the ``B * H`` pairs; ``[n, group, w, S]`` probabilities in ``view.compute_dtype``, 0 where a query
        does not see a slot (one member, ``[n, 1, W, S]``, at a time where ``whole``); ``[n, w, S]`` bool, where it
        does; ``[n, w]`` positions of the queries.
    """
    b, h, s = view.shape
    window, dim = queries.shape[2], queries.shape[3]
    group, dtype = queries.shape[1] // h, view.compute_dtype
    size = torch.finfo(dtype).bits // 8
    limit = view.workspace // 8
    if view.keys.device.type == "cpu":
        limit = min(limit, _CPU_BLOCK)
    members = [slice(i, i + 1) for i in range(group)] if whole else [slice(0, group)]
    line = s * (group // len(members) * size * (4 if noise is not None else 1) + further)  # noise has 64 bits
    several = window if whole else max(1, min(window, limit // line))
    keys, positions = view.keys.flatten(0, 1), view.positions.flatten(0, 1)
    asked = queries.reshape(b * h, group, window, dim)
    asked_at = query_positions.repeat_interleave(h, 0)
    divisor = None if temperature is None else temperature.to(dtype).repeat_interleave(h, 0)
    sinks = None
    if view.sink_logits is not None:
        sinks = view.sink_logits.reshape(b * h, group, 1, 1).to(dtype) * LOG2_E
    for at in pieces(b * h, max(1, limit // (line * several + s * dim * size))):  # keys may have to be converted
        held, where = keys[at].to(dtype), positions[at]
        for some in pieces(window, several):
            seen = (where[:, None] >= 0) & (where[:, None] <= asked_at[at, some, None])
            for one in members:
                now = asked[at, one, some].flatten(1, 2).to(dtype)
                logits = logits_(now.new_empty(*now.shape[:2], s), view, now, held)
                logits = logits.view(len(now), -1, some.stop - some.start, s)
                sink = sinks if sinks is None else sinks[at, one]
                if noise is not None:
                    logits = logits + noise(at, some) * LOG2_E
                if divisor is not None:
                    by = divisor[at, some][:, None, :, None]
                    logits, sink = logits / by, sink if sink is None else sink / by
                logits = logits.masked_fill(~seen[:, None], _MASKED)
                highest = logits.amax(-1, keepdim=True)
                highest = highest if sink is None else torch.maximum(highest, sink)
                powers = torch.exp2(logits - highest)
                total = powers.sum(-1, keepdim=True)
                total = total if sink is None else total + torch.exp2(sink - highest)
                yield at, torch.where(seen[:, None], powers / total, 0), seen, asked_at[at, some]
