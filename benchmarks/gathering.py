"""VaSE's eviction of a layer by gathering and copying, as the official code is described to do it.

The decision is the same as kvpolicy's; what differs is the work. Keys are repeated for the query heads
of a group, logits of all queries are one float32 tensor, the size of every value is computed anew,
survivors are chosen rather than victims, and the whole budget is gathered and copied back, in order.
Both decide in float32, where the official code rounds to bfloat16.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["GatheringCache"]


@dataclass
class GatheringCache:
    """Hold one layer in position order, and evict from it.

    Attributes:
        keys: ``[1, H, budget + interval, D]``.
        values: ``[1, H, budget + interval, D]``.
        positions: ``[1, H, budget + interval]``, to tell what was kept.
        budget: slots kept.
        length: slots in use.
        draw: sample as VaSE does; otherwise the highest scores are kept.
        recent: the last tokens, which always stay.
        share: of the budget, for the largest values.
        sinks: first slots, guarded among them.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    budget: int
    length: int
    draw: bool = True
    recent: int = 64
    share: float = 0.25
    sinks: int = 4

    def append(self, keys: Tensor, values: Tensor, first: int) -> None:
        """Write new tokens, ``[1, H, T, D]``, the first of which has position ``first``."""
        end = self.length + keys.shape[2]
        self.keys[:, :, self.length : end] = keys
        self.values[:, :, self.length : end] = values
        self.positions[:, :, self.length : end] = torch.arange(first, first + keys.shape[2])
        self.length = end

    def evict(self, queries: Tensor) -> None:
        """Cut to the budget; the queries are the newest, ``[1, Hq, W, D]``."""
        old, keep = self.length - self.recent, self.budget - self.recent
        large = int(self.budget * self.share)
        scores = self._attention(queries, old)
        held = self.values[:, :, :old]
        size = held.amax(-1).float() - held.amin(-1).float()
        size[..., : self.sinks] = torch.inf
        guarded = size.topk(large, -1).indices
        scores = scores.scatter(-1, guarded, 0)
        if self.draw:
            drawn = torch.multinomial(scores.flatten(0, 1), keep - large).view(*scores.shape[:2], -1)
        else:
            drawn = scores.topk(keep - large, -1).indices
        kept = torch.cat([guarded, drawn], -1).sort(-1).values
        for tensor in (self.keys, self.values):
            chosen = tensor.gather(2, kept[..., None].expand(-1, -1, -1, tensor.shape[-1]))
            newest = tensor[:, :, old : self.length].clone()
            tensor[:, :, :keep], tensor[:, :, keep : self.budget] = chosen, newest
        chosen, newest = self.positions.gather(-1, kept), self.positions[:, :, old : self.length].clone()
        self.positions[:, :, :keep], self.positions[:, :, keep : self.budget] = chosen, newest
        self.length = self.budget

    def _attention(self, queries: Tensor, old: int) -> Tensor:
        """Return the attention of the queries to the candidates, smoothed, ``[1, H, old]``."""
        heads, group = self.keys.shape[1], queries.shape[1] // self.keys.shape[1]
        repeated = self.keys[:, :, :old].float().repeat_interleave(group, 1)
        logits = torch.matmul(queries.float(), repeated.transpose(2, 3)) * queries.shape[-1] ** -0.5
        amount = torch.softmax(logits, -1, dtype=torch.float32).mean(2)
        return F.avg_pool1d(amount, 5, 1, 2).view(1, heads, group, old).mean(2)
