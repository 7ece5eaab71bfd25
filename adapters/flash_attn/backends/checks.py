"""Checks of arguments: shapes at once, numbers on the device without waiting for it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NoReturn

import torch
from torch import Tensor

from kvpolicy.errors import UnsupportedError, UsageError

__all__ = ["aligned", "kvcache", "kvcache_lengths", "numbers", "refuse_unknown", "varlen", "varlen_lengths"]

_MOVED = "evictions move slots, so that a slot's place says nothing of its token's position"
_WRONG_HERE: Mapping[str, str] = {
    "rotary": f"the kernel would rotate by the length of the cache, which after an eviction is no position ({_MOVED}); "
    "rotate q and k by their positions before the call",
    "window": f"a window counts slots, and {_MOVED}; let a policy keep recent tokens (kvpolicy.Recency), or give "
    "layers with a window a cache of their own",
    "alibi": f"its bias counts slots, and {_MOVED}; there is no right way to pass it",
    "cache_leftpad": "pads never enter a slot; give every row its own length in cache_seqlens",
    "cache_batch_idx": "rows are not renamed; index the cache before the call",
    "softmax_scale": "it has another name here; write scale=",
    "return_softmax_lse": "it has another name here; write return_lse=",
    "num_splits": "the backend decides; for torch's kernels, give as the backend TorchVarlen(num_splits=...), from "
    "kvpolicy.adapters.flash_attn.backends.torch_varlen",
}


def refuse_unknown(unknown: Mapping[str, object], own: Mapping[str, str] | None = None) -> None:
    """Refuse arguments that the kernels may know and a compacted cache cannot have.

    Args:
        unknown: by their names.
        own: how names begin that the caller refuses with words of its own, and these words.

    Raises:
        UnsupportedError: rotary tables, windows, ALiBi and the like.
        TypeError: anything else.
    """
    for name in unknown:
        for word, why in {**_WRONG_HERE, **(own or {})}.items():
            if name.startswith(word):
                raise UnsupportedError(f"{name}= is not taken: {why}")
        raise TypeError(f"unexpected argument {name!r}")


def numbers(scale: float | None, softcap: float | None) -> None:
    """Refuse a scale that is not finite and a cap that is not positive."""
    if scale is not None and not math.isfinite(scale):
        raise UsageError(f"scale={scale}: write a finite number, or leave it out for head_dim ** -0.5")
    if softcap is not None and not 0 < softcap < math.inf:
        raise UsageError(f"softcap={softcap}: write a positive number, or None for none")


# Shapes


def aligned(tensors: Mapping[str, Tensor], step: int) -> None:
    """Refuse what kernels cannot read, which take ``step`` elements at once; the last dimension is contiguous.

    Raises:
        UsageError: a tensor begins elsewhere than at such a step, or goes on in others.
    """
    for name, tensor in tensors.items():
        if any(place % step for place in (tensor.storage_offset(), *tensor.stride()[:-1])):
            _refuse(
                f"{name} begins at element {tensor.storage_offset()} of its memory with strides {tensor.stride()}; "
                f"this kernel reads {step} elements at once, so all but the last are multiples of {step}: "
                "make it contiguous()"
            )


def kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    cache_seqlens: Tensor | int,
    block_table: Tensor | None,
) -> None:
    """Check shapes, dtypes, devices and strides of ``with_kvcache``; reads no value.

    Raises:
        UsageError: they do not fit each other.
    """
    layout = "[B, S, Hkv, D]" if block_table is None else "[blocks, page, Hkv, D]"
    _ranks({"q": (q, "[B, T, Hq, D]"), "k_cache": (k_cache, layout), "v_cache": (v_cache, layout)})
    _alike(q, {"k_cache": k_cache, "v_cache": v_cache})
    _heads(q, k_cache, v_cache, "k_cache", "v_cache")
    if block_table is None and k_cache.shape[0] != q.shape[0]:
        _refuse(
            f"k_cache has {k_cache.shape[0]} rows and q {q.shape[0]}; give every row of q its own, or a block_table"
        )
    _check_new(q, k_cache, v_cache, k, v)
    if isinstance(cache_seqlens, Tensor):
        _integers("cache_seqlens", cache_seqlens, (q.shape[0],), "[B]", q)
    elif isinstance(cache_seqlens, bool) or not isinstance(cache_seqlens, int):
        _refuse(f"cache_seqlens={cache_seqlens!r}: write a tensor [B] of int32, or one int for all rows")
    if block_table is not None:
        _table(block_table, q.shape[0], "[B, max_blocks]", q)


def _check_new(q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None, v: Tensor | None) -> None:
    if (k is None) != (v is None):
        _refuse(f"{'v' if k is None else 'k'} is given without {'k' if k is None else 'v'}; give both, or none")
    if k is None or v is None:
        return
    _ranks({"k": (k, "[B, T, Hkv, D]"), "v": (v, "[B, T, Hkv, Dv]")})
    _alike(q, {"k": k, "v": v})
    for name, new, cache in (("k", k, k_cache), ("v", v, v_cache)):
        wanted = (*q.shape[:2], *cache.shape[2:])
        if tuple(new.shape) != wanted:
            _refuse(f"{name} has shape {tuple(new.shape)}, and q with {name}_cache make it {wanted}")
        if any(stride == 0 and size > 1 for stride, size in zip(cache.stride(), cache.shape, strict=True)):
            _refuse(f"{name}_cache is expanded: several slots share memory and cannot be written; make it contiguous()")


def varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    seqused_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    block_table: Tensor | None,
) -> None:
    """Check shapes, dtypes, devices and strides of ``varlen``; reads no value.

    Raises:
        UsageError: they do not fit each other.
    """
    layout = "[total_k, Hkv, D]" if block_table is None else "[blocks, page, Hkv, D]"
    _ranks({"q": (q, "[total_q, Hq, D]"), "k": (k, layout), "v": (v, layout)})
    _alike(q, {"k": k, "v": v})
    _heads(q, k, v, "k", "v")
    if not isinstance(cu_seqlens_q, Tensor) or cu_seqlens_q.dim() != 1 or len(cu_seqlens_q) < 2:
        _refuse("cu_seqlens_q is [N + 1], where each sequence begins and where the last one ends")
    count = len(cu_seqlens_q) - 1
    _integers("cu_seqlens_q", cu_seqlens_q, (count + 1,), "[N + 1]", q)
    _integers("cu_seqlens_k", cu_seqlens_k, (count + 1,), "[N + 1]", q)
    if seqused_k is not None:
        _integers("seqused_k", seqused_k, (count,), "[N]", q)
    if block_table is not None:
        _table(block_table, count, "[N, max_blocks]", q)
    for name, value in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            _refuse(f"{name}={value!r}: write a positive int; a tensor would have to be waited for")


def _ranks(tensors: Mapping[str, tuple[Tensor, str]]) -> None:
    for name, (tensor, layout) in tensors.items():
        if not isinstance(tensor, Tensor):
            _refuse(f"{name} is a {type(tensor).__name__}; it is a tensor {layout}")
        if tensor.dim() != layout.count(",") + 1:
            _refuse(f"{name} has shape {tuple(tensor.shape)}; it is {layout}")
        if tensor.numel() == 0:
            _refuse(f"{name} has shape {tuple(tensor.shape)}, and so nothing in it")
        if tensor.stride(-1) != 1:
            _refuse(f"{name} has strides {tensor.stride()}; its last must be 1: transpose another pair of dimensions")
        if torch.is_grad_enabled() and tensor.requires_grad:
            _refuse(f"{name} requires a gradient, and caches have none: call under torch.no_grad()")


def _alike(q: Tensor, others: Mapping[str, Tensor]) -> None:
    if not q.dtype.is_floating_point:
        _refuse(f"q is {q.dtype}; it is floating-point")
    for name, tensor in others.items():
        if tensor.dtype != q.dtype:
            _refuse(f"{name} is {tensor.dtype} and q {q.dtype}; convert one of them")
        if tensor.device != q.device:
            _refuse(f"{name} is on {tensor.device} and q on {q.device}; move one of them")


def _heads(q: Tensor, keys: Tensor, values: Tensor, k_name: str, v_name: str) -> None:
    if values.shape[:-1] != keys.shape[:-1]:
        _refuse(f"{v_name} has shape {tuple(values.shape)} and {k_name} {tuple(keys.shape)}; only the last may differ")
    if keys.shape[-1] != q.shape[-1]:
        _refuse(f"{k_name} has head_dim {keys.shape[-1]} and q {q.shape[-1]}")
    if q.shape[-2] % keys.shape[-2]:
        _refuse(f"q has {q.shape[-2]} heads, no multiple of the {keys.shape[-2]} heads of {k_name}")


def _table(table: Tensor, rows: int, layout: str, q: Tensor) -> None:
    if not isinstance(table, Tensor) or table.dim() != 2 or table.shape[1] < 1:
        _refuse(f"block_table is {layout}, int32")
    _integers("block_table", table, (rows, table.shape[1]), layout, q)


def _integers(name: str, tensor: Tensor, shape: tuple[int, ...], layout: str, q: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        _refuse(f"{name} is a {type(tensor).__name__}; it is an int32 tensor {layout}")
    if tuple(tensor.shape) != shape:
        _refuse(f"{name} has shape {tuple(tensor.shape)}; it is {layout}, here {shape}")
    if tensor.dtype != torch.int32:
        _refuse(f"{name} is {tensor.dtype}; kernels read int32: write {name}.to(torch.int32)")
    if tensor.device != q.device:
        _refuse(f"{name} is on {tensor.device} and q on {q.device}; move it")
    if tensor.stride(-1) != 1:
        _refuse(
            f"{name} has strides {tensor.stride()}; kernels read its last dimension without gaps: make it contiguous()"
        )


# Values


def kvcache_lengths(cache_seqlens: Tensor | int, new: int, k_cache: Tensor, block_table: Tensor | None) -> None:
    """Check that rows with their new tokens fit, and that their pages exist; waits for no device.

    Raises:
        UsageError: they do not. On a GPU, the device stops instead, with this text.
    """
    slots = k_cache.shape[1] if block_table is None else block_table.shape[1] * k_cache.shape[1]
    fits = f"the lengths in cache_seqlens, with {new} new tokens, are not all from 0 to the {slots} slots of a row"
    after = cache_seqlens + new
    if isinstance(after, int):
        if not new <= after <= slots:
            _refuse(f"{fits}: cache_seqlens={cache_seqlens}; evict, or allocate more")
    else:
        _insist((after >= new) & (after <= slots), f"{fits}; evict, or allocate more")
    if block_table is not None:
        _insist_pages(block_table, after, k_cache)


def varlen_lengths(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    seqused_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    block_table: Tensor | None,
) -> None:
    """Check that sequences lie within their tensors and are no longer than was said; waits for no device.

    Raises:
        UsageError: they do not. On a GPU, the device stops instead, with this text.
    """
    queries = cu_seqlens_q.diff()
    _insist(
        (cu_seqlens_q[0] == 0) & (cu_seqlens_q[-1] == len(q)) & (queries >= 0) & (queries <= max_seqlen_q),
        f"cu_seqlens_q does not ascend from 0 to the {len(q)} queries, or has a sequence of more than "
        f"max_seqlen_q={max_seqlen_q}",
    )
    used = cu_seqlens_k.diff() if seqused_k is None else seqused_k
    _insist(
        (used >= 0) & (used <= max_seqlen_k),
        f"a sequence has fewer than 0 keys, or more than max_seqlen_k={max_seqlen_k}",
    )
    if block_table is None:
        first = cu_seqlens_k[:-1]
        _insist((first >= 0) & (first + used <= len(k)), f"a sequence of cu_seqlens_k leaves the {len(k)} rows of k")
    else:
        slots = block_table.shape[1] * k.shape[1]
        _insist(used <= slots, f"a sequence has more keys than the {slots} slots of its pages")
        _insist_pages(block_table, used, k)


def _insist_pages(table: Tensor, lengths: Tensor | int, cache: Tensor) -> None:
    """Insist that pages in use exist; the table holds anything behind them."""
    blocks, page = cache.shape[:2]
    first = torch.arange(table.shape[1], device=table.device) * page
    in_use = first < lengths if isinstance(lengths, int) else first < lengths[:, None]
    _insist(~in_use | ((table >= 0) & (table < blocks)), f"block_table names a page that is none of the {blocks}")


def _insist(right: Tensor, text: str) -> None:
    if right.device.type != "cpu":
        torch._assert_async(right.all(), text)  # pyright: ignore[reportPrivateImportUsage]
    elif not bool(right.all()):
        _refuse(text)


def _refuse(text: str) -> NoReturn:
    raise UsageError(text)
