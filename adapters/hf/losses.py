"""What attention loses where tokens have been evicted: :func:`losses`, measured on the full cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from kvpolicy.receipt import Receipt

__all__ = ["Losses", "losses", "survival"]

ROUNDING = 0.02  #: weights in bfloat16 add up to 1 within this


@dataclass(frozen=True, eq=False)
class Losses:
    """Hold what the last queries of a text lose by what a policy has evicted.

    Attributes:
        layers: the layers that evict.
        mass: ``[requests, layers]`` float32, the share of the full cache's attention that goes to
            evicted tokens, a mean over queries and heads.
        output: ``[requests, layers]`` float32, how far attention over the kept tokens is from attention
            over all, relative to the latter's length, a mean over queries and heads.
    """

    layers: tuple[int, ...]
    mass: Tensor
    output: Tensor


@torch.no_grad()
def losses(
    model: PreTrainedModel, full: DynamicCache, tokens: Tensor, first: int, kept: Sequence[Receipt]
) -> list[Losses]:
    """Ask the last tokens of a text, in the full model, what each of some kept sets would have cost them.

    Each layer is asked by itself, with the inputs that it has in the full model: errors of lower
    layers do not add up.

    Args:
        model: as it was made, bound to no cache.
        full: holds the text before ``first``; it is fed the rest.
        tokens: ``[requests, columns]``, without pads.
        first: the first of the last columns.
        kept: what was held when ``first`` was fed.
    """
    stop = tokens.shape[1] - 1
    attends = model.config._attn_implementation
    model.set_attn_implementation("eager")  # the one that says what it attends to
    try:
        attention = model(
            input_ids=tokens[:, first:stop], past_key_values=full, output_attentions=True, logits_to_keep=1
        ).attentions
    finally:
        model.set_attn_implementation(attends)
    cache: Any = full
    which = _attending(model, len(attention))
    found: list[Losses] = []
    for receipt in kept:
        both = [_lost(attention[which[i]], cache.layers[i].values, receipt.positions(i), first) for i in receipt.layers]
        found.append(
            Losses(receipt.layers, torch.stack([mass for mass, _ in both], 1), torch.stack([out for _, out in both], 1))
        )
    return found


def _attending(model: PreTrainedModel, count: int) -> dict[int, int]:
    """Return which of ``count`` attentions belongs to which layer: layers of other kinds have none."""
    config = model.config.get_text_config(decoder=True)
    kinds = getattr(config, "layer_types", None) or ["attention"] * count
    layers = range(len(kinds)) if len(kinds) == count else [i for i, kind in enumerate(kinds) if _attends(kind)]
    return dict(zip(layers, range(count), strict=True))


def _attends(kind: str) -> bool:
    return "attention" in kind and not kind.startswith("linear")


def _lost(attention: Tensor, values: Tensor, kept: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """Return ``[requests]`` mass and relative error of one layer.

    Args:
        attention: ``[requests, query heads, queries, tokens]``.
        values: ``[requests, heads, tokens, width]``.
        kept: ``[requests, heads, slots]`` positions below ``first``, -1 where there is none.
        first: tokens from here on are new, and there.
    """
    rows, query_heads, queries, count = attention.shape
    heads = values.shape[1]
    there = held(kept, count).to(attention.device)
    there[..., first:] = True
    weights = attention.float().view(rows, heads, query_heads // heads, queries, count)
    left = weights * there[:, :, None, None]
    total, kept_share = weights.sum(-1, keepdim=True), left.sum(-1, keepdim=True)
    # What is missing from 1 is the share of a sink logit; a little of it is the rounding of the weights.
    sink = (1 - total) * (total < 1 - ROUNDING)
    lost = (total - kept_share).clamp(min=0)
    whole = weights @ values.float()[:, :, None]
    apart = (left / (kept_share + sink).clamp(min=1e-9)) @ values.float()[:, :, None] - whole
    error = apart.norm(dim=-1) / whole.norm(dim=-1).clamp(min=1e-9)
    return lost.mean((1, 2, 3, 4)).cpu(), error.mean((1, 2, 3)).cpu()


def held(kept: Tensor, count: int) -> Tensor:
    """Return ``[requests, heads, count]`` bool, which of the first tokens a head holds.

    >>> held(torch.tensor([[[0, 2, -1]]]), 4).tolist()
    [[[True, False, True, False]]]
    """
    found = torch.zeros(*kept.shape[:2], count + 1, dtype=torch.bool)
    found.scatter_(-1, kept.long().where((kept >= 0) & (kept < count), count), True)
    return found[..., :count]


def survival(receipt: Receipt, first: int, stop: int) -> tuple[Tensor, Tensor]:
    """Return which share of some tokens a head still holds, and which share any head of a layer does.

    Args:
        receipt: of a cache.
        first: position of the first token asked for.
        stop: position behind the last one.

    Returns:
        Two ``[requests]`` float32, means over the layers that evict.
    """
    layers = [held(receipt.positions(i), stop)[..., first:] for i in receipt.layers]
    per_head = torch.stack([layer.float().mean((1, 2)) for layer in layers]).mean(0)
    union = torch.stack([layer.any(1).float().mean(1) for layer in layers]).mean(0)
    return per_head, union
