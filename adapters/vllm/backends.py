"""vLLM's attention backends, wrapped: each is found here under its name in vLLM's registry.

A wrapped backend is the stock one, but for an engine that asks for eviction. Then its metadata builder lets the
evictor run before each step, and its layers remember their newest queries. Backends that cannot evict refuse
such an engine, and are stock for every other.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

from vllm.config import get_current_vllm_config_or_none
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec, SlidingWindowSpec

from kvpolicy.adapters.vllm.config import ADAPTER, Config
from kvpolicy.adapters.vllm.evictor import Evictor, reserve
from kvpolicy.adapters.vllm.refusals import insist_on_engine, insist_on_some
from kvpolicy.adapters.vllm.spec import EvictionSpec
from kvpolicy.errors import UnsupportedError

__all__ = ["EVICTING", "LEFT_ALONE", "stock"]

#: Backends that evict.
EVICTING = ("CPU_ATTN", "FLASH_ATTN", "FLASHINFER", "TRITON_ATTN", "FLEX_ATTENTION")
#: No attention to look into.
LEFT_ALONE = ("NO_ATTENTION", "CUSTOM")

stock: dict[str, str] = {}  #: where vLLM's own class of each backend is
_asked: list[Any] = [None]  #: the configuration of the engine whose layers are being made


def __getattr__(name: str) -> Any:
    if name not in stock:
        raise AttributeError(name)
    return _wrapped(name)


@functools.cache
def _wrapped(name: str) -> type:
    base = resolve_obj_by_qualname(stock[name])
    made = _evicting(base) if name in EVICTING else _refusing(base, name)
    made.__name__ = made.__qualname__ = name
    made.__module__ = __name__
    return made


def _note() -> Config | None:
    """Note the engine whose layers are being made: vLLM asks for a layer's spec and builder without saying whose."""
    _asked[0] = get_current_vllm_config_or_none()
    config = None if _asked[0] is None else Config.of(_asked[0])
    if config is not None:
        insist_on_engine(_asked[0])
    return config


def _config() -> Config | None:
    return None if _asked[0] is None else Config.of(_asked[0])


def _chunk(scheduler: Any) -> int:
    """Return how many tokens of one request a step has at most."""
    return min(scheduler.max_num_batched_tokens, scheduler.long_prefill_token_threshold or sys.maxsize)


def _refusing(base: Any, name: str) -> type:
    class Refusing(base):
        @staticmethod
        def get_impl_cls() -> type:
            if _note() is not None:
                raise UnsupportedError(
                    f"{ADAPTER} cannot evict under the attention backend {name}; it can under "
                    f"{', '.join(EVICTING)}: write --attention-backend"
                )
            return base.get_impl_cls()

    return Refusing


def _evicting(base: Any) -> type:
    builder, impl = functools.cache(_builder), functools.cache(_impl)

    class Evicting(base):
        @classmethod
        def customize_spec(cls, spec: Any) -> Any:
            spec, config = super().customize_spec(spec), _config()
            if config is None or isinstance(spec, SlidingWindowSpec) or not isinstance(spec, FullAttentionSpec):
                return spec
            if isinstance(spec, MLAAttentionSpec) or type(spec) not in (FullAttentionSpec, EvictionSpec):
                raise UnsupportedError(f"{ADAPTER} cannot evict from a cache of the kind {type(spec).__name__}")
            if isinstance(spec, EvictionSpec):
                return spec
            return EvictionSpec.of(spec, config, _chunk(_asked[0].scheduler_config))

        @staticmethod
        def get_impl_cls() -> type:
            config, found = _note(), base.get_impl_cls()
            return found if config is None else impl(found)

        @staticmethod
        def get_builder_cls() -> type:
            found = base.get_builder_cls()
            return found if _config() is None else builder(found)

    return Evicting


def _impl(base: Any) -> type:
    class Remembering(base):
        """Attend as the stock implementation does, and remember the newest queries."""

        kvpolicy_queries = None  #: ``[places * window + 1, Hq, D]``, the last line for queries that nobody asks

        def __init__(self, *args: Any, **kw: Any) -> None:
            super().__init__(*args, **kw)
            # vLLM measures what a model takes, and gives the rest to the cache: what will be remembered of this
            # layer's requests is set aside until it is.
            self.kvpolicy_reserved = None if _sliding(self) else reserve(_asked[0], self)

        def forward(
            self, layer: Any, query: Any, key: Any, value: Any, kv_cache: Any, attn_metadata: Any, *args: Any, **kw: Any
        ) -> Any:
            lines = getattr(attn_metadata, "kvpolicy_lines", None)
            if lines is not None and self.kvpolicy_queries is not None:
                count = len(lines)
                self.kvpolicy_queries.index_copy_(0, lines, query[:count].view(count, *self.kvpolicy_queries.shape[1:]))
            return super().forward(layer, query, key, value, kv_cache, attn_metadata, *args, **kw)

    Remembering.__name__ = Remembering.__qualname__ = f"Remembering{base.__name__}"
    return Remembering


def _sliding(impl: Any) -> bool:
    window = getattr(impl, "sliding_window", None)
    return window not in (None, -1, (-1, -1))


def _builder(base: Any) -> type:
    class Building(base):
        """Let the evictor see each step before it is planned."""

        supports_update_block_table = False  # it would pass the evictor by

        def __init__(self, kv_cache_spec: Any, layer_names: Any, vllm_config: Any, device: Any, *args: Any, **kw: Any):
            super().__init__(kv_cache_spec, layer_names, vllm_config, device, *args, **kw)
            self.evictor = None
            if isinstance(kv_cache_spec, EvictionSpec):
                self.evictor = Evictor(kv_cache_spec, layer_names, vllm_config, device)
            elif _config() is not None:
                layers = vllm_config.compilation_config.static_forward_context.values()
                impls = [getattr(layer, "impl", None) for layer in layers]
                insist_on_some(any(hasattr(impl, "kvpolicy_queries") and not _sliding(impl) for impl in impls))

        def build(self, common_prefix_len: int, common_attn_metadata: Any, *args: Any, **kw: Any) -> Any:
            if self.evictor is None:
                return super().build(common_prefix_len, common_attn_metadata, *args, **kw)
            self.evictor.test(super().build, common_attn_metadata)
            metadata = super().build(0, self.evictor.step(common_attn_metadata), *args, **kw)
            metadata.kvpolicy_lines = self.evictor.buffers.lines
            return metadata

        def use_cascade_attention(self, *_: Any, **__: Any) -> bool:
            return self.evictor is None and super().use_cascade_attention(*_, **__)

    Building.__name__ = Building.__qualname__ = f"Building{base.__name__}"
    return Building
