"""Hugging Face transformers: pass an ``EvictionCache`` as ``past_key_values``, or ``cache`` since 5.24."""

from kvpolicy.adapters.hf.cache import EvictionCache
from kvpolicy.adapters.hf.losses import Losses, survival
from kvpolicy.adapters.hf.preferences import layer_preferences
from kvpolicy.adapters.hf.replay import Replay, replay, replays

__all__ = ["EvictionCache", "Losses", "Replay", "layer_preferences", "replay", "replays", "survival"]
