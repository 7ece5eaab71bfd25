"""Attention to heads that hold different numbers of tokens: every (row, KV head) is a sequence of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvpolicy.adapters.flash_attn.backends import Backend
from kvpolicy.eviction import LogitSpec
from kvpolicy.host import on_device, sent
from kvpolicy.ragged import RaggedStore

__all__ = ["NEEDS", "attend_decoded", "attend_turn"]

NEEDS = frozenset({"varlen", "head_lengths"})  #: what a backend must have


def attend_decoded(
    backend: Backend, store: RaggedStore, index: int, q: Tensor, logits: LogitSpec, *, lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Attend one decoded token of each row to the slots of each head where they lie; nothing is copied.

    Args:
        backend: with :data:`NEEDS`.
        store: holds the new tokens behind those in use, and they do not count yet.
        index: the layer, counted within the store.
        q: ``[B, 1, Hq, D]``.
        logits: scale and cap.
        lse: return the log-sum-exp of every query, too.

    Returns:
        ``[B, 1, Hq, Dv]``, and ``[B, Hq, 1]`` or None.
    """
    starts, used = store.sequences(index)
    keys, values = (t[index].flatten(0, 1)[:, None] for t in (store.keys, store.values))
    asked = q.reshape(len(used), -1, q.shape[-1])
    out = backend.varlen(
        asked,
        keys,
        values,
        cu_seqlens_q=torch.arange(len(used) + 1, dtype=torch.int32, device=q.device),
        cu_seqlens_k=starts,
        seqused_k=used,
        max_seqlen_q=1,
        max_seqlen_k=int(store.held[index].max()) + 1,
        scale=logits.scaling,
        causal=True,
        softcap=logits.softcap,
        return_lse=lse,
    )
    out, told = out if lse else (out, None)
    return out.reshape(*q.shape[:3], -1), told if told is None else _by_row(told, len(q))


def attend_turn(
    backend: Backend,
    store: RaggedStore,
    index: int,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    counts: Sequence[int],
    logits: LogitSpec,
    *,
    lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Attend a turn to what each head holds and to itself.

    Args:
        backend: with :data:`NEEDS`.
        store: before the turn.
        index: the layer, counted within the store.
        q: ``[B, T, Hq, D]``, left-padded.
        keys: ``[B, H, S_old + T, D]``: the slots in use, up to the longest head, then the new tokens, left-padded.
        values: ``[B, H, S_old + T, Dv]``.
        counts: new tokens of each row.
        logits: scale and cap.
        lse: return the log-sum-exp of every query, too.

    Returns:
        ``[B, T, Hq, Dv]``, and ``[B, Hq, T]`` or None; anything where a row has pads.
    """
    (rows, heads, size), width = keys.shape[:3], q.shape[1]
    held = sent(store.held[index], q.device)
    count = on_device(counts, q.device)[:, None]
    slot = torch.arange(size, device=q.device)
    behind = slot + (size - count - held)[..., None]  # beyond what a head holds and the pads
    place = torch.where(slot < held[..., None], slot, behind).clamp(max=size - 1)
    packed = [t.gather(2, place[..., None].expand(-1, -1, -1, t.shape[-1])).flatten(0, 2) for t in (keys, values)]
    sequences = torch.arange(rows * heads + 1, dtype=torch.int32, device=q.device)
    asked = q.unflatten(2, (heads, -1)).transpose(1, 2).flatten(0, 2)
    out = backend.varlen(
        asked,
        packed[0][:, None],
        packed[1][:, None],
        cu_seqlens_q=sequences * width,
        cu_seqlens_k=sequences * size,
        seqused_k=(held + count).flatten().to(torch.int32),
        max_seqlen_q=width,
        max_seqlen_k=size,
        scale=logits.scaling,
        causal=True,
        softcap=logits.softcap,
        return_lse=lse,
    )
    out, told = out if lse else (out, None)
    whole = out.view(rows, heads, width, -1, values.shape[-1]).transpose(1, 2).flatten(2, 3)
    return whole, told if told is None else _by_row(told, rows, width)


def _by_row(lse: Tensor, rows: int, width: int = 1) -> Tensor:
    """Return the log-sum-exp of a group's heads and every query, ``[G, rows * H * T]``, as ``[rows, Hq, T]``."""
    return lse.view(len(lse), rows, -1, width).permute(1, 2, 0, 3).flatten(1, 2)
