"""A layer of the cache, as transformers sees it: it hands new tokens to the cache that owns it."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from kvpolicy.adapters.hf import compat
from kvpolicy.errors import UnsupportedError

if TYPE_CHECKING:
    from kvpolicy.adapters.hf.passes import Passes

__all__ = ["EvictionLayer"]


class EvictionLayer(compat.Layer):
    """Stand for one evicting layer: logical lengths are what transformers is told; slots are ours."""

    is_sliding = False

    def __init__(self, cache: Passes, index: int) -> None:
        super().__init__()
        self._cache, self.index = weakref.ref(cache), index  # a cache frees its memory when it is dropped

    @property
    def cache(self) -> Passes:
        """Return the cache that this layer belongs to."""
        cache = self._cache()
        assert cache is not None
        return cache

    @property
    def is_compileable(self) -> bool:  # type: ignore[override]
        """Return whether decoding has fixed shapes."""
        return self.cache.static

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """Return whether slots were set aside for drafts; since 5.24 assisted decoding asks."""
        return self.cache.max_draft_tokens > 0

    @property
    def batch_size(self) -> int:
        """Return the number of requests, -1 before the first."""
        return self.cache.num_requests or -1

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take new tokens; return what they attend to."""
        return self.cache.take(self.index, key_states, value_states)

    def get_seq_length(self, *args: Any) -> Any:
        """Return the columns seen, pads among them: the position of the next token, to transformers.

        A tensor inside compiled code, where an integer would mean another graph a token.
        """
        if torch.compiler.is_compiling():
            return self.cache.columns_seen
        self.cache.step()
        return self.cache.columns

    def mask_sizes(self, width: int) -> tuple[int, int]:
        """Return the length and the offset of the mask: it covers the new tokens alone."""
        if torch.compiler.is_compiling():  # one token: the mask has one column, whatever its offset
            return width, 0
        self.cache.step()
        return width, self.cache.columns

    def get_max_length(self) -> int:
        """Return -1: a sequence may grow for ever."""
        return -1

    def reset(self) -> None:
        """Do nothing: the cache resets its stores."""

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Do nothing: the cache reorders its stores."""

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise UnsupportedError("an EvictionCache cannot be offloaded, nor change the size of its batch")

    offload = prefetch = batch_repeat_interleave = batch_select_indices = _refuse
