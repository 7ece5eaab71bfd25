"""Batches that are spread over workers all come back, once; what ends a worker ends at most its batch."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from kvpolicy.errors import RunError
from kvpolicy.evaluation.distributed import _insist, spread
from kvpolicy.evaluation.errors import EvaluationError
from tests.evaluation.commands import PASSCODE, POLICIES, TEXT, Run, table, timeless

WORKERS = 2
needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="needs Ray: make test-ray")


class Square:
    """Square numbers, and note in a folder each time that a worker was set up or a batch was begun."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.add: int | None = None

    def setup(self) -> None:
        self.note("setup")
        self.add = 0

    def note(self, what: str) -> None:
        with (self.folder / what).open("a") as file:
            file.write(f"{os.getpid()}\n")

    def noted(self, what: str) -> list[str]:
        return (self.folder / what).read_text().split()

    def __call__(self, batch: int) -> tuple[int, int]:
        self.note(f"batch-{batch}")
        assert self.add is not None, "not set up"
        return batch, batch**2 + self.add


class Dying(Square):
    """End its process on one batch, so often."""

    times = 1

    def __call__(self, batch: int) -> tuple[int, int]:
        found = super().__call__(batch)
        if batch == 3 and len(self.noted("batch-3")) <= self.times:
            os._exit(1)
        return found


class AlwaysDying(Dying):
    times = 99


class Raising(Square):
    def __call__(self, batch: int) -> tuple[int, int]:
        found = super().__call__(batch)
        if batch == 3:
            raise ValueError("three is too many")
        return found


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """One cluster for all tests: to start one takes seconds."""
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(num_cpus=WORKERS, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    yield
    ray.shutdown()


@needs_ray
@pytest.mark.usefixtures("cluster")
def test_every_batch_comes_back_once_and_workers_are_set_up_once(tmp_path: Path) -> None:
    work = Square(tmp_path)
    assert sorted(spread(range(20), work, workers=WORKERS)) == [(n, n**2) for n in range(20)]
    setups = work.noted("setup")
    assert len(set(setups)) == len(setups) <= WORKERS
    assert {pid for n in range(20) for pid in work.noted(f"batch-{n}")} == set(setups)


@needs_ray
@pytest.mark.usefixtures("cluster")
def test_the_batch_of_a_worker_that_died_is_run_on_another(tmp_path: Path) -> None:
    work = Dying(tmp_path)
    assert sorted(spread(range(6), work, workers=WORKERS)) == [(n, n**2) for n in range(6)]
    first, second = work.noted("batch-3")
    assert first != second


@needs_ray
@pytest.mark.usefixtures("cluster")
def test_a_batch_that_ends_three_workers_is_one_error_and_the_rest_is_kept(tmp_path: Path) -> None:
    results = spread(range(4), AlwaysDying(tmp_path), workers=1)
    assert [next(results) for _ in range(3)] == [(n, n**2) for n in range(3)]
    with pytest.raises(RunError, match=r"batch 3 ended 3 workers.*the results of other batches are kept"):
        next(results)


@needs_ray
@pytest.mark.usefixtures("cluster")
def test_an_error_of_a_batch_is_not_tried_again(tmp_path: Path) -> None:
    work = Raising(tmp_path)
    with pytest.raises(RunError, match="batch 3 raised three is too many") as error:
        list(spread(iter(range(100)), work, workers=1))
    assert isinstance(error.value.__cause__, ValueError)
    assert len(work.noted("batch-3")) == 1
    assert not (tmp_path / "batch-4").exists(), "no batch is begun after an error"


@needs_ray
@pytest.mark.usefixtures("cluster")
def test_a_caller_that_has_enough_frees_the_workers(tmp_path: Path) -> None:
    import ray

    results = spread(range(1000), Square(tmp_path), workers=1)
    assert next(results) == (0, 0)
    assert ray.available_resources().get("CPU", 0) < WORKERS
    results.close()
    until = time.monotonic() + 30  # Ray takes a moment to count what was freed
    while ray.available_resources().get("CPU", 0) < WORKERS and time.monotonic() < until:
        time.sleep(0.1)
    assert ray.available_resources()["CPU"] == WORKERS


@needs_ray
@pytest.mark.usefixtures("cluster")
def test_the_command_spread_over_two_workers_finds_what_one_process_finds(run: Run, tmp_path: Path) -> None:
    asked = ("--task", PASSCODE, "--task", TEXT, *POLICIES, "--batch", 2)
    table(run(*asked))
    expected = timeless(tmp_path / "out.jsonl")
    (tmp_path / "out.jsonl").unlink()
    result = run(*asked, "--ray", "local", "--workers", WORKERS)
    table(result)
    assert timeless(tmp_path / "out.jsonl") == expected


def test_more_than_a_cluster_has_is_refused_and_not_waited_for() -> None:
    _insist({"CPU": 4.0, "GPU": 1.0}, 2, 2, 0.5)
    with pytest.raises(EvaluationError, match="need 8, and the Ray cluster has 4; ask for at most 2 workers"):
        _insist({"CPU": 4.0}, 4, 2, 0)
    with pytest.raises(EvaluationError, match="with 1 GPU each need 2, and the Ray cluster has 0"):
        _insist({"CPU": 4.0}, 2, 1, 1)


def test_no_workers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="at least 1"):
        list(spread([1], Square(tmp_path), workers=0))


def test_without_ray_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(EvaluationError, match=r"pip install 'kvpolicy\[ray\]'"):
        list(spread([1], Square(tmp_path)))
