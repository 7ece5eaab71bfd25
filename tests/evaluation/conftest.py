from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvpolicy.cli.app import run as run_command
from kvpolicy.evaluation import jobs
from kvpolicy.evaluation.record import Record
from tests.cli.tools import Command, Result, save_tiny
from tests.evaluation.commands import Run


@pytest.fixture
def evaluate(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Command:
    """`kvpolicy eval` in this process, with results in ``tmp_path`` and no cache of the user's."""
    monkeypatch.setenv("KVPOLICY_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("KVPOLICY_TRACEBACK", raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)

    def command(*arguments: object) -> Result:
        capsys.readouterr()
        code = run_command(["eval", *map(str, arguments)])
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return command


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny random model whose tokens are bytes."""
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def run(evaluate: Command, tiny_folder: Path, tmp_path: Path) -> Run:
    """The command with the tiny model, where `text.txt` is a text and `out.jsonl` takes the results."""
    (tmp_path / "text.txt").write_text("".join(f"Line {number} of a text that is read.\n" for number in range(80)))

    def command(*arguments: object, model: Path = tiny_folder) -> Result:
        where = ("--model", model, "--dtype", "float32", "--device", "cpu", "--out", "out.jsonl")
        return evaluate(*where, *arguments)

    return command


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The jobs that are done."""
    found: list[Any] = []
    call = jobs.Worker.__call__

    def remember(self: jobs.Worker, job: Any) -> list[Record]:
        found.append(job)
        return call(self, job)

    monkeypatch.setattr(jobs.Worker, "__call__", remember)
    return found
