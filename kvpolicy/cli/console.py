"""What goes to the terminal: results to stdout; progress, warnings and errors to stderr."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console

from kvpolicy.errors import IncompleteWarning

__all__ = ["note", "rule", "stderr", "stdout", "warn", "warnings_shown", "working"]


def stdout() -> Console:
    """Return a console for results."""
    return Console(file=sys.stdout, highlight=False)


def stderr() -> Console:
    """Return a console for everything that is no result."""
    return Console(file=sys.stderr, highlight=False)


def rule(title: str) -> None:
    """Print a heading to stdout."""
    stdout().print(f"── {title}", style="dim", markup=False, soft_wrap=True)


def note(text: str, style: str | None = None) -> None:
    """Print to stderr as it is, however long, after what stdout has so far."""
    sys.stdout.flush()
    stderr().print(text, style=style, markup=False, soft_wrap=True)


def warn(text: str) -> None:
    """Print a warning to stderr."""
    note(f"warning: {text}", style="yellow")


@contextmanager
def warnings_shown() -> Generator[None]:
    """Print what the library found incomplete as :func:`warn` does, each time; other warnings as Python does."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", IncompleteWarning)
        others = warnings.showwarning

        def show(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if issubclass(category, IncompleteWarning):
                warn(str(message))
            else:
                others(message, category, filename, lineno, file, line)

        warnings.showwarning = show
        yield


@contextmanager
def working(text: str, *, quiet: bool = False) -> Generator[None]:
    """Show what is being done: a spinner on a terminal, a plain line elsewhere."""
    console = stderr()
    if quiet:
        yield
    elif console.is_terminal:
        with console.status(f"{text} ..."):
            yield
    else:
        note(f"{text} ...")
        yield
