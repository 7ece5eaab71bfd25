"""Measure on a noisy machine: CPU time of one thread, contestants taking turns, ratios of medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Ratio", "clock", "median_ms", "ratio", "take_turns"]

clock = time.thread_time  #: seconds of CPU that this thread has used; torch runs on one thread


@dataclass(frozen=True)
class Ratio:
    """Hold a ratio of medians, and the quartiles of the ratios of single repeats.

    Attributes:
        median: of the medians.
        low: first quartile over the repeats, each compared with its neighbour in time.
        high: third quartile.
    """

    median: float
    low: float
    high: float


def take_turns(contestants: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Run every contestant once a round, a different one first each time.

    Args:
        contestants: by name; each returns the seconds that it counted.
        repeats: rounds.

    Returns:
        The seconds of each round, by name.
    """
    names, seconds = list(contestants), {name: list[float]() for name in contestants}
    for turn in range(repeats):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            seconds[name].append(contestants[name]())
    return seconds


def ratio(seconds: Sequence[float], baseline: Sequence[float]) -> Ratio:
    """Return how long something took, over how long the baseline took in the same rounds."""
    pairs = [a / b for a, b in zip(seconds, baseline, strict=True)]
    low, _, high = statistics.quantiles(pairs, n=4, method="inclusive") if len(pairs) > 1 else pairs * 3
    return Ratio(statistics.median(seconds) / statistics.median(baseline), low, high)


def median_ms(seconds: Sequence[float]) -> float:
    """Return the median, in milliseconds."""
    return statistics.median(seconds) * 1e3
