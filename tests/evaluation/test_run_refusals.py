"""What `kvpolicy eval` refuses: one line on stderr, exit code 2, and no problem run for nothing."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from kvpolicy.evaluation.results import Results
from tests.evaluation.commands import PASSCODE, TEXT, VASE, Run, refused, table


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--policy", "full"], "there is no task: add --task"),
        (["--task", "passcde", "--policy", "full"], "did you mean 'passcode'"),
        (["--task", "passcode(lenght=96)", "--policy", "full"], "did you mean 'length'"),
        (["--task", PASSCODE, "--policy", "vaze(24)"], "did you mean 'vase'"),
        (["--task", PASSCODE, "--policy", "vase(B)", "--budget", 24], "'B' is not known"),
        (["--task", PASSCODE, "--policy", "vase(B)", "--policy", "tova", "--budget", 24], "B"),
        (["--task", PASSCODE, "--policy", "vase"], "has no budget: add --budget"),
        (["--task", PASSCODE], "has no budget: add --budget"),
        (["--task", PASSCODE, "--policy", "full", "--budget", 24], "goes nowhere"),
        (["--task", PASSCODE, "--policy", "full: vase(b)", "--budget", 24], "'full' names full and vase"),
        (["--task", PASSCODE, "--policy", "m: vase(b)", "--policy", "m: rkv(b)", "--budget", 24], "a name of its own"),
        (["--task", PASSCODE, "--policy", "full", "--workers", 2], "add --ray"),
        (["--task", PASSCODE, "--policy", "full", "--data", "/nowhere"], "no such folder"),
        (["--task", PASSCODE, "--policy", "full", "--report", "page.html"], "a .md file or a folder"),
        (["--task", PASSCODE, "--policy", "full", "--limit", 0], "--limit 0: it is at least 1"),
        (["--task", PASSCODE, "--policy", "full", "--batch", 0], "--batch 0"),
        (["--task", PASSCODE, "--policy", "full", "--seed", -1], "--seed -1"),
        (["--task", PASSCODE, "--policy", "full", "--temperature", -1], "--temperature -1"),
        (["--task", PASSCODE, "--policy", "full", "--top-p", 0.5], "set it, too"),
        (["--task", PASSCODE, "--policy", "full", "--temperature", 1, "--top-p", 0], "--top-p 0"),
        (["--task", PASSCODE, "--policy", "full", "--engine", "transformer"], "did you mean 'transformers'"),
        (["--task", TEXT, "--policy", "full"], "is read under a policy and compared with the full cache"),
        (["--task", "file('nowhere.txt')", "--policy", "vase(96)"], "nowhere.txt cannot be read"),
        (["--task", "passcode(length=96, depth=0)", "--policy", "full"], "the fact is not in the last 96 tokens"),
        (["--task", "file('text.txt', length=20)", "--policy", "vase(96)"], "texts are read from 32 tokens on"),
    ],
)
def test_a_wrong_command_is_refused_before_a_model_runs(
    arguments: list[object], why: str, run: Run, tmp_path: Path, seen: list[Any]
) -> None:
    refused(run(*arguments), why)
    assert seen == []
    assert not (tmp_path / "out.jsonl").exists() or not (tmp_path / "out.jsonl").read_bytes()


def test_a_budget_that_guards_do_not_fit_is_refused_before_any_problem_is_run(
    run: Run, tmp_path: Path, seen: list[Any]
) -> None:
    result = run("--task", PASSCODE, "--policy", "full", "--policy", VASE, "--policy", "vase", "--budget", 32)
    refused(result, "recent=64")
    assert seen == []
    assert (tmp_path / "out.jsonl").read_bytes() == b""


def test_a_model_that_is_not_there_is_refused(run: Run, tmp_path: Path, tiny_folder: Path) -> None:
    asked = ("--task", PASSCODE, "--policy", "full")
    refused(run(*asked, model=tmp_path / "nowhere"), "there is no folder")
    refused(run(*asked, model=tmp_path), "holds no model")
    shutil.copytree(tiny_folder, tmp_path / "empty", ignore=shutil.ignore_patterns("*.safetensors"))
    refused(run(*asked, model=tmp_path / "empty"), "holds no weights")


def test_other_weights_under_the_same_name_are_another_model(run: Run, tmp_path: Path, tiny_folder: Path) -> None:
    asked = ("--task", PASSCODE, "--policy", "full", "--limit", 1)
    table(run(*asked))
    copy = tmp_path / "elsewhere" / "tiny"
    shutil.copytree(tiny_folder, copy)
    assert "0 to do" in run(*asked, model=copy).err
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-3] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert "1 to do" in run(*asked, model=copy).err


def test_two_runs_cannot_write_one_file(run: Run, tmp_path: Path, seen: list[Any]) -> None:
    with Results.open(tmp_path / "out.jsonl"):
        refused(run("--task", PASSCODE, "--policy", "full"), "is being written by another run")
    assert seen == []
    assert table(run("--task", PASSCODE, "--policy", "full"))


@pytest.mark.parametrize("line", [b"{}\n", b'{"schema":2}\n', b"not json\n", b'{"schema":1,"cell":{}}\n'])
def test_a_line_that_cannot_be_read_stops_the_run_and_stays(line: bytes, run: Run, tmp_path: Path) -> None:
    asked = ("--task", PASSCODE, "--policy", "full")
    (tmp_path / "out.jsonl").write_bytes(line + b'{"schema":1,"cel')
    for arguments in (asked, ("--only-report",)):
        refused(run(*arguments), r"out\.jsonl, line 1 cannot be read")
        assert (tmp_path / "out.jsonl").read_bytes() == line + b'{"schema":1,"cel'


def test_a_report_of_nothing_says_so(run: Run, tmp_path: Path) -> None:
    refused(run("--only-report"), "cannot read results from out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()
    (tmp_path / "out.jsonl").write_bytes(b"")
    refused(run("--only-report"), "there are no results yet")


def test_tasks_are_listed(run: Run) -> None:
    listed = table(run("--tasks"))
    for name in ("gsm8k", "passcode", "pydoc"):
        assert re.search(rf"^{name} +\w", listed, re.MULTILINE)
