"""Batches of problems, spread over the workers of a Ray cluster: :func:`spread`."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeVar

from kvpolicy.errors import RunError, one_line
from kvpolicy.evaluation.errors import EvaluationError

__all__ = ["TRIES", "RunBatch", "spread"]

TRIES: Final = 3  #: of a batch whose workers die

Batch = TypeVar("Batch")
Result = TypeVar("Result")
_Given = TypeVar("_Given", contravariant=True)
_Made = TypeVar("_Made", covariant=True)


class RunBatch(Protocol[_Given, _Made]):
    """Do the work of one batch, anywhere: an object that can be pickled before :meth:`setup` and need not be after.

    The same batch gives the same result, whatever ran before: a batch may be run again.
    """

    def setup(self) -> None:
        """Load what all batches need, such as a model; called once in each worker, before its first batch."""
        ...

    def __call__(self, batch: _Given) -> _Made:
        """Return the result of a batch; whose it is must be told by the result itself."""
        ...


@dataclass
class _Job:
    """Count how often a batch was begun."""

    number: int
    batch: Any
    tries: int = 0


class _Worker:
    """Live in a process of its own, and hold what :meth:`RunBatch.setup` has loaded."""

    def __init__(self, run_batch: RunBatch[Any, Any]) -> None:
        self.run_batch = run_batch
        self.ready = False

    def run(self, batch: Any) -> Any:
        if not self.ready:
            self.run_batch.setup()
            self.ready = True
        return self.run_batch(batch)


def spread(
    batches: Iterable[Batch],
    run_batch: RunBatch[Batch, Result],
    *,
    address: str | None = None,
    workers: int = 1,
    cpus: int = 1,
    gpus: float = 0,
) -> Generator[Result]:
    """Yield the result of each batch as it comes back, in any order.

    The caller alone sees results, so it alone writes files. A worker that dies is replaced, and its batch
    is run again, :data:`TRIES` times in all. Where a batch cannot be done, no other is begun, those that
    run are waited for and yielded, and then the error is raised: what is done is never lost.

    Args:
        batches: what to run; each must be picklable. Taken as workers become free.
        run_batch: what runs them.
        address: of a Ray cluster, such as ``"auto"`` or ``"ray://head:10001"``; None starts one in this machine
            for as long as this runs, which sends no statistics.
        workers: processes, each with what ``setup()`` loads.
        cpus: cores of each worker.
        gpus: GPUs of each worker, or a share of one.

    Raises:
        EvaluationError: Ray is not installed, or the cluster has less than was asked for.
        RunError: a batch raised an error, or all its workers died.
    """
    if workers < 1:
        raise EvaluationError(f"workers={workers}: write how many processes share the work, at least 1")
    try:
        import ray
    except ModuleNotFoundError as error:
        raise EvaluationError(f"{error.name} is not installed: pip install 'kvpolicy[ray]'") from error
    remote: Any = ray.remote(_Worker).options(num_cpus=cpus, num_gpus=gpus)
    left = (_Job(number, batch) for number, batch in enumerate(batches))
    again: deque[_Job] = deque()
    failure: RunError | None = None
    with _cluster(ray, address, workers * cpus):
        _insist(ray.cluster_resources(), workers, cpus, gpus)
        idle = [remote.remote(run_batch) for _ in range(workers)]
        running: dict[Any, tuple[Any, _Job]] = {}
        try:
            while True:
                while idle and failure is None and (job := again.popleft() if again else next(left, None)):
                    worker = idle.pop()
                    job.tries += 1
                    running[worker.run.remote(job.batch)] = worker, job
                if not running:
                    break
                (done,), _ = ray.wait(list(running), num_returns=1)
                worker, job = running.pop(done)
                try:
                    result = ray.get(done)
                except ray.exceptions.RayTaskError as error:
                    idle.append(worker)
                    failure = failure or _failed(job, f"raised {one_line(error.cause)}", error.cause)
                except ray.exceptions.RayError as error:  # the worker is gone, or cannot be reached
                    ray.kill(worker)
                    again.append(job)
                    if job.tries >= TRIES:
                        failure = failure or _failed(job, f"ended {TRIES} workers: {one_line(error, 200)}", error)
                    if failure is None:
                        idle.append(remote.remote(run_batch))
                else:
                    idle.append(worker)
                    yield result
        finally:
            for worker in [*idle, *(one for one, _ in running.values())]:
                ray.kill(worker)
    if failure is not None:
        raise failure


def _failed(job: _Job, what: str, cause: BaseException) -> RunError:
    error = RunError(f"batch {job.number} {what}; the results of other batches are kept")
    error.__cause__ = cause
    return error


def _insist(resources: dict[str, float], workers: int, cpus: int, gpus: float) -> None:
    """Refuse what a cluster would wait for without end.

    Raises:
        EvaluationError: it has fewer cores or GPUs than all workers need.
    """
    for name, each in (("CPU", cpus), ("GPU", gpus)):
        found = resources.get(name, 0)
        if each and found < workers * each:
            raise EvaluationError(
                f"workers={workers} with {each:g} {name} each need {workers * each:g}, and the Ray cluster has "
                f"{found:g}; ask for at most {int(found / each)} workers"
            )


@contextmanager
def _cluster(ray: Any, address: str | None, cores: int) -> Generator[None]:
    """Be connected to a cluster, and leave it as it was found."""
    if ray.is_initialized():  # the caller's own
        yield
        return
    if address is None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(num_cpus=cores, include_dashboard=False, logging_level="ERROR")
    else:
        try:
            ray.init(address=address, logging_level="ERROR")
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise EvaluationError(f"there is no Ray cluster at {address}: {one_line(error, 200)}") from error
    try:
        yield
    finally:
        ray.shutdown()
