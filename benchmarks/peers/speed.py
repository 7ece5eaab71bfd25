"""Time per decoded token, evictions included, at equal numbers of slots."""

from __future__ import annotations

import statistics
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from benchmarks.models import all_cores, tokens
from benchmarks.peers.entrants import TRANSFORMERS, Entrant, Sizes, full, ours, theirs
from benchmarks.report import Section
from benchmarks.timing import clock, median_ms, ratio

__all__ = ["run"]

Times = list[list[float]]  # of each repeat, the seconds of each step


def run(name: str, model: Any, sizes: Sizes, repeats: int) -> Section:
    """Decode the same tokens with every cache, taking turns at every token.

    Everybody starts from a prompt as long as the budget, so that all hold as many slots at each step.
    ``DynamicCache`` is cut back to them between repeats, untimed.

    Args:
        name: of the section.
        model: whose caches they are.
        sizes: of all; a repeat is an interval, the last token of which evicts.
        repeats: of everything.
    """
    section = Section(
        name,
        f"CPU ms per token at budget {sizes.budget}, {sizes.interval} tokens and one eviction a repeat, {repeats} "
        "repeats; ratios to DynamicCache at equal slots, of medians over the repeats (quartiles)",
        ["tool", "policy", "mean ms", "median ms", "evicting step ms", "mean ratio", "median ratio"],
    )
    with ExitStack() as presses:
        entrants = [full(model), *theirs(model, sizes, presses), *ours(model, sizes)]
        _fill(entrants, tokens(model, sizes.budget))
        times = _measure(entrants, tokens(model, sizes.interval), repeats)
    section.rows = [_row(one, mine, times[0]) for one, mine in zip(entrants, times, strict=True)]
    return section


def _fill(entrants: list[Entrant], ids: Tensor) -> None:
    with torch.no_grad(), all_cores():
        for entrant in entrants:
            entrant.feed(ids)


def _row(entrant: Entrant, mine: Times, baseline: Times) -> list[Any]:
    means, medians = ([[of(steps) for steps in one] for one in (mine, baseline)] for of in (_mean, statistics.median))
    evicting = [steps[-1] for steps in mine]
    times = [median_ms(seconds) for seconds in (means[0], medians[0], evicting)]
    return [entrant.tool, entrant.policy, *times, ratio(*means), ratio(*medians)]


def _mean(seconds: list[float]) -> float:
    return statistics.fmean(seconds)


def _measure(entrants: list[Entrant], ids: Tensor, repeats: int) -> list[Times]:
    held, times = [one.slots for one in entrants], [Times() for _ in entrants]
    order = list(range(len(entrants)))
    with torch.no_grad():
        for _ in range(repeats):
            for seconds in times:
                seconds.append([])
            for token in torch.split(ids, 1, 1):
                for i in order:
                    start = clock()
                    entrants[i].feed(token)
                    times[i][-1].append(clock() - start)
                order.append(order.pop(0))
            for entrant, slots in zip(entrants, held, strict=True):
                if entrant.tool == TRANSFORMERS:
                    _rewind(entrant, slots)
                assert entrant.slots == slots, f"{entrant.tool} {entrant.policy} holds {entrant.slots}, not {slots}"
    return times


def _rewind(entrant: Entrant, slots: int) -> None:
    for layer in entrant.cache.layers:
        layer.keys, layer.values = layer.keys[:, :, :slots], layer.values[:, :, :slots]
    entrant.position = slots
