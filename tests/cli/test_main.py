"""The frame around the commands: help, version, errors in one line, exit codes."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest
import typer

import kvpolicy as package
from kvpolicy.cli import listing
from kvpolicy.cli.app import app
from kvpolicy.cli.errors import CommandError, exit_code
from kvpolicy.errors import IntegrityError, OfflineError, ParameterError, RunError, one_line
from kvpolicy.evaluation.errors import EvaluationError
from tests.cli.tools import Command

PROGRAM = [sys.executable, "-m", "kvpolicy.cli"]


def raising(error: BaseException) -> Any:
    def command(*_: object, **__: object) -> NoReturn:
        raise error

    return command


def test_version(kvpolicy: Command) -> None:
    result = kvpolicy("--version")
    assert (result.code, result.out) == (0, f"kvpolicy {package.__version__}\n")


@pytest.mark.parametrize("arguments", [(), ("--help",)])
def test_help_names_every_command(kvpolicy: Command, arguments: tuple[str, ...]) -> None:
    result = kvpolicy(*arguments)
    assert result.code == 0
    for command in ("generate", "list", "show"):
        assert command in result.out


def test_every_option_has_a_help_text() -> None:
    group: Any = typer.main.get_command(app)
    for name, command in group.commands.items():
        assert command.help, name
        for parameter in command.params:
            assert parameter.help or parameter.name == "help", (name, parameter.name)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["no-such-command"], "no-such-command"),
        (["generate", "--no-such-option"], "--no-such-option"),
        (["generate", "x", "--max-new-tokens", "many"], "--max-new-tokens"),
        (["show"], "name"),
    ],
)
def test_bad_options_are_one_line(kvpolicy: Command, arguments: list[str], part: str) -> None:
    result = kvpolicy(*arguments)
    assert result.code == 2
    assert part in result.error.lower()


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (CommandError("wrong\n  thing"), 2, "error: wrong thing"),
        (ParameterError("too large"), 2, "error: too large"),
        (
            EvaluationError("`budgets` 0 and `x`: leave `engine` out"),
            2,
            "error: --budget 0 and `x`: leave --engine out\n",
        ),
        (RunError("no network"), 1, "error: no network\n"),
        (OfflineError("no hub: connect"), 1, "error: no hub: connect, or leave --model out\n"),
        (IntegrityError("slots differ"), 1, "error: slots differ"),
        (MemoryError("16 GB"), 1, "error: out of memory: 16 GB"),
        (ZeroDivisionError("a bug"), 1, "error: ZeroDivisionError: a bug (KVPOLICY_TRACEBACK=1"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_errors_become_one_line_and_a_code(
    kvpolicy: Command, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, line: str
) -> None:
    monkeypatch.setattr(listing, "_table", raising(error))
    result = kvpolicy("list")
    assert result.code == code
    assert result.err.startswith(line)
    assert result.err.count("\n") == 1


def test_traceback_on_request(kvpolicy: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "_table", raising(CommandError("wrong")))
    assert "Traceback" in kvpolicy("list", "--traceback").err
    assert "Traceback" in kvpolicy("--traceback", "list").err
    monkeypatch.setenv("KVPOLICY_TRACEBACK", "0")
    assert "Traceback" not in kvpolicy("list").err
    monkeypatch.setenv("KVPOLICY_TRACEBACK", "1")
    result = kvpolicy("list")
    assert "Traceback" in result.err
    assert result.err.endswith("error: wrong\n")
    assert result.code == 2


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_the_extra(kvpolicy: Command, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    result = kvpolicy("list")
    assert result.code == 1
    assert missing in result.error
    assert "pip install 'kvpolicy[cli]'" in result.error


def test_without_transformers(kvpolicy: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("models", "running"):
        monkeypatch.delitem(sys.modules, f"kvpolicy.cli.{module}", raising=False)
    monkeypatch.setitem(sys.modules, "transformers", None)
    result = kvpolicy("generate", "a prompt")
    assert result.code == 1
    assert "transformers is not installed: pip install 'kvpolicy[cli]'" in result.error


def test_help_imports_nothing_that_only_commands_need() -> None:
    program = """
import sys
from kvpolicy.cli import main
try:
    main(["--help"])
except SystemExit:
    print({"transformers", "huggingface_hub", "gguf", "accelerate"} & set(sys.modules))
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout.endswith("set()\n"), run.stderr


def test_one_line_and_its_limit() -> None:
    assert one_line("a\n b") == "a b"
    assert one_line(ValueError()) == "ValueError"
    assert len(one_line("x" * 1000)) == 600
    assert exit_code(ValueError()) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_interrupting_a_run(tiny: Path) -> None:
    command = [*PROGRAM, "generate", "a", "--model", str(tiny), "--max-new-tokens", "100000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.read(1)  # it writes
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "interrupted"
    assert "Traceback" not in err


@pytest.mark.skipif(sys.platform == "win32", reason="pipes")
def test_a_reader_that_goes_away_is_no_error(tiny: Path) -> None:
    command = [*PROGRAM, "generate", "a", "--model", str(tiny), "--max-new-tokens", "100000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        err = process.stderr.read()
        assert process.wait(timeout=60) == 1
    assert "error" not in err
