"""Caches that a caller owns, in each layout, written by hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvpolicy import EvictionPolicy
from kvpolicy.adapters.flash_attn import Evicted, EvictionState, evict_
from kvpolicy.adapters.flash_attn.backends.reference import Reference

LAYOUTS = ("dense", "transposed", "one tensor", "packed", "uneven", "paged 1", "paged 7", "paged 16", "paged in one")


class Own:
    """Hold dense or paged caches of a model, and decode with them as a caller would."""

    def __init__(self, layout: str, policy: EvictionPolicy, shape: tuple[int, int, int, int, int, int], dtype: Any,
                 **options: Any) -> None:  # fmt: skip
        layers, batch, slots, query_heads, heads, dim = shape
        self.batch, self.table, self.page = batch, None, 0
        self.free: list[int] = []
        self.policy, self.seqlens = policy, torch.zeros(batch, dtype=torch.int32)
        if layout.startswith("paged"):
            self.page = int(layout.split()[-1]) if layout[-1].isdigit() else 8
            each = -(-slots // self.page)
            slots = each * self.page
            blocks = batch * each + 3
            self.free = torch.randperm(blocks, generator=torch.Generator().manual_seed(1)).tolist()
            self.table = torch.full((batch, each), -7, dtype=torch.int32)
            self.k, self.v = (torch.full((layers, blocks, self.page, heads, dim), torch.nan, dtype=dtype)
                              for _ in range(2))  # fmt: skip
        elif layout == "transposed":
            self.k, self.v = (torch.full((layers, batch, heads, slots, dim), torch.nan, dtype=dtype).transpose(2, 3)
                              for _ in range(2))  # fmt: skip
        elif layout == "packed":
            both = torch.full((batch, layers, slots, 2, heads, dim), torch.nan, dtype=dtype)
            self.k, self.v = (both[:, :, :, i].transpose(0, 1) for i in range(2))
        elif layout == "uneven":  # strides that are no multiples of a line
            self.k, self.v = (
                torch.full((layers, batch, slots, heads * dim + 3), torch.nan, dtype=dtype)[..., 1 : 1 + heads * dim]
                .unflatten(-1, (heads, dim)) for _ in range(2)
            )  # fmt: skip
        else:
            self.k, self.v = (torch.full((layers, batch, slots, heads, dim), torch.nan, dtype=dtype) for _ in range(2))
        self.given: tuple[Any, Any] = (self.k, self.v)
        if layout not in ("one tensor", "packed", "paged in one"):
            self.given = (list(self.k), list(self.v)) if layers > 1 else (self.k[0], self.v[0])
        self.slots = slots
        self.state = EvictionState(policy, slots=slots, num_layers=layers, num_heads=heads, num_query_heads=query_heads,
                                   head_dim=dim, batch_size=batch, dtype=dtype, **options)  # fmt: skip
        self.counts: list[int] = []
        self.reference = Reference()

    def begin(self, counts: list[int]) -> None:
        """Make room for the tokens of a forward pass."""
        self.counts = counts
        if self.table is not None:
            for r, (have, count) in enumerate(zip(self.seqlens.tolist(), counts, strict=True)):
                for place in range(-(-have // self.page), -(-(have + count) // self.page)):
                    self.table[r, place] = self.free.pop()

    def where(self, row: int, slot: int) -> tuple[int, int]:
        if self.table is None:
            return row, slot
        return int(self.table[row, slot // self.page]), slot % self.page

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        width = q.shape[1]
        for r, count in enumerate(self.counts):
            for i in range(count):
                a, b = self.where(r, int(self.seqlens[r]) + i)
                self.k[layer, a, b], self.v[layer, a, b] = k[r, width - count + i], v[r, width - count + i]
        after = self.seqlens + torch.tensor(self.counts, dtype=torch.int32)
        out, lse = self.reference.with_kvcache(
            q, self.k[layer], self.v[layer], cache_seqlens=after, block_table=self.table, return_lse=True
        )
        if self.state.asks_queries:
            self.state.observe(layer, q, self.counts, lse=lse if self.state.lse else None)
        return out

    def end(self, **options: Any) -> Evicted:
        self.seqlens += torch.tensor(self.counts, dtype=torch.int32)
        done = evict_(*self.given, self.seqlens, self.policy, self.state, tokens=self.counts, block_table=self.table,
                      **options)  # fmt: skip
        if done.freed is not None:
            self.free += done.freed.tolist()
        return done

    def look(self) -> None:
        """Let a policy see queries before a turn pushes them out."""
        evict_(*self.given, self.seqlens, self.policy, self.state, tokens=0, block_table=self.table)
