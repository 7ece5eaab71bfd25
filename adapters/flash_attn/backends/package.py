"""The ``flash-attn`` package: ``flash_attn_with_kvcache`` and its varlen kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from kvpolicy.adapters.flash_attn.backends.base import Backend, Result, as_lengths
from kvpolicy.adapters.flash_attn.backends.engines import varlen_forward

__all__ = ["FlashAttn"]


@dataclass(frozen=True)
class FlashAttn(Backend):
    """Attend with the ``flash-attn`` package, whose kernel appends, too."""

    name: ClassVar[str] = "flash-attn"

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
        from flash_attn import flash_attn_with_kvcache

        given: Any = flash_attn_with_kvcache(
            q,
            k_cache,
            v_cache,
            k,
            v,
            # Its own conversion counts the rows of k_cache, which with pages are none.
            cache_seqlens=as_lengths(cache_seqlens, q),
            block_table=block_table,
            softmax_scale=scale,
            causal=causal,
            softcap=softcap or 0.0,
            return_softmax_lse=return_lse,
        )
        return (given[0], given[1]) if return_lse else (given, None)

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
        where: dict[str, Any] = {"causal": causal, "softcap": softcap or 0.0, "block_table": block_table}
        packed = (q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        forward = varlen_forward()
        if seqused_k is not None and forward is not None:
            out, lse, *_ = forward(*packed, dropout_p=0.0, softmax_scale=scale, seqused_k=seqused_k, **where)
            return out, lse
        from flash_attn import flash_attn_varlen_func

        given: Any = flash_attn_varlen_func(*packed, softmax_scale=scale, return_attn_probs=return_lse, **where)
        return (given[0], given[1]) if return_lse else (given, None)
