"""Scorers that count every query once: the window that they need."""

from __future__ import annotations

from kvpolicy import _check

__all__ = ["window_for"]


def window_for(interval: int | None) -> int:
    """Return how many queries a window holds that misses none of an interval: 64 at least, and where it is None.

    >>> window_for(100), window_for(16), window_for(None)
    (100, 64, 64)
    """
    if interval is None:
        return 64
    _check.integer("Policy", "interval", interval, 1)
    return max(64, interval)
