"""Run what is left of some plans, here or on a Ray cluster, and write what is finished."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

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


def run(
    worker: Worker,
    work: Sequence[Job],
    results: Results,
    cluster: Cluster | None,
    tell: Callable[[Sequence[Record]], None] | None = None,
) -> None:
    """Do all jobs, and append the records of each as soon as it is done.

    Args:
        worker: who does them, here or a copy in each process of the cluster.
        work: what is left to do.
        results: the file.
        cluster: where several workers run; None runs one here.
        tell: called with the records of each job, once they are written.

    Raises:
        KVPolicyError: a job cannot be done; what was done before is written.
    """
    for records in _done(worker, work, cluster) if work else ():
        results.append(records)
        if tell is not None:
            tell(records)


def size(job: Job) -> int:
    """Return how many records a job gives."""
    return len(job.problems) if isinstance(job, Answering) else len(job.ids) * len(job.cells)


def _done(worker: Worker, work: Sequence[Job], cluster: Cluster | None) -> Iterator[list[Record]]:
    if cluster is None:
        worker.setup()
        yield from map(worker, work)
        return
    from kvpolicy.evaluation.distributed import spread

    address = None if cluster.address == "local" else cluster.address
    yield from spread(work, worker, address=address, workers=cluster.workers, cpus=cluster.cpus, gpus=cluster.gpus)
