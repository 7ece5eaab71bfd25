"""Hugging Face transformers: pass an ``EvictionCache`` as ``past_key_values``."""

from kvpolicy.adapters.hf.cache import EvictionCache

__all__ = ["EvictionCache"]
