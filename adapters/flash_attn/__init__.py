"""Caches that belong to the caller, in the layouts of FlashAttention-2."""

from kvpolicy.adapters.flash_attn.backends import Backend, select_backend

__all__ = ["Backend", "select_backend"]
