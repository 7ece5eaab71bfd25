"""What every backend is: :class:`Backend`. It checks; its subclasses call kernels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvpolicy.adapters.flash_attn.backends import checks
from kvpolicy.adapters.flash_attn.backends.engines import installed
from kvpolicy.adapters.flash_attn.backends.features import TABLE, Request, lacking
from kvpolicy.errors import UnsupportedError

__all__ = ["Backend", "Result"]

Result = tuple[Tensor, Tensor | None]  #: what was attended, and the log-sum-exp where it was asked for


@dataclass(frozen=True)
class Backend(ABC):
    """Attend to caches that belong to the caller, with FlashAttention-2's layouts and semantics.

    For inference: there are no gradients. Nothing waits for the device. Arguments are checked
    before anything is written.

    Attributes:
        check_lengths: whether lengths, page numbers and offsets are checked at every call: on a
            GPU by kernels that nobody waits for. A caller whose layers share these tensors
            checks them in one layer, and leaves it out in the others
            (``dataclasses.replace(backend, check_lengths=False)``).
    """

    name: ClassVar[str]
    check_lengths: bool = True

    @property
    def text(self) -> str:
        """Return the backend with its version, as receipts print it: ``"torch 2.13.0 varlen"``."""
        return f"{TABLE[self.name].engine} {installed(TABLE[self.name].engine).version}"

    def with_kvcache(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        k: Tensor | None = None,
        v: Tensor | None = None,
        *,
        cache_seqlens: Tensor | int,
        block_table: Tensor | None = None,
        scale: float | None = None,
        causal: bool = True,
        softcap: float | None = None,
        return_lse: bool = False,
        **unknown: object,
    ) -> Any:
        """Write new keys and values behind those in the cache, and attend to all of them.

        Query head ``i`` reads KV head ``i // (Hq // Hkv)``. The last query sees every key, the
        one before it all but the last, and so on, if ``causal``.

        Modifies ``k_cache`` and ``v_cache`` in place if ``k`` and ``v`` are given.

        Args:
            q: ``[B, T, Hq, D]``.
            k_cache: ``[B, S, Hkv, D]`` with any strides whose last is 1, or pages
                ``[blocks, page, Hkv, D]``.
            v_cache: the same, with ``Dv`` in place of ``D``.
            k: ``[B, T, Hkv, D]``, already rotated, or None where there is nothing new.
            v: ``[B, T, Hkv, Dv]``, or None.
            cache_seqlens: ``[B]`` int32, the keys of each row before this call, or their number
                where it is the same in every row; read, and not changed.
            block_table: ``[B, max_blocks]`` int32, the pages of each row, in order.
            scale: of logits; ``D ** -0.5`` by default.
            causal: whether a query sees nothing behind its own place.
            softcap: logits become ``softcap * tanh(logits / softcap)``; None leaves them.
            return_lse: whether to return the log-sum-exp of the logits, too.
            **unknown: is refused; rotary tables, windows and ALiBi are wrong once slots have moved.

        Returns:
            ``[B, T, Hq, Dv]``, or a pair of it and ``[B, Hq, T]`` float32 (float64 for float64).
            A query that sees no key has zeros, and a log-sum-exp of plus infinity, so that
            ``exp(logit - lse)`` is 0.

        Raises:
            UsageError: tensors that do not fit each other, or lengths beyond the cache; nothing
                was written. On a GPU, such lengths stop the device instead.
            UnsupportedError: something that these kernels cannot do.
        """
        checks.refuse_unknown(unknown)
        checks.kvcache(q, k_cache, v_cache, k, v, cache_seqlens, block_table)
        checks.numbers(scale, softcap)
        page = None if block_table is None else k_cache.shape[1]
        needs = {"dense" if page is None else "paged"}
        if isinstance(cache_seqlens, Tensor):
            needs.add("row_lengths")
        self._insist(q, v_cache, needs, page, softcap, return_lse)
        given = {"q": q, "k_cache": k_cache, "v_cache": v_cache}
        checks.aligned(given if k is None or v is None else {**given, "k": k, "v": v}, TABLE[self.name].align)
        if self.check_lengths:
            checks.kvcache_lengths(cache_seqlens, 0 if k is None else k.shape[1], k_cache, block_table)
        factor: float = q.shape[-1] ** -0.5 if scale is None else scale
        out, lse = self._with_kvcache(
            q, k_cache, v_cache, k, v, cache_seqlens, block_table, factor, causal, softcap, return_lse
        )
        return (out, lse) if return_lse else out

    def varlen(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        seqused_k: Tensor | None = None,
        max_seqlen_q: int,
        max_seqlen_k: int,
        block_table: Tensor | None = None,
        scale: float | None = None,
        causal: bool,
        softcap: float | None = None,
        return_lse: bool = False,
        **unknown: object,
    ) -> Any:
        """Attend sequences that lie behind each other; modifies nothing.

        With ``seqused_k``, sequence ``i`` has the keys ``k[cu_seqlens_k[i] : cu_seqlens_k[i] +
        seqused_k[i]]``, and slots behind them are a gap. So a layer whose heads have their own
        lengths is attended: each KV head of each row is a sequence of one KV head.

        Args:
            q: ``[total_q, Hq, D]``.
            k: ``[total_k, Hkv, D]`` with any strides whose last is 1, or pages
                ``[blocks, page, Hkv, D]``.
            v: the same, with ``Dv`` in place of ``D``.
            cu_seqlens_q: ``[N + 1]`` int32, where each sequence of queries begins, and the end.
            cu_seqlens_k: ``[N + 1]`` int32, the same for keys; with pages, only differences count.
            seqused_k: ``[N]`` int32, the keys of each sequence, or None for all up to the next one.
            max_seqlen_q: no sequence has more queries.
            max_seqlen_k: no sequence has more keys.
            block_table: ``[N, max_blocks]`` int32, the pages of each sequence, in order.
            scale: of logits; ``D ** -0.5`` by default.
            causal: as in :meth:`with_kvcache`.
            softcap: as in :meth:`with_kvcache`.
            return_lse: whether to return the log-sum-exp of the logits, too.
            **unknown: is refused.

        Returns:
            ``[total_q, Hq, Dv]``, or a pair of it and ``[Hq, total_q]``; see :meth:`with_kvcache`.

        Raises:
            UsageError: tensors that do not fit each other, or lengths beyond them.
            UnsupportedError: something that these kernels cannot do.
        """
        checks.refuse_unknown(unknown)
        checks.varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, max_seqlen_q, max_seqlen_k, block_table)
        checks.numbers(scale, softcap)
        page = None if block_table is None else k.shape[1]
        needs = {"varlen"} if page is None else {"varlen", "paged"}
        if seqused_k is not None:
            needs.add("head_lengths")
        self._insist(q, v, needs, page, softcap, return_lse)
        checks.aligned({"q": q, "k": k, "v": v}, TABLE[self.name].align)
        if self.check_lengths:
            checks.varlen_lengths(q, k, cu_seqlens_q, cu_seqlens_k, seqused_k, max_seqlen_q, max_seqlen_k, block_table)
        factor: float = q.shape[-1] ** -0.5 if scale is None else scale
        out, lse = self._varlen(
            q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, max_seqlen_q, max_seqlen_k, block_table,
            factor, causal, softcap, return_lse,
        )  # fmt: skip
        return (out, lse) if return_lse else out

    def _insist(
        self, q: Tensor, v: Tensor, needs: set[str], page: int | None, softcap: float | None, return_lse: bool
    ) -> None:
        if return_lse:
            needs.add("lse")
        if softcap is not None:
            needs.add("softcap")
        if v.shape[-1] != q.shape[-1]:
            needs.add("value_dim")
        request = Request(q.device, q.dtype, q.shape[-1], needs, page)
        missing = lacking(TABLE[self.name], installed(TABLE[self.name].engine), request)
        if missing:
            raise UnsupportedError(
                f"backend {self.name!r} cannot serve {request}: {', '.join(missing)}; "
                "select_backend('auto', ...) with these needs says which one can"
            )

    @abstractmethod
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
        """Do what :meth:`with_kvcache` promises; every argument has been checked."""

    @abstractmethod
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
        """Do what :meth:`varlen` promises; every argument has been checked."""


def as_lengths(lengths: Tensor | int, like: Tensor) -> Tensor:
    """Return lengths as ``[B]`` int32, for the rows of ``like``."""
    if isinstance(lengths, Tensor):
        return lengths
    return torch.full((like.shape[0],), lengths, dtype=torch.int32, device=like.device)
