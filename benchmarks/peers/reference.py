"""What should be kept: rules written out, over recorded queries and keys at their true positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

__all__ = ["Recorder", "Rule", "snapkv", "streaming"]

#: Queries of every token ``[G, N, D]`` of one group, keys of every token ``[N, D]`` of its head, and the
#: ascending positions that the head holds; gives the positions to keep, ascending.
Rule: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]


def streaming(budget: int, sinks: int = 4) -> Rule:
    """Return StreamingLLM: the first few tokens, and the last ones up to the budget."""

    def rule(queries: Tensor, keys: Tensor, held: Tensor) -> Tensor:
        return torch.cat([held[:sinks], held[sinks - budget :]])

    return rule


def snapkv(budget: int, window: int, pool: int) -> Rule:
    """Return SnapKV: the last tokens, and those older ones that their queries attend to most.

    As in the official code the average runs over the older tokens alone, in position order; the
    mean over the group is kvpress' and kvpolicy's.
    """

    def rule(queries: Tensor, keys: Tensor, held: Tensor) -> Tensor:
        asking = torch.arange(keys.shape[0] - window, keys.shape[0])
        logits = queries[:, asking] @ keys[held].T * keys.shape[-1] ** -0.5
        logits = logits.masked_fill(held > asking[:, None], -torch.inf)
        received = logits.softmax(-1).mean(1)[:, :-window]
        scores = F.avg_pool1d(received, pool, stride=1, padding=pool // 2).mean(0)
        chosen = scores.topk(budget - window).indices.sort().values
        return torch.cat([held[chosen], held[-window:]])

    return rule


class Recorder:
    """Record each query and key that a Llama computes, rotated by its own position.

    Args:
        model: hooks stay on it; record a twin.
    """

    def __init__(self, model: Any) -> None:
        layers = list(model.model.layers)
        self._queries, self._keys = ([list[Tensor]() for _ in layers] for _ in range(2))
        for layer in layers:
            layer.self_attn.register_forward_hook(self._record, with_kwargs=True)

    def _record(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        hidden = kwargs["hidden_states"]
        shape = (*hidden.shape[:-1], -1, module.head_dim)
        pair = (project(hidden).view(shape).transpose(1, 2) for project in (module.q_proj, module.k_proj))
        query, key = apply_rotary_pos_emb(*pair, *kwargs["position_embeddings"])
        self._queries[module.layer_idx].append(query[0])
        self._keys[module.layer_idx].append(key[0])

    def queries(self, layer: int) -> Tensor:
        """Return ``[Hq, N, D]``."""
        return _joined(self._queries[layer])

    def keys(self, layer: int) -> Tensor:
        """Return ``[H, N, D]``."""
        return _joined(self._keys[layer])

    def keep(self, rule: Rule, layer: int, held: list[Tensor]) -> list[Tensor]:
        """Return what a rule keeps of the positions that each head holds."""
        keys = self.keys(layer)
        groups = self.queries(layer).view(len(keys), -1, *keys.shape[1:])
        return [rule(*head) for head in zip(groups, keys, held, strict=True)]

    def find(self, layer: int, keys: Tensor) -> Tensor:
        """Return the positions ``[H, S]``, ascending, of cached keys ``[H, S, D]``."""
        gaps = torch.cdist(keys, self.keys(layer), compute_mode="donot_use_mm_for_euclid_dist")
        nearest = gaps.min(-1)
        assert nearest.values.max() < 1e-9, "a cached key is none of those recorded"
        return nearest.indices.sort(-1).values


def _joined(parts: list[Tensor]) -> Tensor:
    parts[:] = [torch.cat(parts, 1)]
    return parts[0]
