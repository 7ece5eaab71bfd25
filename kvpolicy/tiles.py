"""Logits of queries and keys in tiles: some heads, some slots, as many as a core's own caches hold."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from kvpolicy.view import View

__all__ = ["LOG2_E", "logits_", "pieces", "reduced", "tile"]

LOG2_E = math.log2(math.e)  #: powers of 2 cost a CPU a third of those of e
_CPU_TILE = 3 * 2**20  #: bytes of keys and logits; measured: smaller ones cost calls, larger ones leave the caches


def tile(view: View, bytes_per_slot: int) -> tuple[int, int]:
    """Return how many of the ``B * H`` (row, head) pairs, and how many of their slots, are computed at once."""
    limit = view.workspace // 8
    if view.keys.device.type == "cpu":
        limit = min(limit, _CPU_TILE)
    room = max(1, limit // bytes_per_slot)
    columns = min(room, view.shape[2])
    return room // columns, columns


def pieces(size: int, step: int) -> list[slice]:
    """Return slices of ``step`` that cover ``size``; the last may be shorter."""
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def logits_(out: Tensor, view: View, asked: Tensor, keys: Tensor, temperature: float = 1.0) -> Tensor:
    """Write the logits of ``[N, Q, D]`` queries and ``[N, C, D]`` keys into ``out``, in units of the logarithm of 2.

    A key that holds ``nan`` spoils its own column, and no other.
    """
    if view.softcap is None:
        return out.baddbmm_(asked, keys.mT, beta=0, alpha=view.scaling * LOG2_E / temperature)
    torch.bmm(asked, keys.mT, out=out)
    return out.mul_(view.scaling / view.softcap).tanh_().mul_(view.softcap * LOG2_E / temperature)


def reduced(powers: Tensor, weights: Tensor, group: int, reduce: Literal["mean", "max"]) -> Tensor:
    """Return what ``[N, Q, C]`` powers under ``[N, 1, Q]`` weights give to each column, ``[N, C]``; modifies them."""
    if reduce == "max":
        return powers.mul_(weights.mT).amax(1)
    return torch.bmm(weights / group, powers)[:, 0]
