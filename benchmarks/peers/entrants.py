"""Caches that decode side by side: transformers' own, kvpolicy's, and kvpress' where it is installed."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from benchmarks.models import twin
from kvpolicy import EvictionPolicy
from kvpolicy.adapters.hf import EvictionCache
from kvpolicy.policies import knorm, snapkv, streaming_llm, vase

__all__ = ["KVPOLICY", "KVPRESS", "TRANSFORMERS", "Entrant", "Sizes", "full", "kvpress", "ours", "pressed", "theirs"]

TRANSFORMERS, KVPRESS, KVPOLICY = "transformers", "kvpress", "kvpolicy"


@dataclass(frozen=True)
class Sizes:
    """Give what every tool is set to.

    Attributes:
        budget: slots after an eviction.
        interval: decoded tokens between two evictions; kvpress' SnapKV needs more than ``window``.
        window: queries that SnapKV asks, and tokens that it always keeps.
        pool: width of SnapKV's average.
    """

    budget: int
    interval: int = 64
    window: int = 32
    pool: int = 5


@dataclass
class Entrant:
    """Decode with one cache.

    Attributes:
        tool: whose cache it is.
        policy: what evicts, or how large the cache is.
        model: which nobody else's hooks are on.
        cache: passed as ``past_key_values``.
        press: kvpress' object, which keeps hidden states; None elsewhere.
        position: of the next token.
    """

    tool: str
    policy: str
    model: Any
    cache: Any
    press: Any = None
    position: int = 0

    def feed(self, ids: Tensor) -> None:
        """Run tokens ``[1, n]`` through the model at their true positions, as kvpress' pipeline does."""
        positions = torch.arange(self.position, self.position + ids.shape[1])[None]
        self.model(ids, past_key_values=self.cache, position_ids=positions, use_cache=True, logits_to_keep=1)
        self.position += ids.shape[1]

    @property
    def slots(self) -> int:
        """Return the slots in use of one layer."""
        if isinstance(self.cache, EvictionCache):
            return self.cache.receipt().slots[0]
        return int(self.cache.layers[0].keys.shape[2])


def kvpress() -> Any:
    """Return the package kvpress, or None where it is not installed.

    Importing it wraps every attention function of transformers, for all models of the process: so
    everybody here runs through its wrapper.
    """
    return importlib.import_module("kvpress") if importlib.util.find_spec("kvpress") else None


def full(model: Any, policy: str = "DynamicCache") -> Entrant:
    """Return transformers' cache, which evicts nothing."""
    return Entrant(TRANSFORMERS, policy, model, DynamicCache(config=model.config))


def ours(model: Any, sizes: Sizes) -> list[Entrant]:
    """Return kvpolicy's policies on a model of their own."""
    evicting = twin(model)
    return [
        Entrant(KVPOLICY, name, evicting, EvictionCache(evicting, policy)) for name, policy in _policies(sizes).items()
    ]


def _policies(sizes: Sizes) -> dict[str, EvictionPolicy]:
    budget, interval = sizes.budget, sizes.interval
    return {
        "streaming_llm": streaming_llm(budget, interval=interval, recent=sizes.window),
        "snapkv": snapkv(budget, window=sizes.window, pool=sizes.pool, interval=interval),
        "knorm": knorm(budget, interval=interval, recent=sizes.window),
        "vase": vase(budget, interval=interval, recent=sizes.window),
    }


def theirs(model: Any, sizes: Sizes, open_presses: ExitStack) -> list[Entrant]:
    """Return kvpress' decoding presses that answer to ours; none where kvpress is not installed.

    Presses that read no hidden states keep none, as its documentation says.

    Args:
        model: from which each press gets a twin, since its hooks run for every cache of a model.
        sizes: of all.
        open_presses: closes the presses.
    """
    package = kvpress()
    if package is None:
        return []
    makers: dict[str, tuple[Callable[[], Any], int]] = {
        "StreamingLLMPress": (lambda: package.StreamingLLMPress(n_sink=4), 0),
        "SnapKVPress": (lambda: package.SnapKVPress(window_size=sizes.window, kernel_size=sizes.pool), 256),
        "KnormPress": (lambda: package.KnormPress(), 0),
    }
    return [
        pressed(twin(model), name, make(), sizes, open_presses, hidden_states=kept)
        for name, (make, kept) in makers.items()
    ]


def pressed(model: Any, name: str, base: Any, sizes: Sizes, open_presses: ExitStack, *, hidden_states: int) -> Entrant:
    """Return one ``DecodingPress``, at work on a model."""
    press = kvpress().DecodingPress(
        base,
        compression_interval=sizes.interval,
        target_size=sizes.budget,
        hidden_states_buffer_size=hidden_states,
    )
    open_presses.enter_context(press(model))
    return Entrant(KVPRESS, name, model, DynamicCache(config=model.config), press)
