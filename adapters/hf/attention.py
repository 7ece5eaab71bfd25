"""The attention functions that transformers calls while a model is bound."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvpolicy.adapters.flash_attn.backends import Backend, select_backend
from kvpolicy.adapters.flash_attn.by_head import NEEDS, attend_decoded
from kvpolicy.eviction import LogitSpec
from kvpolicy.host import sent
from kvpolicy.ragged import RaggedStore

__all__ = ["CACHE", "SUPPORTED", "by_head", "one_token", "register", "seen", "seen_slots", "several_tokens", "turn"]

CACHE = "kvpolicy_cache"  #: the keyword under which a forward pass hands its cache to the attention function
SUPPORTED = ("sdpa", "eager")  #: what evicting layers can stand in for

AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]


def register(original: str) -> str:
    """Register an attention and a mask function that stand in for ``original``; return their name.

    With an ordinary cache, or none, they are what they stand in for. Registering again is
    harmless, and nothing that exists is replaced.
    """
    name = "kvpolicy" if original == "sdpa" else f"kvpolicy_{original}"

    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        cache = kwargs.pop(CACHE, None)
        function = _function(original, module)
        if cache is None or not cache.holds(module.layer_idx):
            return function(module, query, key, value, mask, **kwargs)
        return cache.attend(module, function, original, query, key, value, mask, **kwargs)

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[original])
    return name


def _function(original: str, module: nn.Module) -> AttentionFunction:
    if original in ALL_ATTENTION_FUNCTIONS:
        return ALL_ATTENTION_FUNCTIONS[original]
    # Eager attention is not registered: each modelling file has its own.
    return sys.modules[type(module).__module__].eager_attention_forward


def one_token(
    module: nn.Module,
    function: AttentionFunction,
    original: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor | None,
    **kwargs: Any,
) -> Any:
    """Attend one new token to the slots in use.

    Args:
        module: the attention module.
        function: what the model used before it was bound.
        original: its name.
        query: ``[B, Hq, 1, D]``.
        key: ``[B, H, S, D]``.
        value: ``[B, H, S, Dv]``.
        visible: ``[B, 1, 1, S]`` bool, or None where every slot is.
        **kwargs: what transformers passed.

    Returns:
        ``[B, 1, Hq, Dv]``, and None or the weights.
    """
    if original != "sdpa" or not plain(kwargs):
        return function(module, query, key, value, additive(visible, query.dtype), **kwargs)
    b, heads, group = query.shape[0], key.shape[1], query.shape[1] // key.shape[1]
    # A group's query heads see the same slots: they are queries of one head, and no key is copied.
    out = F.scaled_dot_product_attention(
        query.view(b, heads, group, -1), key, value, attn_mask=visible, scale=kwargs.get("scaling")
    )
    return out.reshape(b, 1, heads * group, -1), None


def by_head(
    module: nn.Module,
    function: AttentionFunction,
    original: str,
    query: Tensor,
    store: RaggedStore,
    index: int,
    **kwargs: Any,
) -> Any:
    """Attend decoded tokens to heads that have slots of different numbers.

    One token is attended to where each head's slots lie. Where more than that is asked of attention, the slots
    of one layer are gathered for the time of the call.

    Args:
        module: the attention module.
        function: what the model used before it was bound.
        original: its name.
        query: ``[B, Hq, T, D]``.
        store: holds the new tokens, too.
        index: the layer, counted within the store.
        **kwargs: what transformers passed.
    """
    if query.shape[2] > 1 or original != "sdpa" or not plain(kwargs):
        key, value = store.in_use(index, query.shape[2])
        visible = seen_slots(store, index, query.shape[2])
        return several_tokens(module, function, original, query, key, value, visible, **kwargs)
    return ragged_attention(query, store, index, kwargs.get("scaling")), None


def seen(lengths: Tensor, longest: int, new: int) -> Tensor:
    """Return which slots new tokens see, ``[requests, heads, tokens, slots]``, given ``[requests, heads]`` in use.

    Each decoded token sees those before it and itself; how a turn sees itself is transformers' mask.
    """
    slots = torch.arange(longest + new, device=lengths.device)
    stop = lengths[..., None] + torch.arange(1, new + 1, device=slots.device) if new else lengths[..., None]
    return slots < stop[..., None]


def seen_slots(store: RaggedStore, index: int, new: int) -> Tensor:
    """Return :func:`seen` of a layer whose heads differ, for each query head."""
    lengths = sent(store.lengths()[store.rows_of(index)], store.spec.device)
    shared = store.spec.num_query_heads // store.spec.num_heads
    return seen(lengths.repeat_interleave(shared, 1), store.longest_in(index), new)


def ragged_attention(query: Tensor, store: RaggedStore, index: int, scale: float | None) -> Tensor:
    """Attend one token of each row, ``[B, Hq, 1, D]``, head by head; return ``[B, 1, Hq, Dv]``."""
    kernel = _kernel(query.device, query.dtype, query.shape[-1])
    if kernel is not None:
        logits = LogitSpec(scaling=query.shape[-1] ** -0.5 if scale is None else scale)
        return attend_decoded(kernel, store, index, query.transpose(1, 2), logits, lse=False)[0]
    heads = [
        F.scaled_dot_product_attention(asked[None, None], keys[None, None], values[None, None], scale=scale)[0, 0]
        for row, held in zip(query.unflatten(1, (store.spec.num_heads, -1)), store.heads_of(index), strict=True)
        for asked, (keys, values) in zip(row[:, :, 0], held, strict=True)
    ]
    return torch.cat(heads).view(query.shape[0], 1, query.shape[1], -1)


@functools.cache
def _kernel(device: torch.device, dtype: torch.dtype, head_dim: int) -> Backend | None:
    """Return what attends to all heads in one call; on the CPU None, where a call a head costs less."""
    if device.type == "cpu":
        return None
    found = select_backend("auto", device=device, dtype=dtype, head_dim=head_dim, needs=NEEDS)
    return replace(found, check_lengths=False)  # they are counted by the store


def plain(kwargs: Mapping[str, Any]) -> bool:
    """Return whether attention is softmax alone: no cap of its logits, and no sinks."""
    return kwargs.get("softcap") is None and kwargs.get("s_aux") is None


def several_tokens(
    module: nn.Module,
    function: AttentionFunction,
    original: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor | None,
    **kwargs: Any,
) -> Any:
    """Attend several decoded tokens to the slots in use, which hold them too.

    Args:
        module: the attention module.
        function: what the model used before it was bound.
        original: its name.
        query: ``[B, Hq, T, D]``.
        key: ``[B, H, S, D]``.
        value: ``[B, H, S, Dv]``.
        visible: ``[B, 1, T, S]`` bool.
        **kwargs: what transformers passed.
    """
    mask = visible if original == "sdpa" else additive(visible, query.dtype)
    return function(module, query, key, value, mask, **kwargs)


def turn(
    module: nn.Module,
    function: AttentionFunction,
    original: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor | None,
    mask: Tensor | None,
    **kwargs: Any,
) -> Any:
    """Attend a turn to the slots in use before it and to itself.

    Args:
        module: the attention module.
        function: what the model used before it was bound.
        original: its name.
        query: ``[B, Hq, T, D]``.
        key: ``[B, H, S_old + T, D]``.
        value: ``[B, H, S_old + T, Dv]``.
        visible: ``[B, 1, 1, S_old]`` bool, the slots in use, or None where there are none; query heads for 1 where
            they differ.
        mask: ``[B, 1, T, T]``, what transformers made for the new tokens, or None for causal.
        **kwargs: what transformers passed.
    """
    if visible is None:
        return function(module, query, key, value, mask, **kwargs)
    b, width = query.shape[0], query.shape[2]
    if mask is None:
        new = torch.ones(width, width, dtype=torch.bool, device=query.device).tril().expand(b, 1, -1, -1)
    else:
        new = mask if mask.dtype == torch.bool else mask >= 0
    seen = torch.cat([visible.expand(-1, -1, width, -1), new.expand(-1, visible.shape[1], -1, -1)], -1)
    whole = seen if original == "sdpa" else additive(seen, query.dtype)
    return function(module, query, key, value, whole, **kwargs)


def additive(visible: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return a bool mask as what eager attention adds to logits."""
    if visible is None:
        return None
    return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)
