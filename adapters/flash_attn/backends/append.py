"""Writing new tokens into a cache, where no kernel does it."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["append_"]


def append_(cache: Tensor, new: Tensor, lengths: Tensor, block_table: Tensor | None) -> None:
    """Write new tokens behind those that each row has; modifies ``cache`` in place.

    Args:
        cache: ``[B, S, H, D]`` with any strides, or pages ``[blocks, page, H, D]``.
        new: ``[B, T, H, D]``.
        lengths: ``[B]``, the tokens of each row before.
        block_table: ``[B, max_blocks]``, the pages of each row, or None.
    """
    slots = lengths[:, None].long() + torch.arange(new.shape[1], device=new.device)
    if block_table is None:
        cache[torch.arange(len(slots), device=new.device)[:, None], slots] = new
    else:
        page = cache.shape[1]
        cache[block_table.long().gather(1, slots // page), slots % page] = new
