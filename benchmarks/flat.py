"""Seconds per token do not grow with the tokens generated."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from benchmarks.models import all_cores, prefill, tokens, twin
from benchmarks.report import Section, Target
from benchmarks.timing import clock, ratio
from kvpolicy.adapters.hf import EvictionCache
from kvpolicy.policies import vase

__all__ = ["run"]

LIMIT = 1.05


def run(model: Any, budget: int, until: int, stride: int, measured: int) -> Section:
    """Decode with one cache for long, and beside it with one that always begins anew.

    Between two marks the tokens are fed in turns of an interval, which evicts as decoding them
    would, at the speed of a prompt.

    Args:
        model: to decode with.
        budget: slots kept.
        until: tokens decoded in all.
        stride: tokens between two marks.
        measured: tokens decoded one by one at each mark, a multiple of the interval.
    """
    section = Section(
        "flat",
        f"CPU ms per token of vase({budget}); at each mark {measured} tokens are decoded in turn "
        "with a cache that has just begun",
        ["tokens", "slots", "evictions", "ms per token", "young cache", "old / young"],
    )
    evicting = twin(model)
    ids = tokens(model, until + measured)
    old, young = (EvictionCache(evicting, vase(budget)) for _ in range(2))
    done, medians, ratios = 0, list[float](), list[float]()
    for mark in [budget, *range(stride, until, stride), until]:
        with all_cores():
            prefill(evicting, old, ids[:, done:mark], budget if done == 0 else 64)
            young.reset()
            prefill(evicting, young, ids[:, :budget], budget)
        steps = torch.split(ids[:, mark : mark + measured], 1, 1)
        seconds = [[_step(evicting, cache, token) for cache in (old, young)] for token in steps]
        mine, theirs = zip(*seconds, strict=True)
        done = mark + measured
        compared = ratio(mine, theirs)
        ratios.append(sum(mine) / sum(theirs))
        receipt = old.receipt()
        typical, young_typical = statistics.median(mine) * 1e3, statistics.median(theirs) * 1e3
        medians.append(typical)
        section.rows.append([mark, receipt.slots[0], receipt.evictions[0], typical, young_typical, compared])
    section.targets = [
        Target("last mark / first mark", medians[-1] / medians[0], LIMIT),
        Target("old / young at the last mark, evictions included", ratios[-1], LIMIT),
    ]
    return section


def _step(model: Any, cache: EvictionCache, token: torch.Tensor) -> float:
    with torch.no_grad():
        start = clock()
        model(token, past_key_values=cache, use_cache=True)
        return clock() - start
