"""Caches that belong to the caller, in the layouts of FlashAttention-2."""

from kvpolicy.adapters.flash_attn.backends import Backend, select_backend
from kvpolicy.adapters.flash_attn.cache import FlashCache

__all__ = ["Backend", "FlashCache", "select_backend"]
