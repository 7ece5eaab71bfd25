"""How far an evaluation is: a bar on a terminal, a line a batch elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager

from kvpolicy.cli.console import note, stderr
from kvpolicy.evaluation.record import Record

__all__ = ["progress"]


@contextmanager
def progress(total: int) -> Generator[Callable[[Sequence[Record]], None]]:
    """Show how many of some problems are done, once what is yielded is called with their records."""
    console = stderr()
    if console.is_terminal:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        with Progress(*columns, console=console) as bar:
            task = bar.add_task("", total=total)
            yield lambda records: bar.update(task, advance=len(records), description=_said(records))
        return
    start, done = time.monotonic(), 0

    def tell(records: Sequence[Record]) -> None:
        nonlocal done
        done += len(records)
        note(f"{done} of {total} problems after {time.monotonic() - start:.0f} s: {_said(records)}")

    yield tell


def _said(records: Sequence[Record]) -> str:
    cells = dict.fromkeys(record.cell for record in records)
    first = next(iter(cells))
    who = first.label if len(cells) == 1 else f"{len(cells)} policies"
    return f"{first.task}, {who}" + (f", b = {first.budget}" if first.budget and len(cells) == 1 else "")
