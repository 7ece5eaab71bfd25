"""Caches that belong to the caller, in the layouts of FlashAttention-2."""

from kvpolicy.adapters.flash_attn.backends import Backend, select_backend
from kvpolicy.adapters.flash_attn.cache import FlashCache
from kvpolicy.adapters.flash_attn.eviction import Evicted, evict_
from kvpolicy.adapters.flash_attn.state import EvictionState

__all__ = ["Backend", "Evicted", "EvictionState", "FlashCache", "evict_", "select_backend"]
