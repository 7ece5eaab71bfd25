"""Plain torch, on any device and in any dtype: what the kernels are compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvpolicy.adapters.flash_attn.backends.append import append_
from kvpolicy.adapters.flash_attn.backends.base import Backend, Result, as_lengths

__all__ = ["Reference"]


@dataclass(frozen=True)
class Reference(Backend):
    """Attend with plain torch, which makes the whole matrix of logits.

    Logits and sums are float32, and float64 for float64.

    Example:
        >>> import torch
        >>> cache = torch.zeros(1, 4, 1, 8)
        >>> q, k = torch.ones(1, 1, 2, 8), torch.ones(1, 1, 1, 8)
        >>> lengths = torch.zeros(1, dtype=torch.int32)
        >>> Reference().with_kvcache(q, cache, cache.clone(), k, k, cache_seqlens=lengths).shape
        torch.Size([1, 1, 2, 8])
        >>> cache[0, :, 0, 0].tolist()
        [1.0, 0.0, 0.0, 0.0]
    """

    name: ClassVar[str] = "reference"

    @property
    def text(self) -> str:
        """Return ``"reference, torch ..."``."""
        return f"reference, {super().text}"

    def _with_kvcache(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        cache_seqlens: Tensor | int,
        block_table: Tensor | None,
        scale: float,
        causal: bool,
        softcap: float | None,
        return_lse: bool,
    ) -> Result:
        lengths = as_lengths(cache_seqlens, q)
        if k is not None and v is not None:
            append_(k_cache, k, lengths, block_table)
            append_(v_cache, v, lengths, block_table)
            lengths = lengths + k.shape[1]
        keys, values = k_cache, v_cache
        if block_table is not None:
            keys, values = _paged(k_cache, block_table), _paged(v_cache, block_table)
        widths = torch.full_like(lengths, q.shape[1])
        return _attend(q, keys, values, widths, lengths, scale, causal, softcap)

    def _varlen(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        seqused_k: Tensor | None,
        max_seqlen_q: int,
        max_seqlen_k: int,
        block_table: Tensor | None,
        scale: float,
        causal: bool,
        softcap: float | None,
        return_lse: bool,
    ) -> Result:
        widths = cu_seqlens_q.diff()
        lengths = cu_seqlens_k.diff() if seqused_k is None else seqused_k
        if block_table is None:
            keys, values = (_padded(x, cu_seqlens_k[:-1], max_seqlen_k) for x in (k, v))
        else:
            keys, values = _paged(k, block_table), _paged(v, block_table)
        queries = _padded(q, cu_seqlens_q[:-1], max_seqlen_q)
        out, lse = _attend(queries, keys, values, widths, lengths, scale, causal, softcap)
        token = torch.arange(len(q), device=q.device, dtype=cu_seqlens_q.dtype)
        sequence = torch.searchsorted(cu_seqlens_q[1:].contiguous(), token, right=True)
        place = token - cu_seqlens_q[sequence]
        return out[sequence, place], lse[sequence, :, place].transpose(0, 1)


def _padded(packed: Tensor, first: Tensor, size: int) -> Tensor:
    """Return sequences ``[N, size, H, D]`` of packed rows; what lies behind the end of one is anything."""
    at = first[:, None].long() + torch.arange(size, device=packed.device)
    return packed[at.clamp(max=len(packed) - 1)]


def _paged(pages: Tensor, block_table: Tensor) -> Tensor:
    """Return rows ``[B, max_blocks * page, H, D]``; what lies in pages that are not in use is anything."""
    return pages[block_table.long().clamp(0, len(pages) - 1)].flatten(1, 2)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    widths: Tensor,
    lengths: Tensor,
    scale: float,
    causal: bool,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Attend ``[N, T, Hq, D]`` to the first ``lengths`` keys of ``[N, S, Hkv, D]``.

    Query ``t`` is the ``widths - t``-th from the end, and sees as many keys fewer than the last one.

    Returns:
        ``[N, T, Hq, Dv]`` in the dtype of ``q``, and ``[N, Hq, T]``.
    """
    n, t, heads, _ = q.shape
    s, groups = k.shape[1], k.shape[2]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    slots, queries = torch.arange(s, device=q.device), torch.arange(t, device=q.device)
    used = slots < lengths[:, None]  # [N, S]
    last = lengths[:, None] - widths[:, None] + queries if causal else (lengths[:, None] - 1).expand(-1, t)
    visible = used[:, None] & (slots <= last[..., None])  # [N, T, S]
    logits = torch.einsum("nthgd,nshd->nhgts", q.to(wide).unflatten(2, (groups, -1)), k.to(wide)) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~visible[:, None, None], -torch.inf)
    lse = logits.logsumexp(-1)
    lse = torch.where(lse == -torch.inf, torch.inf, lse)  # no key is seen: as kernels write it
    # A slot that is not in use may hold nan, and 0 * nan is nan.
    values = torch.where(used[..., None, None], v.to(wide), 0)
    out = torch.einsum("nhgts,nshd->nthgd", torch.exp(logits - lse[..., None]), values)
    return out.reshape(n, t, heads, -1).to(q.dtype), lse.reshape(n, heads, t)
