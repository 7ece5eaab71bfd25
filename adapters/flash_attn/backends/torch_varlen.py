"""FlashAttention-2 as torch brings it, since 2.12: ``torch.nn.attention.varlen``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvpolicy.adapters.flash_attn.backends.append import append_
from kvpolicy.adapters.flash_attn.backends.base import Backend, Result, as_lengths
from kvpolicy.adapters.flash_attn.backends.engines import takes_splits
from kvpolicy.errors import UnsupportedError

__all__ = ["TorchVarlen"]

_FULL, _CAUSAL = (-1, -1), (-1, 0)  # how varlen_attn is told


@dataclass(frozen=True)
class TorchVarlen(Backend):
    """Attend with torch's own FlashAttention-2 kernels; torch's index writes append.

    Attributes:
        num_splits: parts into which the keys of a sequence are split; 1 gives every row the same
            result in every batch. None lets the kernel choose, which is faster for few long rows,
            and wrong with pages (pytorch/pytorch#194167), where it is refused.
    """

    name: ClassVar[str] = "torch"
    num_splits: int | None = 1

    @property
    def text(self) -> str:
        """Return ``"torch ... varlen"``."""
        return f"{super().text} varlen"

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
        b, t, heads, _ = q.shape
        if block_table is None:
            (keys, step), (values, other) = as_rows(k_cache), as_rows(v_cache)
            if step != other:
                raise UnsupportedError(
                    f"k_cache has strides {k_cache.stride()} and v_cache {v_cache.stride()}, and this kernel finds the "
                    "rows of both by one table; allocate them alike"
                )
            slots = k_cache.shape[1]
        else:
            keys, values = k_cache, v_cache
            step = slots = block_table.shape[1] * k_cache.shape[1]
        self._check_splits(block_table)
        lengths = as_lengths(cache_seqlens, q)
        if k is not None and v is not None:
            append_(k_cache, k, lengths, block_table)
            append_(v_cache, v, lengths, block_table)
            lengths = lengths + t
        rows = torch.arange(b + 1, dtype=torch.int32, device=q.device)
        out, lse = self._varlen(
            q.reshape(b * t, heads, -1), keys, values, rows * t, rows * step, lengths, t, slots, block_table,
            scale, causal, softcap, return_lse,
        )  # fmt: skip
        return out.view(b, t, heads, -1), None if lse is None else lse.view(heads, b, t).transpose(0, 1)

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
        from torch.nn.attention import varlen  # from torch 2.10 on

        self._check_splits(block_table)
        if block_table is not None and seqused_k is None:
            seqused_k = cu_seqlens_k.diff()  # with pages, lengths are read from nowhere else
        splits: dict[str, Any] = {"num_splits": self.num_splits} if takes_splits() else {}
        given = varlen.varlen_attn(
            q,
            k,
            v,
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            max_seqlen_k,
            return_aux=varlen.AuxRequest(lse=True) if return_lse else None,
            scale=scale,
            window_size=_CAUSAL if causal and max_seqlen_q > 1 else _FULL,
            enable_gqa=q.shape[-2] != k.shape[-2],
            seqused_k=seqused_k,
            block_table=block_table,
            **splits,
        )
        return (given[0], given[1]) if isinstance(given, tuple) else (given, None)

    def _check_splits(self, block_table: Tensor | None) -> None:
        if block_table is not None and self.num_splits != 1:
            raise UnsupportedError(
                f"num_splits={self.num_splits} with pages gives wrong results in torch's kernels; leave it at 1"
            )


def as_rows(cache: Tensor) -> tuple[Tensor, int]:
    """Return a dense cache ``[B, S, H, D]`` as rows ``[N, H, D]`` of the same memory.

    Args:
        cache: with any strides, if the step of a batch row is a multiple of the step of a slot:
            every cache in one piece is like that, transposed or not.

    Returns:
        The rows, and how many of them lie between two rows of the batch. In a cache that was
        transposed, the other heads of a batch row lie between.

    Raises:
        UnsupportedError: the steps do not divide.
    """
    b, s, h, d = cache.shape
    batch, slot, head, _ = cache.stride()
    if b == 1:
        return cache[0], s
    if not slot or batch % slot or (b - 1) * (batch // slot) + s >= 2**31:
        raise UnsupportedError(
            f"a cache with strides {cache.stride()}: the step of a batch row is no multiple of the step of a slot, or "
            "there are 2**31 slots or more; allocate it in one piece, or write backend='flash-attn'"
        )
    step = batch // slot
    return cache.as_strided(((b - 1) * step + s, h, d), (slot, head, 1)), step
