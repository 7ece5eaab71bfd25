"""`kvpolicy eval` on a tiny random model: what it writes, and how it goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvpolicy import registry
from kvpolicy.evaluation import jobs
from kvpolicy.evaluation.jobs import Answering, Reading
from kvpolicy.evaluation.record import Record
from kvpolicy.evaluation.results import decode, read
from kvpolicy.evaluation.tasks import parse
from tests.core.test_registry import MODULE, package
from tests.evaluation.commands import PASSCODE, POLICIES, TEXT, VASE, Run, table, timeless

WHOLE = ("--task", PASSCODE, "--task", TEXT, *POLICIES, "--batch", 2, "--seed", 1)


# --- from the command to the table


def test_a_table_comes_out_and_the_same_one_again_from_the_file(run: Run, tmp_path: Path, seen: list[Any]) -> None:
    first = run(*WHOLE)
    shown = table(first)
    assert "0 of 15 problems are finished; 15 to do, results in out.jsonl" in first.err
    assert "15 of 15 problems after" in first.err
    assert shown.count(f"│ {VASE} ") == 2
    assert shown.count("│ full ") == 1  # a text is compared with the full cache, which is no row
    data = (tmp_path / "out.jsonl").read_bytes()
    assert data.count(b"\n") == 15
    # Three problems are two batches of each policy; both policies read a batch of texts side by side.
    assert [type(job) for job in seen] == [Answering] * 6 + [Reading] * 2

    again = run(*WHOLE)
    assert table(again) == shown
    assert "15 of 15 problems are finished; 0 to do" in again.err
    assert "loading" not in again.err
    assert len(seen) == 8
    assert table(run("--only-report")) == shown
    assert (tmp_path / "out.jsonl").read_bytes() == data


def test_records_say_what_was_asked_and_what_came(run: Run, tmp_path: Path) -> None:
    table(run("--task", PASSCODE, "--policy", VASE, "--policy", "full", "--budget", 24, "--seed", 0, "--seed", 2))
    records = read(tmp_path / "out.jsonl")
    assert len(records) == 3 * 2 * 2
    assert {record.cell.seed for record in records} == {0, 2}
    for record in records:
        cell, details = record.cell, record.details
        assert (cell.model, cell.engine, cell.dtype, cell.task) == ("tiny", "transformers", "float32", PASSCODE)
        assert (cell.label, cell.budget) in ((VASE, 24), ("full", 0))
        assert (cell.policy == "full") == (cell.label == "full")
        assert record.problem in {"passcode/0", "passcode/1", "passcode/2"}
        assert (details["finish"] == "length") == (details["tokens"] == 16)
        assert record.score == sum(details["parts"]) / len(details["parts"])
        assert 0 < details["compression"] <= 1
        assert (details["compression"] == 1) == (details["evictions"] == 0) == (cell.label == "full")
        assert set(record.versions) == {"kvpolicy", "python", "torch", "transformers"}
    assert len({record.cell.weights for record in records}) == 1
    full = [record.details["peak_nbytes"] for record in records if record.cell.label == "full"]
    ours = [record.details["peak_nbytes"] for record in records if record.cell.label == VASE]
    assert max(ours) < min(full)


def test_a_limit_and_a_cap_and_an_own_report(run: Run, tmp_path: Path) -> None:
    result = run("--task", PASSCODE, *POLICIES, "--limit", 1, "--max-new-tokens", 3, "--report", "page.md")
    assert "3 to do" in result.err
    table(result)
    records = read(tmp_path / "out.jsonl")
    assert max(record.details["tokens"] for record in records) == 3
    assert {(record.cell.task, record.cell.max_new_tokens) for record in records} == {(PASSCODE, 3)}
    assert VASE in (tmp_path / "page.md").read_text()
    assert "the report is in page.md" in result.err
    assert table(run("--only-report", "--report", "folder")) == result.out
    assert any((tmp_path / "folder").iterdir())


@pytest.mark.usefixtures("site")
def test_the_policy_of_another_package_joins_by_name(run: Run, tmp_path: Path) -> None:
    points = (
        "[kvpolicy.stages]\nOldest = thirdparty:Oldest\n[kvpolicy.policies]\nkeep_oldest = thirdparty:keep_oldest\n"
    )
    package(tmp_path, "thirdparty", MODULE, points)
    assert "│ keep_oldest " in table(run("--task", PASSCODE, "--policy", "keep_oldest", "--budget", 80, "--limit", 1))
    (record,) = read(tmp_path / "out.jsonl")
    assert record.cell.policy == "Policy(Oldest(weight=1.0) >> TopK(80), interval=64, recent=64)"
    assert record.details["evictions"] > 0


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let packages be found in ``tmp_path``."""
    monkeypatch.syspath_prepend(tmp_path)
    for known in (registry.stages, registry.policies):
        known.cache_clear()
    yield
    for known in (registry.stages, registry.policies):
        known.cache_clear()
    sys.modules.pop("thirdparty", None)


# --- going on


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What a whole run writes, once it has been made."""
    return {}


def whole(run: Run, tmp_path: Path, uninterrupted: dict[str, list[str]]) -> list[str]:
    """Return the lines of a run that nothing interrupted; `out.jsonl` is not there afterwards."""
    if not uninterrupted:
        table(run(*WHOLE))
        uninterrupted["lines"] = timeless(tmp_path / "out.jsonl")
        (tmp_path / "out.jsonl").unlink()
    return uninterrupted["lines"]


@pytest.mark.parametrize("after", [1, 7])
def test_a_run_that_was_interrupted_goes_on_to_the_same_records(
    after: int, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uninterrupted: dict[str, list[str]]
) -> None:
    expected, call, done = whole(run, tmp_path, uninterrupted), jobs.Worker.__call__, 0

    def interrupted(self: jobs.Worker, job: Any) -> list[Record]:
        nonlocal done
        done += 1
        if done > after:
            raise KeyboardInterrupt
        return call(self, job)

    with monkeypatch.context() as patch:
        patch.setattr(jobs.Worker, "__call__", interrupted)
        assert run(*WHOLE).code == 130
    left = timeless(tmp_path / "out.jsonl")
    assert 0 < len(left) < 15
    assert set(left) < set(expected)
    result = run(*WHOLE)
    table(result)
    assert f"{len(left)} of 15 problems are finished; {15 - len(left)} to do" in result.err
    assert timeless(tmp_path / "out.jsonl") == expected


@pytest.mark.parametrize("lines", [4, 10, 12])
def test_a_line_that_was_cut_is_dropped_and_done_again(
    lines: int, run: Run, tmp_path: Path, uninterrupted: dict[str, list[str]]
) -> None:
    # A batch is one write, which a dying machine may cut anywhere: between the problems of a batch, too.
    expected, path = whole(run, tmp_path, uninterrupted), tmp_path / "out.jsonl"
    table(run(*WHOLE))
    whole_lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(whole_lines[:lines]) + whole_lines[lines][:200])
    result = run(*WHOLE)
    table(result)
    assert "warning: out.jsonl: the last line was cut" in result.err
    assert f"{lines} of 15 problems are finished" in result.err
    found = timeless(path)
    assert len(found) == len(set(found)) == 15
    # Rows that are done again go with fewer others, which may round otherwise in float32: scores are theirs.
    assert [without_numbers(line) for line in found] == [without_numbers(line) for line in expected]


def without_numbers(line: str) -> tuple[Any, ...]:
    """Return what identifies a record."""
    record = decode(line.encode())
    return record.cell, record.problem, sorted(record.details), record.versions


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_to_the_same_records(
    run: Run, tmp_path: Path, tiny_folder: Path, uninterrupted: dict[str, list[str]]
) -> None:
    expected, path = whole(run, tmp_path, uninterrupted), tmp_path / "out.jsonl"
    where = ("--model", tiny_folder, "--dtype", "float32", "--device", "cpu", "--out", path)
    words = [sys.executable, "-m", "kvpolicy.cli", "eval", *map(str, (*where, *WHOLE))]
    process = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while process.poll() is None and not (path.exists() and b"\n" in path.read_bytes()):
            time.sleep(0.005)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL
    left = path.read_bytes().count(b"\n")
    result = run(*WHOLE)
    table(result)
    assert f"{left} of 15 problems are finished" in result.err
    assert timeless(path) == expected


def test_one_policy_more_is_the_only_one_that_is_run(run: Run, tmp_path: Path, seen: list[Any]) -> None:
    tasks = ("--task", PASSCODE, "--task", TEXT)
    table(run(*tasks, "--policy", VASE, "--budget", 24))
    before = timeless(tmp_path / "out.jsonl")
    seen.clear()
    result = run(*tasks, "--policy", VASE, "--policy", "tova", "--budget", 24)
    table(result)
    assert "6 of 12 problems are finished; 6 to do" in result.err
    answering, reading = seen
    assert answering.cell.label == "tova"
    assert [cell.label for cell in reading.cells] == ["tova"]
    assert set(before) < set(timeless(tmp_path / "out.jsonl"))


def test_more_texts_and_one_policy_more_at_once(run: Run, tmp_path: Path) -> None:
    table(run("--task", TEXT, "--policy", VASE, "--budget", 24, "--limit", 1))
    result = run("--task", TEXT, "--policy", VASE, "--policy", "tova", "--budget", 24, "--limit", 3)
    table(result)
    assert "1 of 6 problems are finished; 5 to do" in result.err
    assert len(read(tmp_path / "out.jsonl")) == 6


@pytest.mark.parametrize(
    ("words", "count"),
    [
        (["--task", PASSCODE, "--task", PASSCODE.replace("length=", ""), "--policy", "full"], 2),
        (["--task", PASSCODE, "--policy", "full", "--policy", "full", "--seed", 1, "--seed", 1], 2),
        (["--task", PASSCODE, "--policy", VASE, "--budget", 24, "--budget", 24], 2),
        (["--task", PASSCODE, "--task", f"own({PASSCODE})", "--policy", "full", "--policy", "tova(96)"], 4 + 2),
    ],
    ids=["task", "seed", "budget", "own"],
)
def test_what_is_named_twice_is_done_once(words: list[object], count: int, run: Run, tmp_path: Path) -> None:
    table(run(*words, "--limit", 2))
    assert count - 2 <= len(read(tmp_path / "out.jsonl")) <= count  # answers of less than 16 tokens are not read


def test_a_models_own_answers_are_answered_once_and_read_under_each_policy(
    run: Run, tmp_path: Path, seen: list[Any]
) -> None:
    task, policies = f"own({PASSCODE})", ("--policy", "full", "--policy", "tova(b, interval=4)", "--budget", 40)
    result = run("--task", task, *policies)
    assert "0 of 3 problems are finished; 3 to do" in result.err
    shown = table(result)
    records = read(tmp_path / "out.jsonl")
    answers = [record for record in records if "output" in record.details]
    texts = [record for record in records if "kl" in record.details]
    assert {(record.cell.task, record.cell.policy) for record in answers} == {(PASSCODE, "full")}
    assert {(record.cell.task, record.cell.label) for record in texts} <= {(repr(parse(task)), policies[3])}
    assert {record.problem for record in texts} == {
        record.problem for record in answers if record.details["tokens"] >= 16
    }
    seen.clear()
    assert table(run("--task", task, *policies)) == shown
    assert seen == []
