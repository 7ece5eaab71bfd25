"""FlashAttention-2 behind ``scaled_dot_product_attention``: older versions of torch, rows of one length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from kvpolicy.adapters.flash_attn.backends.base import Backend, Result
from kvpolicy.errors import UnsupportedError

__all__ = ["Sdpa"]


@dataclass(frozen=True)
class Sdpa(Backend):
    """Attend rows whose one length the caller knows as a number: this kernel takes no lengths."""

    name: ClassVar[str] = "sdpa"

    @property
    def text(self) -> str:
        """Return ``"torch ... sdpa (flash)"``."""
        return f"{super().text} sdpa (flash)"

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
        if isinstance(cache_seqlens, Tensor):
            raise UnsupportedError("backend 'sdpa' takes cache_seqlens as a number; write backend='torch'")
        width, before = q.shape[1], cache_seqlens
        total = before if k is None else before + width
        if total == 0 or (causal and total < width):
            raise UnsupportedError(
                f"{width} queries and {total} keys: some query sees no key, and 'sdpa' would give nan; pass k and v"
            )
        if k is not None and v is not None:
            k_cache[:, before:total].copy_(k)
            v_cache[:, before:total].copy_(v)
        # is_causal aligns at the top left: the last query sees the last key only where both are as many.
        bias = causal_lower_right(width, total) if causal and width not in (1, total) else None
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            out = F.scaled_dot_product_attention(
                q.transpose(1, 2),
                k_cache[:, :total].transpose(1, 2),
                v_cache[:, :total].transpose(1, 2),
                attn_mask=bias,
                is_causal=causal and bias is None and width > 1,
                scale=scale,
                enable_gqa=q.shape[2] != k_cache.shape[2],
            )
        return out.transpose(1, 2), None

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
        raise UnsupportedError("backend 'sdpa' has no varlen; write backend='torch'")
