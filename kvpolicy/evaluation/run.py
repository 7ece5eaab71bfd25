"""Run what is left of some plans, here or on a Ray cluster, and write what is finished."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from kvpolicy.cli.console import note, stderr
from kvpolicy.evaluation.jobs import Answering, Job, Worker
from kvpolicy.evaluation.record import Record
from kvpolicy.evaluation.results import Results

__all__ = ["Cluster", "run"]


@dataclass(frozen=True)
class Cluster:
    """Say where several workers run.

    Attributes:
        address: of a Ray cluster; ``"local"`` starts one on this machine.
        workers: each has a model of its own.
        cpus: cores of each.
        gpus: GPUs of each.
    """

    address: str = "local"
    workers: int = 1
    cpus: int = 1
    gpus: float = 0


def run(worker: Worker, work: Sequence[Job], results: Results, cluster: Cluster | None) -> None:
    """Do all jobs, and append the records of each as soon as it is done.

    Raises:
        KVPolicyError: a job cannot be done; what was done before is written.
    """
    if not work:
        return
    with _progress(sum(map(size, work))) as tell:
        for records in _done(worker, work, cluster):
            results.append(records)
            tell(records)


def size(job: Job) -> int:
    """Return how many records a job gives."""
    return len(job.problems) if isinstance(job, Answering) else len(job.ids) * len(job.cells)


def _done(worker: Worker, work: Sequence[Job], cluster: Cluster | None) -> Iterator[list[Record]]:
    if cluster is None:
        worker.setup()
        yield from map(worker, work)
        return
    from kvpolicy.evaluation.spread import spread

    address = None if cluster.address == "local" else cluster.address
    yield from spread(work, worker, address=address, workers=cluster.workers, cpus=cluster.cpus, gpus=cluster.gpus)


@contextmanager
def _progress(total: int) -> Generator[Callable[[Sequence[Record]], None]]:
    """Show what is done: a bar on a terminal, a line a batch elsewhere."""
    console = stderr()
    if console.is_terminal:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("", total=total)
            yield lambda records: progress.update(task, advance=len(records), description=_said(records))
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
