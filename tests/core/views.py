"""Views for tests of single stages: one call, everything explicit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvpolicy import View


def view_of(
    keys: Tensor,
    values: Tensor | None = None,
    *,
    budget: int,
    recent: int = 1,
    queries: Tensor | None = None,
    **more: Any,
) -> View:
    """Return the view of rows whose slots hold tokens 0, 1, 2, ... in order.

    keys: [B, H, S, D]; queries: [B, Hq, W, D], the newest W.
    """
    b, h, s, _ = keys.shape
    slots = torch.arange(s).expand(b, h, s)
    window = 0 if queries is None else queries.shape[2]
    zeros = torch.zeros(b, dtype=torch.long)
    fields: dict[str, Any] = {
        "keys": keys,
        "values": keys if values is None else values,
        "positions": slots.int(),
        "order": slots.int(),
        "fresh": slots,
        "budget": torch.full((b, h), budget),
        "lengths": torch.full((b, h), s),
        "seen": zeros + s,
        "prompt_length": zeros,
        "evictions": zeros,
        "request": zeros,
        "seed": zeros,
        "layer": zeros,
        "recent": recent,
        "max_budget": budget,
        "max_victims": max(0, s - budget),
        "queries": queries,
        "query_positions": None if queries is None else torch.arange(s - window, s).int().expand(b, -1),
        "num_heads": h,
        "scaling": keys.shape[3] ** -0.5,
    }
    return View(**{**fields, **more})
