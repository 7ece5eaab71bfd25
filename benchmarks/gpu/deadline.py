"""Stay within a time: what does not fit into it is skipped, and what fails does not stop the rest."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import torch

from benchmarks.gpu.device import free

__all__ = ["Deadline"]

T = TypeVar("T")


class Deadline:
    """Run cases until the time is over.

    Args:
        seconds: from now on.
        device: whose memory is given back after each case.
    """

    def __init__(self, seconds: float, device: torch.device) -> None:
        self.end, self.device = time.monotonic() + seconds, device
        self.longest = 0.0

    @property
    def left(self) -> float:
        """Return the seconds that are left."""
        return self.end - time.monotonic()

    def attempt(self, work: Callable[[], T], at_least: float = 0.0) -> T | str:
        """Return what some work returns, or why there is nothing: skipped, out of memory, failed.

        Args:
            work: a case.
            at_least: seconds that it is known to need; the longest case so far counts, too.
        """
        need, left = max(at_least, self.longest), self.left
        if left <= need:
            return f"skipped: {max(0.0, left):.0f} s left, and it may take {need:.0f}"
        start = time.monotonic()
        try:
            found: T | str = work()
        except torch.OutOfMemoryError:
            found = "out of memory"
        except Exception as error:  # one kernel that fails must not cost an hour of a device
            found = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        free(self.device)  # here, where no traceback holds tensors any more
        self.longest = max(self.longest, time.monotonic() - start)
        return found
