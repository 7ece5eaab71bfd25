"""What the owner of caches hands to :func:`evict_`, checked before anything is modified."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from kvpolicy.adapters import planning
from kvpolicy.adapters.flash_attn import arguments
from kvpolicy.adapters.flash_attn.cache import FlashCache
from kvpolicy.adapters.flash_attn.groups import ADAPTER
from kvpolicy.adapters.flash_attn.sharing import crossing, overlaps
from kvpolicy.adapters.flash_attn.state import EvictionState
from kvpolicy.errors import UsageError
from kvpolicy.host import insist, on_device
from kvpolicy.policy import EvictionPolicy

__all__ = ["caches", "check_lengths", "check_policy", "check_state", "tokens"]


def check_state(state: object, policy: object) -> None:
    """Refuse what is no state.

    Raises:
        UsageError: it is something else.
    """
    if isinstance(policy, EvictionState):
        _refuse("policy is an EvictionState: the order is evict_(k_cache, v_cache, cache_seqlens, policy, state)")
    if isinstance(state, FlashCache):
        _refuse("state is a FlashCache, which evicts from slots of its own in step(); make an EvictionState for yours")
    if not isinstance(state, EvictionState):
        _refuse(f"state is {state!r}: make one, EvictionState(policy, slots=..., ...), and give the same one each time")


def check_policy(policy: EvictionPolicy | Sequence[EvictionPolicy], state: EvictionState) -> None:
    """Refuse a policy that the state was not made with.

    Raises:
        BindError: it is no policy.
        UsageError: it is another one.
    """
    policies = tuple(policy) if isinstance(policy, Sequence) else (policy,) * state.batch_size
    if policies != state.policies:
        planning.checked(policy, ADAPTER)
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
    pair = crossing([*keys, *values])
    if pair is not None:
        names = [f"{name}[{i}]" if keys[1:] else name for name in ("k_cache", "v_cache") for i in range(len(keys))]
        one, other = (names[i] for i in pair)
        _refuse(
            f"{one} and {other} share memory, or lie between each other in no even way: an eviction in one would "
            "overwrite the other; give tensors apart, or views of equal strides, as both[..., 0, :, :] and "
            "both[..., 1, :, :]; nothing was modified"
        )
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
    if not isinstance(cache, Tensor | Sequence) or isinstance(cache, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        _refuse(f"{name} is {cache!r}; it is a tensor {layout}, a list of one a layer, or [L, ...]")
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
                f"{name} has shape {tuple(one.shape)}, and the state makes it {(*lead, *heads_last)}: {layout}; "
                + _instead(tuple(one.shape), (*lead, *heads_last))
            )
        arguments.check_kind(name, one, spec)
        if one.is_inference() and not torch.is_inference_mode_enabled():
            _refuse(f"{name} was made under torch.inference_mode(), and can be modified only there: call evict_ there")
    if any(overlaps(one) for one in ([cache] if isinstance(cache, Tensor) else layers)):
        _refuse(f"{name} has strides {layers[0].stride()}: several slots share memory; make it contiguous()")
    if whole and isinstance(cache, Tensor):
        rows_even = paged or cache.stride(0) == cache.shape[1] * cache.stride(1) or 1 in cache.shape[:2]
        return [cache] if rows_even else [one[None] for one in layers]
    return [one[None] for one in layers]


def _instead(found: tuple[int, ...], expected: tuple[int, ...]) -> str:
    """Return what to write where a cache has another shape than the state expects."""
    if found[2:] != expected[2:] and (found[1], found[3]) == expected[2:]:
        return "this is transformers' layout: give cache.transpose(1, 2)"
    if 0 in found:
        return "it has nothing in it"
    if found[2:] != expected[2:]:
        return "heads or their size are others: make the state with those of the cache"
    return f"make the state with batch_size={found[0]}, slots={found[1]}, or give block_table= if these are pages"


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
        what = "this forward pass" if any(state.seen) else "the prompt"
        _refuse(
            f"{what} needs {max(lengths)} slots of a row, and there are {spec.capacity}: make the caches and the state "
            "with more slots, or give a long prompt in several passes; nothing was modified"
        )
    if not isinstance(cache_seqlens, Tensor) or tuple(cache_seqlens.shape) != (state.batch_size,):  # pyright: ignore[reportUnnecessaryIsInstance]
        _refuse(f"cache_seqlens is {cache_seqlens!r}; it is int32 [B], here of {state.batch_size} rows")
    if cache_seqlens.dtype != torch.int32 or cache_seqlens.device != spec.device:
        _refuse(
            f"cache_seqlens is {cache_seqlens.dtype} on {cache_seqlens.device}; kernels read int32, here on "
            f"{spec.device}"
        )
    if overlaps(cache_seqlens):
        _refuse(
            f"cache_seqlens has strides {cache_seqlens.stride()}: rows share memory, and each one's length is written "
            "by itself; write cache_seqlens.contiguous()"
        )
    told = (
        f"not {list(lengths)}, which is what the state has counted, the new tokens among them: write "
        "cache_seqlens += 1 for each decoded token, and give tokens= where it is another number; nothing was modified"
    )
    right = (cache_seqlens == on_device(lengths, spec.device, torch.int32)).all()
    try:
        insist(right, UsageError(f"cache_seqlens is {told}"))
    except UsageError as error:  # the host knows already, and so what was found costs no wait
        raise UsageError(f"cache_seqlens is {cache_seqlens.tolist()}, {told}") from error


def _refuse(text: str) -> NoReturn:
    raise UsageError(text)
