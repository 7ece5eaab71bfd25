"""What a layer that evicts asks of vLLM's memory: :class:`EvictionSpec`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec, replace_as

from kvpolicy.adapters.vllm.config import Config
from kvpolicy.adapters.vllm.lengths import Reservation
from kvpolicy.policy import LayerPlan

__all__ = ["EvictionSpec"]


@dataclass(frozen=True, kw_only=True)
class EvictionSpec(FullAttentionSpec):  # pyright: ignore[reportUntypedBaseClass]
    """Be the cache of a full-attention layer that evicts.

    It takes part in prefix caching, and finds nothing: else vLLM would skip what other groups have cached.

    Attributes:
        config: what the engine was asked for; the scheduler's side reads it here.
        chunk: prompt tokens of one step at most.
    """

    config: Config
    chunk: int

    @staticmethod
    def of(spec: Any, config: Config, chunk: int) -> EvictionSpec:
        """Return the spec of a full-attention layer as one that evicts."""
        return replace_as(spec, EvictionSpec, config=config, chunk=chunk)

    def reservation(self, plan: LayerPlan) -> Reservation:
        """Return how many blocks a request under a plan holds."""
        return Reservation(plan.capacity, plan.budget, self.block_size, None if self.config.exact else self.chunk)

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        """Return the bytes of the longest request: where prompts are exact, those of its prompt."""
        longest = vllm_config.model_config.max_model_len
        return self.reservation(self.config.plan).prefill(longest) * self.page_size_bytes

    @classmethod
    def merge(cls, specs: list[EvictionSpec]) -> EvictionSpec:
        """Return the spec of layers that share a group: they are equal."""
        return KVCacheSpec.merge.__func__(cls, specs)  # not FullAttentionSpec's, which would lose our fields
