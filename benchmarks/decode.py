"""Time per decoded token at equal occupancy, evictions included."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from benchmarks.models import all_cores, prefill, tokens, twin
from benchmarks.report import Section, Target
from benchmarks.timing import clock, median_ms, ratio
from kvpolicy import Adaptive, Policy, Stochastic, TopK, ValueGuard
from kvpolicy.adapters.hf import EvictionCache
from kvpolicy.policies import vase

__all__ = ["run"]

INTERVAL = 64  #: tokens between two evictions: every repeat holds exactly one
DYNAMIC, STATIC, OURS = "DynamicCache", "StaticCache", "vase"
LIMITS = {(DYNAMIC, 256): 1.02, (DYNAMIC, 4096): 1.0, (STATIC, 256): 1.03, (STATIC, 4096): 1.03}


@dataclass
class Contestant:
    """Decode with one cache; ``rewind`` makes it hold again what it held before a repeat."""

    model: Any
    cache: Any
    rewind: Callable[[], None]
    seconds: float = 0.0

    def step(self, token: Tensor) -> None:
        """Decode one token."""
        start = clock()
        self.model(token, past_key_values=self.cache, use_cache=True)
        self.seconds += clock() - start


def run(model: Any, sizes: list[int], repeats: int) -> Section:
    """Compare at each number of slots.

    Args:
        model: whose caches they are.
        sizes: slots held at the start of each repeat; at the largest also a quarter of them.
        repeats: segments of 64 tokens.
    """
    section = Section(
        "decode",
        f"CPU ms per token, {INTERVAL} tokens and one eviction a repeat, {repeats} repeats; "
        "ratios of medians (quartiles)",
        ["slots", "cache", "ms per token", "vs DynamicCache", "vs StaticCache"],
    )
    evicting = twin(model)
    for size in sizes:
        contestants = _contestants(model, evicting, size, quarter=size == max(sizes))
        seconds = _measure(contestants, tokens(model, INTERVAL), repeats)
        for name, mine in seconds.items():
            versus = {other: ratio(mine, seconds[other]) for other in (DYNAMIC, STATIC)}
            per_token = median_ms(mine) / INTERVAL
            section.rows.append([f"{size}–{size + INTERVAL}", name, per_token, *versus.values()])
            if name == f"{OURS}({size})":
                section.targets += [
                    Target(f"{size} slots, vs {other}", versus[other].median, LIMITS[other, size])
                    for other in versus
                    if (other, size) in LIMITS
                ]
    return section


def _measure(contestants: dict[str, Contestant], ids: Tensor, repeats: int) -> dict[str, list[float]]:
    """Decode the same tokens with every cache, taking turns at every token."""
    seconds = {name: list[float]() for name in contestants}
    order = list(contestants.items())
    with torch.no_grad():
        for _ in range(repeats):
            for token in torch.split(ids, 1, 1):
                for _, contestant in order:
                    contestant.step(token)
                order.append(order.pop(0))
            for name, contestant in contestants.items():
                seconds[name].append(contestant.seconds)
                contestant.seconds = 0.0
                contestant.rewind()
    return seconds


def _contestants(model: Any, evicting: Any, size: int, *, quarter: bool) -> dict[str, Contestant]:
    config, ids = model.config, tokens(model, size)
    dynamic, static = DynamicCache(config=config), StaticCache(config, max_cache_len=size + INTERVAL)
    with all_cores():
        prefill(model, dynamic, ids)
        layers: list[Any] = dynamic.layers
        for index, layer in enumerate(layers):
            static.update(layer.keys, layer.values, index)
        found = {
            DYNAMIC: Contestant(model, dynamic, lambda: _rewind_dynamic(dynamic, size)),
            STATIC: Contestant(model, static, lambda: _rewind_static(static, size)),
        }
        over_heads = Policy(ValueGuard() >> Stochastic() >> TopK(Adaptive(size, floor=0.5)))
        policies = {f"{OURS}({size})": vase(size), f"{OURS}, Adaptive({size})": over_heads}
        if quarter:
            policies[f"{OURS}({size // 4})"] = vase(size // 4)
        for name, policy in policies.items():
            cache = EvictionCache(evicting, policy)
            prefill(evicting, cache, ids)
            found[name] = Contestant(evicting, cache, lambda: None)
    return found


def _rewind_dynamic(cache: Any, size: int) -> None:
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, :size], layer.values[:, :, :size]


def _rewind_static(cache: Any, size: int) -> None:
    for layer in cache.layers:
        layer.keys[:, :, size:].zero_()
        layer.values[:, :, size:].zero_()
        layer.cumulative_length.fill_(size)
