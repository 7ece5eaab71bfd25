"""What the owner of caches hands to :func:`evict_`, checked before anything is modified."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from kvpolicy.adapters.flash_attn import arguments
from kvpolicy.adapters.flash_attn.state import EvictionState
from kvpolicy.errors import UsageError
from kvpolicy.host import insist, on_device
from kvpolicy.policy import EvictionPolicy

__all__ = ["caches", "check_lengths", "check_policy", "tokens"]


def check_policy(policy: EvictionPolicy | Sequence[EvictionPolicy], state: EvictionState) -> None:
    """Refuse a policy that the state was not made with.

    Raises:
        UsageError: it is another one.
    """
    policies = tuple(policy) if isinstance(policy, Sequence) else (policy,) * state.batch_size
    if policies != state.policies:
        _refuse(f"the state remembers for {state.policies[0]!r}, and evict_ was given {policy!r}: make a new state")


def caches(
    k_cache: Tensor | Sequence[Tensor], v_cache: Tensor | Sequence[Tensor], state: EvictionState, *, paged: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """Return keys and values as pieces ``[l, B, S, H, D]`` or ``[l, blocks, page, H, D]``: views of the same memory.

    One piece where all layers are in one tensor whose rows follow each other evenly, else one a layer.

    Raises:
        UsageError: shapes, dtypes, devices or strides that do not fit, or slots that share memory.
    """
    spec, count = state.store.spec, state.num_layers
    pieces = [
        _pieces(name, cache, count, heads_last=(spec.num_heads, dim), state=state, paged=paged)
        for name, cache, dim in (("k_cache", k_cache, spec.head_dim), ("v_cache", v_cache, spec.value_dim))
    ]
    keys, values = pieces
    if len(keys) != len(values):  # one of them can be one piece, the other cannot
        keys, values = ([one[None] for piece in given for one in piece] for given in (keys, values))
    for k, v in zip(keys, values, strict=True):
        if k.shape[:-1] != v.shape[:-1]:
            _refuse(
                f"v_cache has shape {tuple(v.shape[1:])} and k_cache {tuple(k.shape[1:])}; only the last may differ"
            )
        if k.shape != keys[0].shape:
            _refuse(f"a layer's k_cache has shape {tuple(k.shape[1:])}, and another one's {tuple(keys[0].shape[1:])}")
    starts = [t.data_ptr() for t in (*keys, *values)]
    if len(set(starts)) < len(starts):
        _refuse("two of the caches begin at the same address: every layer has keys of its own, and values of its own")
    return keys, values


def _pieces(
    name: str,
    cache: Tensor | Sequence[Tensor],
    count: int,
    *,
    heads_last: tuple[int, int],
    state: EvictionState,
    paged: bool,
) -> list[Tensor]:
    layout = "[blocks, page, Hkv, D]" if paged else "[B, S, Hkv, D]"
    whole = isinstance(cache, Tensor) and cache.dim() == 5
    layers = [cache] if isinstance(cache, Tensor) and not whole else list(cache)
    if len(layers) != count:
        _refuse(
            f"{name} has {len(layers)} layers, and the state was made for {count}: give them all, as a list or in one"
        )
    spec = state.store.spec
    for one in layers:
        if not isinstance(one, Tensor) or one.dim() != 4:  # pyright: ignore[reportUnnecessaryIsInstance]
            shape = tuple(one.shape) if isinstance(one, Tensor) else repr(one)  # pyright: ignore[reportUnnecessaryIsInstance]
            _refuse(f"a layer of {name} is {shape}; it is a tensor {layout}, a list of one a layer, or [L, ...]")
        lead = tuple(one.shape[:2]) if paged else (state.batch_size, spec.capacity)
        if tuple(one.shape) != (*lead, *heads_last) or one.shape[0] == 0 or one.shape[1] == 0:
            _refuse(
                f"{name} has shape {tuple(one.shape)}, and the state makes it {(*lead, *heads_last)}: {layout}; for "
                "transformers' layout give cache.transpose(1, 2)"
            )
        arguments.check_kind(name, one, spec)
        if one.is_inference() and not torch.is_inference_mode_enabled():
            _refuse(f"{name} was made under torch.inference_mode(), and can be modified only there: call evict_ there")
    if any(_overlaps(one) for one in ([cache] if isinstance(cache, Tensor) else layers)):
        _refuse(f"{name} has strides {layers[0].stride()}: several slots share memory; make it contiguous()")
    if whole and isinstance(cache, Tensor):
        rows_even = paged or cache.stride(0) == cache.shape[1] * cache.stride(1) or 1 in cache.shape[:2]
        return [cache] if rows_even else [one[None] for one in layers]
    return [one[None] for one in layers]


def _overlaps(tensor: Tensor) -> bool:
    """Return whether two elements may share memory: no axis may begin anew before the smaller ones have ended."""
    end = 0
    for stride, size in sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= end:
                return True
            end += stride * (size - 1)
    return False


def tokens(given: int | Sequence[int] | None, state: EvictionState) -> list[int]:
    """Return the new tokens of each row, all 0 where the policy is only to see queries.

    Raises:
        UsageError: they are no counts, others than were observed, or a layer was not observed.
    """
    observed, rows = state.counts, state.batch_size
    if given is None:
        counts = observed or [1] * rows
    elif isinstance(given, int) and not isinstance(given, bool):
        counts = [given] * rows
    else:
        counts = arguments.host_integers("tokens", given, rows)
    if min(counts) < 0 or (any(counts) and not all(counts)):
        _refuse(f"tokens={counts}: every row has new tokens, or none has any")
    if not any(counts):
        if observed is not None:
            _refuse("tokens=0 comes before a turn, and queries of new tokens were observed already")
        if not all(state.seen):
            _refuse("tokens=0, and no token has been seen yet: there is nothing to look at")
        return counts
    if observed is not None and counts != observed:
        _refuse(f"tokens={counts}, and queries of {observed} tokens were observed in this forward pass")
    missing = set(range(state.num_layers)) - state.observed
    if state.asks_queries and missing:
        _refuse(
            f"the policy asks queries, and those of layer {min(missing)} are not known: call state.observe(layer, q) "
            "in every layer of each forward pass"
        )
    return counts


def check_lengths(cache_seqlens: Tensor, lengths: Sequence[int], state: EvictionState) -> None:
    """Refuse lengths that are not those that the state has counted, or beyond the cache.

    Raises:
        UsageError: they are not; on a GPU, the device stops where ``cache_seqlens`` holds other numbers.
    """
    spec = state.store.spec
    if max(lengths) > spec.capacity:
        _refuse(
            f"a row has {max(lengths)} tokens, and there are {spec.capacity} slots: it was not evicted when it was due"
        )
    if not isinstance(cache_seqlens, Tensor) or tuple(cache_seqlens.shape) != (state.batch_size,):  # pyright: ignore[reportUnnecessaryIsInstance]
        _refuse(f"cache_seqlens is {cache_seqlens!r}; it is int32 [B], here of {state.batch_size} rows")
    if cache_seqlens.dtype != torch.int32 or cache_seqlens.device != spec.device:
        _refuse(
            f"cache_seqlens is {cache_seqlens.dtype} on {cache_seqlens.device}; kernels read int32, here on "
            f"{spec.device}"
        )
    error = UsageError(
        f"cache_seqlens is not {list(lengths)}, which is what the state has counted, the new tokens among them: write "
        "cache_seqlens += 1 for each decoded token, and give tokens= where it is another number; nothing was modified"
    )
    insist((cache_seqlens == on_device(lengths, spec.device, torch.int32)).all(), error)


def _refuse(text: str) -> NoReturn:
    raise UsageError(text)
