"""Scorers that count every query once: which ones are new, and the window that they need."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from kvpolicy import _check
from kvpolicy.errors import BudgetError
from kvpolicy.stage import Scorer
from kvpolicy.view import View

__all__ = ["EveryQuery", "uncounted", "window_for"]


class EveryQuery(Scorer):
    """Count every decoded query once: with a window that misses none of an interval, or not at all.

    Attributes:
        window: queries that the window holds; a field of the dataclass that derives from this.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"queries", "every_query"})

    window: int

    def queries_read(self, interval: int | None) -> int:
        """Return the window.

        Raises:
            BudgetError: the window is smaller than the interval.
        """
        if interval is not None and interval > self.window:
            raise BudgetError(
                f"{self!r} counts every query, and its window holds {self.window} of the {interval} of an interval; "
                f"write {type(self).__name__}(window={interval}), or interval={self.window}"
            )
        return self.window


def uncounted(view: View, window: int) -> tuple[Tensor, Tensor]:
    """Return the newest ``window`` queries, and the positions of those that are new since the row was last seen.

    Returns:
        ``[B, Hq, window, D]``, and ``[B, window]``, -1 where a query is absent or was counted before.
    """
    assert view.queries is not None
    assert view.query_positions is not None
    positions = view.query_positions[:, -window:]
    first = view.seen - (view.fresh >= 0).sum(-1)[:, 0]
    return view.queries[:, :, -window:], torch.where(positions >= first[:, None], positions, -1)


def window_for(interval: int | None) -> int:
    """Return how many queries a window holds that misses none of an interval: 64 at least, and where it is None.

    >>> window_for(100), window_for(16), window_for(None)
    (100, 64, 64)
    """
    if interval is None:
        return 64
    _check.integer("Policy", "interval", interval, 1)
    return max(64, interval)
