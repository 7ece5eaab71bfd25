"""The attention functions that transformers calls while a model is bound."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

__all__ = ["CACHE", "SUPPORTED", "one_token", "register", "several_tokens", "turn"]

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
    if original != "sdpa" or kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        return function(module, query, key, value, additive(visible, query.dtype), **kwargs)
    b, heads, group = query.shape[0], key.shape[1], query.shape[1] // key.shape[1]
    # A group's query heads see the same slots: they are queries of one head, and no key is copied.
    out = F.scaled_dot_product_attention(
        query.view(b, heads, group, -1), key, value, attn_mask=visible, scale=kwargs.get("scaling")
    )
    return out.reshape(b, 1, heads * group, -1), None


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
        visible: ``[B, 1, 1, S_old]`` bool, the slots in use, or None where there are none.
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
    seen = torch.cat([visible.expand(-1, -1, width, -1), new], -1)
    whole = seen if original == "sdpa" else additive(seen, query.dtype)
    return function(module, query, key, value, whole, **kwargs)


def additive(visible: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return a bool mask as what eager attention adds to logits."""
    if visible is None:
        return None
    return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)
