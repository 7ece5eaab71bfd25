"""A lock between processes that a killed process cannot leave behind."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["locked"]


@contextmanager
def locked(path: Path, waiting: Callable[[], None]) -> Generator[bool]:
    """Hold the lock on a file; yield whether there is one.

    The operating system releases the lock with the process. Where it offers none (Windows, some
    network file systems), two processes may do the same work, and whoever publishes first wins.

    Args:
        path: made if it is missing, and left there.
        waiting: called once where another process holds the lock.
    """
    with path.open("a") as file:
        yield _lock(file.fileno(), waiting)


if sys.platform == "win32":

    def _lock(descriptor: int, waiting: Callable[[], None]) -> bool:
        return False

else:
    import fcntl

    def _lock(descriptor: int, waiting: Callable[[], None]) -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:
            return False
        return True
