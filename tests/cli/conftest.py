from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from kvpolicy.cli import main
from tests.cli.tools import Command, Result, save_tiny


@pytest.fixture(autouse=True)
def surroundings(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test touches the user's cache, but those that say that they need the real model."""
    if request.node.get_closest_marker("model") is None:
        monkeypatch.setenv("KVPOLICY_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("KVPOLICY_TRACEBACK", raising=False)
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def kvpolicy(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """The command line, without the cost of a new process."""

    def run(*arguments: object, stdin: str | bytes | None = None) -> Result:
        if stdin is not None:
            raw = stdin.encode() if isinstance(stdin, str) else stdin
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw), "utf-8"))
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert isinstance(exit.value.code, int)
        return Result(exit.value.code, captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny random model whose tokenizer has a chat template."""
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without a chat template."""
    return save_tiny(tmp_path_factory.mktemp("models") / "bare", template=None)
